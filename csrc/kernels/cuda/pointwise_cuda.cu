// Finds the losses of formulas/pointwise-inl.h on the GPU by name.
#include <cstring>

#include "kernels/cuda/pointwise.cuh"
#include "kernels/cuda/pointwise_cuda.h"
#include "kernels/formulas/pointwise-inl.h"

namespace fusedloss::cuda {

int64_t pointwise_scratch_bytes(const PointwiseOptions& o) {
  return o.reduction == Reduction::kNone ? 0 : int64_t(grid_of(o)) * int64_t(sizeof(double));
}

const PointwiseFormula* find_pointwise_loss(const char* wanted) {
#define FUSEDLOSS_FIND(name, Formula) \
  if (std::strcmp(wanted, #name) == 0) return &kPointwise<Formula>;
  FUSEDLOSS_POINTWISE_LOSSES(FUSEDLOSS_FIND)
#undef FUSEDLOSS_FIND
  return nullptr;
}

}  // namespace fusedloss::cuda
