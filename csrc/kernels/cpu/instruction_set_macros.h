// Macros for files that are compiled for each instruction set. Such a file puts its own code between
// FUSEDLOSS_BEGIN_NAMESPACE and FUSEDLOSS_END_NAMESPACE, and its includes before them. The functions in its includes,
// such as std::min, must not be compiled for an instruction set that the machine may lack, because the linker keeps one
// copy of them for the whole program.
//
// Code between the two macros may pass vectors only to functions that are compiled for the same instruction set, since
// other functions have another calling convention for vectors. It may pass scalars to any function.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FUSEDLOSS_INLINE inline __attribute__((always_inline))
// For functions that are called at most once for each row: inlining would only make every kernel larger.
#define FUSEDLOSS_NOINLINE __attribute__((noinline))
// Accumulators in an array are kept in registers only if the loop over them is unrolled.
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

// target_name: the compiler's name for the instruction set.
#if defined(__clang__)
#define FUSEDLOSS_PUSH_TARGET_OF(target_name) \
  FUSEDLOSS_PRAGMA(clang attribute push(__attribute__((target(target_name))), apply_to = function))
#define FUSEDLOSS_POP_TARGET_OF FUSEDLOSS_PRAGMA(clang attribute pop)
#else
#define FUSEDLOSS_PUSH_TARGET_OF(target_name) \
  FUSEDLOSS_PRAGMA(GCC push_options) FUSEDLOSS_PRAGMA(GCC target(target_name))
#define FUSEDLOSS_POP_TARGET_OF FUSEDLOSS_PRAGMA(GCC pop_options)
#endif

// The portable instruction set comes first. It is also the one with which an editor parses a single file.
// cpu/foreach_instruction_set.h then defines the others.
#define FUSEDLOSS_ISA portable
#define FUSEDLOSS_VECTOR_BYTES 16
#define FUSEDLOSS_PUSH_TARGET
#define FUSEDLOSS_POP_TARGET
