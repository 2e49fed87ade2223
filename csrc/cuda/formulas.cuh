// The scalar formulas that CPU and GPU share, with the GPU's exp and log.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/launch.cuh"

#define FUSEDLOSS_INLINE __host__ __device__ __forceinline__

namespace fusedloss::cuda {

namespace math {

// The hardware's 2^x, one instruction. Its error is at most 2 ulp; under 2^-126 it gives 0.
FUSEDLOSS_INLINE float exp2(float x) {
#if FUSEDLOSS_CUDA_ARCH
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  return ::exp2f(x);
#endif
}

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

// exp(x - reference) for the logits x of a row, up to a factor that is the same for all of them.
//
// In float32 it is 2^(x * factor - offset), one multiply-add and one exponential. `offset` is reference * factor,
// rounded, and so each result is off by the same factor 2^residue, which cancels where results are divided by their sum;
// `log` of a sum takes it away. The residue is at most half a unit in the offset's last place, which must not be so large
// that 2^residue overflows. From kLargest on, the factor is 1 and the offset exact: neighbouring float32 numbers are 128
// apart there, so that logits which differ from the reference at all have an exponential of 0.
constexpr float kLargest = 0x1.4p30f;  // below it, the offset is below 2^31, and the residue at most 64

template <typename A>
struct Exponential {
  A reference;

  explicit FUSEDLOSS_INLINE Exponential(A reference) : reference(reference) {}
  FUSEDLOSS_INLINE A operator()(A x) const { return ::exp(x - reference); }
  FUSEDLOSS_INLINE A log(A sum, A) const { return ::log(sum); }
};

template <>
struct Exponential<float> {
  float factor, offset;

  explicit FUSEDLOSS_INLINE Exponential(float reference)
      : factor(::fabsf(reference) < kLargest ? 1.4426950408889634f : 1.0f), offset(product(reference, factor)) {}
  FUSEDLOSS_INLINE float operator()(float x) const { return exp2(::fmaf(x, factor, -offset)); }
  // The natural logarithm of the sum of exp(x - reference), from a sum of results. `reference` as constructed with.
  FUSEDLOSS_INLINE float log(float sum, float reference) const {
    return ::logf(sum) - 0.6931471805599453f * ::fmaf(reference, factor, -offset);
  }
};

// What a sum of Exponential(from)'s results is multiplied by to be one of Exponential(to)'s; from <= to. Where one of
// them is so large that their factors differ, they lie so far apart that it is 0.
FUSEDLOSS_INLINE float rescaling(float from, float to) {
  const Exponential<float> a(from), b(to);
  return a.factor == b.factor ? exp2(a.offset - b.offset) : 0.0f;
}
FUSEDLOSS_INLINE double rescaling(double from, double to) { return ::exp(from - to); }

FUSEDLOSS_INLINE float log(float x) { return ::logf(x); }
FUSEDLOSS_INLINE double log(double x) { return ::log(x); }

// The other argument where one is NaN.
FUSEDLOSS_INLINE float max(float a, float b) { return ::fmaxf(a, b); }
FUSEDLOSS_INLINE double max(double a, double b) { return ::fmax(a, b); }

}  // namespace math

#include "formulas/cross_entropy.h"
#include "formulas/nll_loss.h"

}  // namespace fusedloss::cuda
