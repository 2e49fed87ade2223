// What a file that is compiled for each instruction set is written with. Its own code stands between
// FUSEDLOSS_BEGIN_NAMESPACE and FUSEDLOSS_END_NAMESPACE, its includes before: what they bring, such as std::min, must
// not be compiled for an instruction set that the machine may lack, since the linker keeps one copy for the whole
// program.
//
// What stands between them may call only what is compiled for the same instruction set, or scalars: a vector that
// crosses the border would be passed by another convention.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FUSEDLOSS_INLINE inline __attribute__((always_inline))
// What is called once a row or less, and would otherwise be compiled into every kernel that does.
#define FUSEDLOSS_NOINLINE __attribute__((noinline))
// Accumulators in an array are kept in registers only where the loop over them is unrolled.
#if defined(__clang__)
#define FUSEDLOSS_UNROLL _Pragma("unroll")
#else
#define FUSEDLOSS_UNROLL _Pragma("GCC unroll 8")
#endif

#define FUSEDLOSS_PRAGMA_(...) _Pragma(#__VA_ARGS__)
#define FUSEDLOSS_PRAGMA(...) FUSEDLOSS_PRAGMA_(__VA_ARGS__)

#define FUSEDLOSS_BEGIN_NAMESPACE           \
  FUSEDLOSS_PUSH_TARGET                     \
  namespace fusedloss::cpu::FUSEDLOSS_ISA { \
  namespace {
#define FUSEDLOSS_END_NAMESPACE \
  }                             \
  }                             \
  FUSEDLOSS_POP_TARGET

// target_name: what the compiler calls the instruction set.
#if defined(__clang__)
#define FUSEDLOSS_PUSH_TARGET_OF(target_name) \
  FUSEDLOSS_PRAGMA(clang attribute push(__attribute__((target(target_name))), apply_to = function))
#define FUSEDLOSS_POP_TARGET_OF FUSEDLOSS_PRAGMA(clang attribute pop)
#else
#define FUSEDLOSS_PUSH_TARGET_OF(target_name) \
  FUSEDLOSS_PRAGMA(GCC push_options) FUSEDLOSS_PRAGMA(GCC target(target_name))
#define FUSEDLOSS_POP_TARGET_OF FUSEDLOSS_PRAGMA(GCC pop_options)
#endif

// What every machine has, first of all and for a file that is opened by itself; cpu/foreach_instruction_set.h goes on.
#define FUSEDLOSS_ISA portable
#define FUSEDLOSS_VECTOR_BYTES 16
#define FUSEDLOSS_PUSH_TARGET
#define FUSEDLOSS_POP_TARGET
