#pragma once

#include "kernels/cuda/pointwise_formula.h"

namespace fusedloss::cuda {

// Bytes that options.scratch must have for the forward pass, whatever the formula.
int64_t pointwise_scratch_bytes(const PointwiseOptions& options);

// Null where there is no loss of this name.
const PointwiseFormula* find_pointwise_loss(const char* name);

}  // namespace fusedloss::cuda
