// The losses of formulas/pointwise.h on the CPU, by name.

#include "kernels/cpu/pointwise_losses.h"

#include <cstring>

#define FUSEDLOSS_KERNELS "kernels/cpu/pointwise_formulas.h"
#include "kernels/cpu/instruction_sets.h"

namespace fusedloss::cpu {

const PointwiseFormula* find_pointwise_loss(const char* wanted) {
#define FUSEDLOSS_FIND(name, Formula)                                \
  if (std::strcmp(wanted, #name) == 0) {                             \
    static constexpr PointwiseFormula kFound = FUSEDLOSS_FORMULA_TABLE(name); \
    return &kFound;                                                  \
  }
  FUSEDLOSS_POINTWISE_LOSSES(FUSEDLOSS_FIND)
#undef FUSEDLOSS_FIND
  return nullptr;
}

}  // namespace fusedloss::cpu
