// The blocks of all formulas of one file, for one instruction set. Included by cpu/instruction_sets.h, so without include
// guard. FUSEDLOSS_FORMULAS names the file, that of fusedloss's own losses or one made from a user's expression.

#ifndef FUSEDLOSS_FORMULAS
#define FUSEDLOSS_FORMULAS "kernels/formulas/pointwise.h"
#endif

namespace fusedloss::cpu::FUSEDLOSS_ISA {
namespace {

#include "kernels/cpu/vec.h"
#include "kernels/cpu/elementary.h"
#include "kernels/formulas/dual.h"
#include FUSEDLOSS_FORMULAS
#include "kernels/cpu/pointwise_block.h"

template <typename A>
struct Blocks {
#define FUSEDLOSS_BLOCK(name, Formula) static constexpr PointwiseFunction* name = &on_block<Formula, A>;
  FUSEDLOSS_POINTWISE_LOSSES(FUSEDLOSS_BLOCK)
#undef FUSEDLOSS_BLOCK
};

}  // namespace
}  // namespace fusedloss::cpu::FUSEDLOSS_ISA

// The formula of this name, with its blocks of every instruction set.
#undef FUSEDLOSS_FORMULA_TABLE
#if defined(__x86_64__)
#define FUSEDLOSS_FORMULA_TABLE(name)                                                                  \
  {{portable::Blocks<float>::name, avx2::Blocks<float>::name, avx512::Blocks<float>::name},           \
   {portable::Blocks<double>::name, avx2::Blocks<double>::name, avx512::Blocks<double>::name}}
#else
#define FUSEDLOSS_FORMULA_TABLE(name) {{portable::Blocks<float>::name}, {portable::Blocks<double>::name}}
#endif
