// The registered pointwise losses: those of formulas/pointwise-inl.h, and those compiled from a user's expression.
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
  std::vector<std::string> operands;  // their names, for error messages
  const cpu::PointwiseFormula* on_cpu;
#ifdef FUSEDLOSS_WITH_CUDA
  const cuda::PointwiseFormula* on_cuda;  // null if this loss is not compiled for CUDA
#endif
};

// Registers a loss and returns its number, by which it is called. For a loss of a user, pass the addresses of its
// formulas (0: not compiled for that device). For a loss of this extension pass 0 for both: it is found by its name.
int64_t add_pointwise_loss(const std::string& name, const std::vector<std::string>& operands, int64_t cpu_formula,
                           int64_t cuda_formula);

const PointwiseLoss& pointwise_loss(int64_t number);

}  // namespace fusedloss
