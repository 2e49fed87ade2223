// The losses of formulas/pointwise-inl.h on the CPU, by name.

#include <cstring>

#include "kernels/cpu/pointwise_cpu.h"

#define FUSEDLOSS_KERNELS "kernels/cpu/pointwise_formula_table-inl.h"
#include "kernels/cpu/foreach_instruction_set.h"

namespace fusedloss::cpu {

const PointwiseFormula* find_pointwise_loss(const char* wanted) {
#define FUSEDLOSS_FIND(name, Formula)                                         \
  if (std::strcmp(wanted, #name) == 0) {                                      \
    static constexpr PointwiseFormula kFound = FUSEDLOSS_FORMULA_TABLE(name); \
    return &kFound;                                                           \
  }
  FUSEDLOSS_POINTWISE_LOSSES(FUSEDLOSS_FIND)
#undef FUSEDLOSS_FIND
  return nullptr;
}

}  // namespace fusedloss::cpu
