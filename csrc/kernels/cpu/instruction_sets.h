// Compiles the file named by FUSEDLOSS_KERNELS once for each instruction set, in a namespace of its own, so that
// one build runs on every x86-64 machine and at full width on each. Target attributes do it, not flags: neither
// setup() nor torch.utils.cpp_extension.load() has flags per file.
//
// What a region compiles may call only what is compiled in the same region, or scalars: a vector that crosses its
// border would be passed by another convention. Hence vec.h and the formulas are included in each.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "kernels/cpu/instruction_set.h"
#include "kernels/cpu/scalar_types.h"
#include "kernels/options.h"
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

#define FUSEDLOSS_ISA portable
#define FUSEDLOSS_VECTOR_BYTES 16
#include FUSEDLOSS_KERNELS
#undef FUSEDLOSS_ISA
#undef FUSEDLOSS_VECTOR_BYTES

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define FUSEDLOSS_ISA avx2
#define FUSEDLOSS_VECTOR_BYTES 32
#include FUSEDLOSS_KERNELS
#undef FUSEDLOSS_ISA
#undef FUSEDLOSS_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#endif
#define FUSEDLOSS_ISA avx512
#define FUSEDLOSS_VECTOR_BYTES 64
#include FUSEDLOSS_KERNELS
#undef FUSEDLOSS_ISA
#undef FUSEDLOSS_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
