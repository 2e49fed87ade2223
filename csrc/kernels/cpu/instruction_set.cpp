#include "kernels/cpu/instruction_set.h"

#include <cstdlib>
#include <stdexcept>

namespace fusedloss::cpu {
namespace {

InstructionSet best_of_machine() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // f16c is not checked, because clang's builtin does not know its name. Every processor with AVX2 has it.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return InstructionSet::kAvx512;
  if (avx2) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kPortable;
}

InstructionSet choose() {
  const char* wanted = std::getenv("FUSEDLOSS_CPU");
  const InstructionSet best = best_of_machine();
  return wanted == nullptr ? best : choose_instruction_set(wanted, best);
}

}  // namespace

const char* name_of(InstructionSet set) {
  switch (set) {
    case InstructionSet::kAvx512: return "avx512";
    case InstructionSet::kAvx2: return "avx2";
    case InstructionSet::kPortable: break;
  }
  return "portable";
}

InstructionSet choose_instruction_set(const std::string& wanted, InstructionSet best) {
  for (const InstructionSet set : {InstructionSet::kPortable, InstructionSet::kAvx2, InstructionSet::kAvx512}) {
    if (wanted != name_of(set)) continue;
    if (set <= best) return set;
    throw std::runtime_error("FUSEDLOSS_CPU is '" + wanted + "', which this processor lacks, expected at most " +
                             name_of(best));
  }
  throw std::invalid_argument("FUSEDLOSS_CPU is '" + wanted + "', expected portable, avx2 or avx512");
}

InstructionSet instruction_set() {
  static const InstructionSet chosen = choose();
  return chosen;
}

}  // namespace fusedloss::cpu
