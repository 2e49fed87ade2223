// Compiles the file named by FUSEDLOSS_KERNELS once for each instruction set, each time in a different namespace, so
// that one build runs on every x86-64 machine and uses its full vector width. It uses target attributes instead of
// compiler flags, because neither setup() nor torch.utils.cpp_extension.load() supports flags for single files.

#include "kernels/cpu/instruction_set.h"
#include "kernels/cpu/instruction_set_macros.h"

#include FUSEDLOSS_KERNELS
#undef FUSEDLOSS_ISA
#undef FUSEDLOSS_VECTOR_BYTES
#undef FUSEDLOSS_PUSH_TARGET
#undef FUSEDLOSS_POP_TARGET

#if defined(__x86_64__)

#define FUSEDLOSS_ISA avx2
#define FUSEDLOSS_VECTOR_BYTES 32
#define FUSEDLOSS_PUSH_TARGET FUSEDLOSS_PUSH_TARGET_OF("avx2,fma,f16c")
#define FUSEDLOSS_POP_TARGET FUSEDLOSS_POP_TARGET_OF
#define FUSEDLOSS_ISA_TOGGLE
#include FUSEDLOSS_KERNELS
#undef FUSEDLOSS_ISA
#undef FUSEDLOSS_VECTOR_BYTES
#undef FUSEDLOSS_PUSH_TARGET
#undef FUSEDLOSS_ISA_TOGGLE

#define FUSEDLOSS_ISA avx512
#define FUSEDLOSS_VECTOR_BYTES 64
#define FUSEDLOSS_PUSH_TARGET FUSEDLOSS_PUSH_TARGET_OF("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#include FUSEDLOSS_KERNELS
#undef FUSEDLOSS_ISA
#undef FUSEDLOSS_VECTOR_BYTES
#undef FUSEDLOSS_PUSH_TARGET
#undef FUSEDLOSS_POP_TARGET

// A name's definitions for all instruction sets, in the order of InstructionSet.
#define FUSEDLOSS_FOR_EACH_INSTRUCTION_SET(...) {portable::__VA_ARGS__, avx2::__VA_ARGS__, avx512::__VA_ARGS__}

#else
#define FUSEDLOSS_FOR_EACH_INSTRUCTION_SET(...) {portable::__VA_ARGS__}
#endif
