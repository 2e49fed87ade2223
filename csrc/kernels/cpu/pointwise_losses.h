#pragma once

#include "kernels/cpu/pointwise_formula.h"

namespace fusedloss::cpu {

// Null where there is no loss of this name.
const PointwiseFormula* find_pointwise_loss(const char* name);

}  // namespace fusedloss::cpu
