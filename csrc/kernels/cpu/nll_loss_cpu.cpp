// The negative log likelihood on the CPU. cpu/nll_loss_kernels-inl.h is compiled for each instruction set because of
// its 16-bit loads and stores.

#include "kernels/cpu/nll_loss_cpu.h"

#include "kernels/cpu/chunks.h"
#include "kernels/integers.h"

#define FUSEDLOSS_KERNELS "kernels/cpu/nll_loss_kernels-inl.h"
#include "kernels/cpu/foreach_instruction_set.h"

namespace fusedloss::cpu {

Tiling nll_loss_tiling(const NLLLossOptions& o) {
  return make_tiling(o.outer, o.classes, o.inner, o.grad_strides, kChunkElements);
}

Work nll_loss_forward_work(const NLLLossOptions& o) { return {divide_up(o.rows(), kNLLLossForwardRows), 1}; }

int64_t nll_loss_scratch_bytes(const NLLLossOptions& o) {
  return nll_loss_forward_work(o).chunks * int64_t(sizeof(ChunkResult));
}

Work nll_loss_backward_work(const NLLLossOptions& o) {
  if (o.rows() == 0 || o.classes == 0) return {0, 1};
  const Tiling tiling = nll_loss_tiling(o);
  const int64_t elements = tiling.tile.outer * tiling.tile.classes * tiling.tile.inner;
  return {tiling.count, larger(1, kChunkElements / elements)};
}

const NLLLossKernels& nll_loss_kernels(const NLLLossOptions& o) {
  static constexpr const NLLLossKernels* kTable[] = FUSEDLOSS_FOR_EACH_INSTRUCTION_SET(kNLLLossKernels);
  return kTable[int(instruction_set())][int(o.dtype)];
}

}  // namespace fusedloss::cpu
