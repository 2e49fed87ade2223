// The choice of one of the compiled instruction sets for this machine.
#pragma once

#include <string>

namespace fusedloss::cpu {

enum class InstructionSet { kPortable, kAvx2, kAvx512 };
constexpr int kInstructionSets = 3;

// The best instruction set of this machine, or the one that the environment variable FUSEDLOSS_CPU names. The variable
// is read once.
InstructionSet instruction_set();

const char* name_of(InstructionSet set);

// wanted: portable, avx2 or avx512. Throws std::runtime_error if it is above `best`, and std::invalid_argument for any
// other name.
InstructionSet choose_instruction_set(const std::string& wanted, InstructionSet best);

// True if this machine has AVX-512's instructions for bfloat16. Each library checks this for itself, because the
// library of a user's expression cannot access the variables of this one.
inline const bool has_bfloat16_instructions = [] {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return bool(__builtin_cpu_supports("avx512bf16"));
#else
  return false;
#endif
}();

}  // namespace fusedloss::cpu
