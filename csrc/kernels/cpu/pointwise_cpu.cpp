// Pointwise losses on the CPU. This file compiles cpu/pointwise_kernels-inl.h for each instruction set and selects the
// kernels of one.

#include "kernels/cpu/pointwise_cpu.h"

#include "kernels/integers.h"

#define FUSEDLOSS_KERNELS "kernels/cpu/pointwise_kernels-inl.h"
#include "kernels/cpu/foreach_instruction_set.h"

namespace fusedloss::cpu {

Work pointwise_work(const PointwiseOptions& o) {
  constexpr int64_t kGrain = 4;
  return {divide_up(o.numel, kPointwiseChunk), kGrain};
}

int64_t pointwise_scratch_bytes(const PointwiseOptions& o) {
  return pointwise_work(o).chunks * int64_t(sizeof(double));
}

const PointwiseKernels& pointwise_kernels(const PointwiseOptions& o) {
  static constexpr const PointwiseKernels* kTable[] = FUSEDLOSS_FOR_EACH_INSTRUCTION_SET(kPointwiseKernels);
  return kTable[int(instruction_set())][int(o.dtype)];
}

}  // namespace fusedloss::cpu
