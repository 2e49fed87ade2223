// The pointwise losses that there are: those of formulas/pointwise-inl.h, and those that were compiled from a user's
// expression.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/cpu/pointwise_formula.h"
#ifdef FUSEDLOSS_WITH_CUDA
#include "kernels/cuda/pointwise_formula.h"
#endif

namespace fusedloss {

struct PointwiseLoss {
  std::string name;
  std::vector<std::string> operands;  // their names, for messages
  const cpu::PointwiseFormula* on_cpu;
#ifdef FUSEDLOSS_WITH_CUDA
  const cuda::PointwiseFormula* on_cuda;  // null where this loss is not compiled for CUDA
#endif
};

// Returns the number that the loss is called by from then on. A loss of the user's own comes with the addresses of its
// formulas (0: not compiled for this device); one of this extension's comes with neither, and is found by its name.
int64_t add_pointwise_loss(const std::string& name, const std::vector<std::string>& operands, int64_t cpu_formula,
                           int64_t cuda_formula);

const PointwiseLoss& pointwise_loss(int64_t number);

}  // namespace fusedloss
