// Pointwise losses on the CPU: cpu/pointwise_kernels-inl.h, compiled for each instruction set, and the choice of one.

#include "kernels/cpu/pointwise_cpu.h"

#include "kernels/integers.h"

#define FUSEDLOSS_KERNELS "kernels/cpu/pointwise_kernels-inl.h"
#include "kernels/cpu/foreach_instruction_set.h"

namespace fusedloss::cpu {
namespace {

const PointwiseKernels& kernels(const PointwiseOptions& o) {
  static constexpr const PointwiseKernels* kTable[] = FUSEDLOSS_FOR_EACH_INSTRUCTION_SET(kPointwiseKernels);
  return kTable[int(instruction_set())][int(o.dtype)];
}

}  // namespace

Work pointwise_work(const PointwiseOptions& o) {
  constexpr int64_t kGrain = 4;
  return {divide_up(o.numel, kPointwiseChunk), kGrain};
}

int64_t pointwise_scratch_bytes(const PointwiseOptions& o) {
  return pointwise_work(o).chunks * int64_t(sizeof(double));
}

void pointwise(const PointwiseFormula& formula, const PointwiseOptions& o, int64_t begin, int64_t end) {
  kernels(o).evaluate(formula, o, begin, end);
}

void pointwise_finish(const PointwiseOptions& o) { kernels(o).finish(o); }

}  // namespace fusedloss::cpu
