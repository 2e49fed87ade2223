// Pointwise losses on the CPU: cpu/pointwise_kernels.h, compiled for each instruction set, and the choice of one.

#include "kernels/cpu/pointwise_cpu.h"

#include <algorithm>
#include <numeric>

#include "kernels/cpu/dispatch_dtype.h"
#include "kernels/integers.h"

#define FUSEDLOSS_KERNELS "kernels/cpu/pointwise_kernels.h"
#include "kernels/cpu/instruction_sets.h"

namespace fusedloss::cpu {

int64_t pointwise_chunks(const PointwiseOptions& o) {
  return divide_up(o.numel, kPointwiseChunk);
}

int64_t pointwise_scratch_bytes(const PointwiseOptions& o) {
  return pointwise_chunks(o) * int64_t(sizeof(double));
}

void pointwise(const PointwiseFormula& formula, const PointwiseOptions& o, int64_t begin, int64_t end) {
  FUSEDLOSS_ON_DTYPE(o.dtype, T, FUSEDLOSS_ON_THIS_MACHINE(evaluate<T>(formula, o, begin, end)));
}

void pointwise_finish(const PointwiseOptions& o) {
  FUSEDLOSS_ON_DTYPE(o.dtype, T, FUSEDLOSS_ON_THIS_MACHINE(finish<T>(o)));
}

}  // namespace fusedloss::cpu
