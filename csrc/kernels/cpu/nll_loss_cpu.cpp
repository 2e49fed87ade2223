// The negative log likelihood on the CPU: cpu/nll_loss_kernels.h, compiled for each instruction set, for the sake of its
// 16-bit loads and stores.

#include "kernels/cpu/nll_loss_cpu.h"

#include "kernels/cpu/cross_entropy_chunks.h"
#include "kernels/cpu/dispatch_dtype.h"
#include "kernels/tiles.h"

namespace fusedloss::cpu {
namespace {

// Rows of a chunk of the forward pass: each is a cache miss or two, of which a core has some ten under way.
constexpr int64_t kForwardRows = 2048;

Tiling tiling_of(const NLLLossOptions& o) {
  return make_tiling(o.outer, o.classes, o.inner, o.grad_strides, kChunkElements);
}

}  // namespace
}  // namespace fusedloss::cpu

#define FUSEDLOSS_KERNELS "kernels/cpu/nll_loss_kernels.h"
#include "kernels/cpu/instruction_sets.h"

namespace fusedloss::cpu {

NLLLossWork nll_loss_forward_work(const NLLLossOptions& o) { return {divide_up(o.rows(), kForwardRows), 1}; }

int64_t nll_loss_scratch_bytes(const NLLLossOptions& o) {
  return nll_loss_forward_work(o).chunks * int64_t(sizeof(ChunkResult));
}

void nll_loss_forward(const NLLLossOptions& o, int64_t begin, int64_t end) {
  FUSEDLOSS_ON_DTYPE(o.dtype, T, FUSEDLOSS_ON_THIS_MACHINE(forward<T>(o, begin, end)));
}

int64_t nll_loss_finish(const NLLLossOptions& o) {
  FUSEDLOSS_ON_DTYPE(o.dtype, T, FUSEDLOSS_ON_THIS_MACHINE(finish<T>(o)));
}

NLLLossWork nll_loss_backward_work(const NLLLossOptions& o) {
  if (o.rows() == 0 || o.classes == 0) return {0, 1};
  const Tiling tiling = tiling_of(o);
  const int64_t elements = tiling.tile.outer * tiling.tile.classes * tiling.tile.inner;
  return {tiling.count, larger(1, kChunkElements / elements)};
}

void nll_loss_backward(const NLLLossOptions& o, int64_t begin, int64_t end) {
  FUSEDLOSS_ON_DTYPE(o.dtype, T, FUSEDLOSS_ON_THIS_MACHINE(backward<T>(o, begin, end)));
}

}  // namespace fusedloss::cpu
