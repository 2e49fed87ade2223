// Which of the compiled instruction sets this machine runs.
#pragma once

#include <string>

namespace fusedloss::cpu {

enum class InstructionSet { kPortable, kAvx2, kAvx512 };
constexpr int kInstructionSets = 3;

// The best one this machine has, or the one that the environment variable FUSEDLOSS_CPU names, which is read once.
InstructionSet instruction_set();

const char* name_of(InstructionSet set);

// wanted: portable, avx2 or avx512. Throws std::runtime_error if it is beyond `best`, std::invalid_argument if it is
// none of them.
InstructionSet choose_instruction_set(const std::string& wanted, InstructionSet best);

// Has this machine's AVX-512 those for bfloat16? Asked in each library: that of a user's expression cannot see ours.
inline const bool has_bfloat16_instructions = [] {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return bool(__builtin_cpu_supports("avx512bf16"));
#else
  return false;
#endif
}();

}  // namespace fusedloss::cpu
