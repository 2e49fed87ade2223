// The scalar formulas that CPU and GPU share, with the GPU's exp and log.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/cuda/launch.cuh"

#define FUSEDLOSS_INLINE __host__ __device__ __forceinline__

namespace fusedloss::cuda {

namespace math {

// The hardware's 2^x, instead of the eight instructions of expf: 2 ulp around 0, where the large terms of a softmax
// lie, and below it no worse than what rounding the argument to float32 does anyway. Under 2^-126 it gives 0.
FUSEDLOSS_INLINE float exp(float x) {
#if FUSEDLOSS_CUDA_ARCH
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.4426950408889634f));
  return power;
#else
  return ::expf(x);
#endif
}
FUSEDLOSS_INLINE double exp(double x) { return ::exp(x); }

// A product and a sum that are rounded by themselves, where the compiler might fuse a product with the sum that it is
// part of: in one kernel it does so and in another not, and their results would differ in the last place.
template <typename A>
FUSEDLOSS_INLINE A product(A a, A b) {
#if FUSEDLOSS_CUDA_ARCH
  if constexpr (sizeof(A) == 8) return __dmul_rn(a, b);
  else return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

template <typename A>
FUSEDLOSS_INLINE A sum(A a, A b) {
#if FUSEDLOSS_CUDA_ARCH
  if constexpr (sizeof(A) == 8) return __dadd_rn(a, b);
  else return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

FUSEDLOSS_INLINE float log(float x) { return ::logf(x); }
FUSEDLOSS_INLINE double log(double x) { return ::log(x); }

// The other argument where one is NaN.
FUSEDLOSS_INLINE float max(float a, float b) { return ::fmaxf(a, b); }
FUSEDLOSS_INLINE double max(double a, double b) { return ::fmax(a, b); }

}  // namespace math

#include "kernels/formulas/cross_entropy.h"
#include "kernels/formulas/nll_loss.h"

}  // namespace fusedloss::cuda
