#include "cpu/instruction_set.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

namespace fusedloss::cpu {
namespace {

InstructionSet best_of_machine() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // f16c, which clang's builtin does not know by name, came before AVX2 on every processor that has that.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return InstructionSet::kAvx512;
  if (avx2) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kPortable;
}

InstructionSet choose() {
  const InstructionSet best = best_of_machine();
  const char* wanted = std::getenv("FUSEDLOSS_CPU_CAPABILITY");
  if (wanted == nullptr) return best;
  if (std::string_view(wanted) == "portable") return InstructionSet::kPortable;
  if (std::string_view(wanted) == "avx2") return std::min(best, InstructionSet::kAvx2);
  if (std::string_view(wanted) == "avx512") return best;
  throw std::invalid_argument(std::string("FUSEDLOSS_CPU_CAPABILITY is '") + wanted +
                              "', expected portable, avx2 or avx512");
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet chosen = choose();
  return chosen;
}

const bool has_bfloat16_instructions = [] {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return bool(__builtin_cpu_supports("avx512bf16"));
#else
  return false;
#endif
}();

const char* instruction_set_name() {
  switch (instruction_set()) {
    case InstructionSet::kAvx512:
      return "avx512";
    case InstructionSet::kAvx2:
      return "avx2";
    case InstructionSet::kPortable:
      break;
  }
  return "portable";
}

}  // namespace fusedloss::cpu
