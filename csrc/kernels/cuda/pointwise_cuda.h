#pragma once

#include "kernels/cuda/pointwise_formula.h"

namespace fusedloss::cuda {

// How many bytes the forward pass needs in options.scratch, for any formula.
int64_t pointwise_scratch_bytes(const PointwiseOptions& options);

// Returns null if there is no loss of this name.
const PointwiseFormula* find_pointwise_loss(const char* name);

}  // namespace fusedloss::cuda
