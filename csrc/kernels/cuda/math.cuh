// The functions of a number that the formulas take on the GPU: CUDA's accurate ones, over their whole domain, where
// those are short (expf takes 7 instructions) or seldom, and others in float where CUDA's are long or branch.
// Instructions, not memory, bound a loss that has more than some forty of them for an element of 16 bits, and a branch
// for each element keeps the compiler from interleaving the elements. Small results count in the pointwise losses;
// exp_nonpositive, which is for cross entropy, gives 0 below 2^-126. The errors that are stated for log, log1p and
// expm1 were found by running the same arithmetic on a CPU for tens of millions of floats; those of quotients follow
// from the error of 1 ulp that the hardware's inverse is said to have. The emulator has the C library's functions in
// their place.
#pragma once

#include <cmath>

#include "kernels/cuda/launch.cuh"

#define FUSEDLOSS_INLINE __host__ __device__ __forceinline__
#define FUSEDLOSS_BEGIN_NAMESPACE namespace fusedloss::cuda {
#define FUSEDLOSS_END_NAMESPACE }

namespace fusedloss::cuda::math {

FUSEDLOSS_INLINE float element(float v) { return v; }
FUSEDLOSS_INLINE double element(double v) { return v; }

template <typename V>
FUSEDLOSS_INLINE V constant(double value) {
  return V(value);
}

// M: bool, or int where two of them were joined.
template <typename M>
FUSEDLOSS_INLINE bool any(M condition) {
  return condition != M{};
}
template <typename M, typename V>
FUSEDLOSS_INLINE V select(M condition, V a, V b) {
  return condition ? a : b;
}

FUSEDLOSS_INLINE float abs(float x) { return ::fabsf(x); }
FUSEDLOSS_INLINE double abs(double x) { return ::fabs(x); }
// x * x - squared, where that is x * x rounded.
FUSEDLOSS_INLINE float lost_by_squaring(float x, float squared) { return ::fmaf(x, x, -squared); }
FUSEDLOSS_INLINE double lost_by_squaring(double x, double squared) { return ::fma(x, x, -squared); }
FUSEDLOSS_INLINE float pow(float x, float y) { return ::powf(x, y); }
FUSEDLOSS_INLINE double pow(double x, double y) { return ::pow(x, y); }

// The other argument where one is NaN.
FUSEDLOSS_INLINE float max(float a, float b) { return ::fmaxf(a, b); }
FUSEDLOSS_INLINE double max(double a, double b) { return ::fmax(a, b); }

// The hardware's 2^x, instead of the eight instructions of expf: 2 ulp around 0, where the large terms of a softmax
// lie, and below it no worse than what rounding the argument to float32 does anyway. Under 2^-126 it gives 0.
FUSEDLOSS_INLINE float exp_nonpositive(float x) {
#if FUSEDLOSS_CUDA_ARCH
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.4426950408889634f));
  return power;
#else
  return ::expf(x);
#endif
}
FUSEDLOSS_INLINE double exp_nonpositive(double x) { return ::exp(x); }

// A product and a sum that are rounded by themselves, where the compiler might fuse a product with the sum that it is
// part of: in one kernel it does so and in another not, and their results would differ in the last place.
template <typename A>
FUSEDLOSS_INLINE A rounded_product(A a, A b) {
#if FUSEDLOSS_CUDA_ARCH
  if constexpr (sizeof(A) == 8) return __dmul_rn(a, b);
  else return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

template <typename A>
FUSEDLOSS_INLINE A rounded_sum(A a, A b) {
#if FUSEDLOSS_CUDA_ARCH
  if constexpr (sizeof(A) == 8) return __dadd_rn(a, b);
  else return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// ---- division: IEEE's takes 10 instructions and a branch for each quotient. A quotient is a rounded product here:
// fused with a sum in one kernel and not in another, it would give them different bits.

// The hardware's 1/x, at most 1 ulp from it for 2^-126 <= |x| <= 2^126. It takes what is subnormal for 0, and gives 0
// instead of what is subnormal.
FUSEDLOSS_INLINE float inverse_of_moderate(float x) {
#if FUSEDLOSS_CUDA_ARCH
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
#else
  return 1 / x;
#endif
}
FUSEDLOSS_INLINE double inverse_of_moderate(double x) { return 1 / x; }

// A power of two that brings x to where inverse_of_moderate is precise: x * scale is in [0.5, 4) for what is normal, in
// [2^-23, 1) for what is subnormal, and what x is for 0, an infinity and NaN. It is made of the bits of x: the exponent
// that makes x * scale at least 0.5, but no less than 2^-126, so that it is itself normal.
FUSEDLOSS_INLINE float scale_for_inverse(float x) {
#if FUSEDLOSS_CUDA_ARCH
  return __int_as_float(::max(0x7e800000 - (__float_as_int(x) & 0x7f800000), 0x00800000));
#else
  (void)x;
  return 1;
#endif
}

// 1/x over its whole domain: at most 1 ulp from it as inverse_of_moderate is, and 1.5 of the smallest numbers where the
// result is subnormal.
FUSEDLOSS_INLINE float inverse(float x) {
  const float scale = scale_for_inverse(x);
  return math::rounded_product(inverse_of_moderate(x * scale), scale);
}
FUSEDLOSS_INLINE double inverse(double x) { return 1 / x; }

// a/b over its whole domain, with an error below 3 ulp (below 2 where the hardware's inverse is the nearest float),
// also where the result is subnormal. a is scaled first: that product cannot overflow before the quotient does. Beside
// inverse(b) it takes two instructions more.
FUSEDLOSS_INLINE float divide(float a, float b) {
#if FUSEDLOSS_CUDA_ARCH
  const float scale = scale_for_inverse(b);
  return math::rounded_product(a * scale, inverse_of_moderate(b * scale));
#else
  return a / b;
#endif
}
FUSEDLOSS_INLINE double divide(double a, double b) { return a / b; }

// The same for 2^-126 <= |b| <= 2^126 or NaN.
FUSEDLOSS_INLINE float divide_by_moderate(float a, float b) {
#if FUSEDLOSS_CUDA_ARCH
  return math::rounded_product(a, inverse_of_moderate(b));
#else
  return a / b;
#endif
}
FUSEDLOSS_INLINE double divide_by_moderate(double a, double b) { return a / b; }

// The same with an error below 0.51 ulp, for |a| >= 2^-100: what the quotient leaves of a is divided as well. That is
// NaN for an infinite a, and then taken for some finite number, so that the quotient stays infinite. IEEE's takes twice
// the five instructions, and a branch.
FUSEDLOSS_INLINE float divide_closely_by_moderate(float a, float b) {
#if FUSEDLOSS_CUDA_ARCH
  const float inverse = inverse_of_moderate(b), quotient = math::rounded_product(a, inverse);
  return ::fmaf(math::max(::fmaf(-quotient, b, a), -0x1p127f), inverse, quotient);
#else
  return a / b;
#endif
}
FUSEDLOSS_INLINE double divide_closely_by_moderate(double a, double b) { return a / b; }

// ---- logarithms and expm1

#if FUSEDLOSS_CUDA_ARCH
// The hardware's logarithm to base 2, with an absolute error of at most 2^-22 between 1/2 and 2, and a relative one of
// at most 2^-22 elsewhere. It takes what is subnormal for 0.
__device__ __forceinline__ float binary_log(float x) {
  float log;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log) : "f"(x));
  return log;
}

// Of x = 2^k (1 + f), f in [-1/3, 1/3): 2^23 k. That taken from a number's bits divides it by 2^k.
__device__ __forceinline__ unsigned exponent_bits(float x) { return (__float_as_uint(x) - 0x3f2aaaabu) & 0xff800000u; }

// log(2^k (1 + f)) = k log 2 + f + f^2 q(f), where q is fitted to a relative error of the result of 2.6e-8.
__device__ __forceinline__ float log_of_parts(unsigned exponent, float f) {
  float q = 0.140205845f;
  q = ::fmaf(q, f, -0.153835982f);
  q = ::fmaf(q, f, 0.139971346f);
  q = ::fmaf(q, f, -0.164170295f);
  q = ::fmaf(q, f, 0.200110734f);
  q = ::fmaf(q, f, -0.250077486f);
  q = ::fmaf(q, f, 0.333332002f);
  q = ::fmaf(q, f, -0.499999374f);
  return ::fmaf(float(int(exponent)), 0.693147181f * 0x1p-23f, ::fmaf(f, f * q, f));
}
#endif

// log(x) over its whole domain, with an error below 1.1 ulp; 4 ulp where x is subnormal. Where x is that, or is 0, or
// has no finite logarithm, the hardware's gives the result. logf takes 25 instructions, this 20.
FUSEDLOSS_INLINE float log(float x) {
#if FUSEDLOSS_CUDA_ARCH
  const unsigned exponent = exponent_bits(x);
  const float of_normal = log_of_parts(exponent, __uint_as_float(__float_as_uint(x) - exponent) - 1);
  const float of_other = ::fmaf(binary_log(x * 0x1p24f), 0.693147181f, -16.6355323f);
  return x >= 0x1p-126f && x < INFINITY ? of_normal : of_other;
#else
  return ::logf(x);
#endif
}
FUSEDLOSS_INLINE double log(double x) { return ::log(x); }

// The same for x >= 1, 0 or NaN, in 17 instructions.
FUSEDLOSS_INLINE float log_of_1_or_more(float x) {
#if FUSEDLOSS_CUDA_ARCH
  const unsigned exponent = exponent_bits(x);
  const float of_normal = log_of_parts(exponent, __uint_as_float(__float_as_uint(x) - exponent) - 1);
  return x >= 1 ? of_normal : binary_log(x);
#else
  return ::logf(x);
#endif
}
FUSEDLOSS_INLINE double log_of_1_or_more(double x) { return ::log(x); }

// log(1 + x) over its whole domain, with an error below 1.9 ulp; 4 ulp from 2^126 on. 1 + x rounded only gives k; f is
// computed from x, and is exact but for its own rounding. As above, the hardware gives what is not finite. log1pf takes
// as many instructions, but has a branch.
FUSEDLOSS_INLINE float log1p(float x) {
#if FUSEDLOSS_CUDA_ARCH
  const float sum = 1 + x;
  const unsigned exponent = exponent_bits(sum);
  const float scale = __uint_as_float(0x3f800000u - exponent);  // 2^-k
  const float of_moderate = log_of_parts(exponent, __uint_as_float(__float_as_uint(x) - exponent) + (scale - 1));
  return x > -1 && x < 0x1p126f ? of_moderate : 0.693147181f * binary_log(sum);
#else
  return ::log1pf(x);
#endif
}
FUSEDLOSS_INLINE double log1p(double x) { return ::log1p(x); }

// e^x - 1 over its whole domain, with an error below 1.6 ulp: 2^n (e^r - 1) + (2^n - 1) with x = n log 2 + r, where
// nothing cancels, and e^r - 1 = r + r^2 q(r), fitted to a relative error of 1.4e-8. Half of it is computed first,
// because 2^n alone overflows where the result does not yet. expm1f takes 28 instructions, this 19.
FUSEDLOSS_INLINE float expm1(float given) {
#if FUSEDLOSS_CUDA_ARCH
  const float x = given > 89 ? 89 : given < -25 ? -25 : given;  // a NaN stays
  const float rounder = ::fmaf(x, 1.44269504f, 12582912.f);     // 1.5 * 2^23 + n
  const float n = rounder - 12582912.f;
  const float r = ::fmaf(n, 1.90465421e-9f, ::fmaf(n, -0.693147182f, x));
  float q = 0.00138706469f;
  q = ::fmaf(q, r, 0.00836625881f);
  q = ::fmaf(q, r, 0.0416674353f);
  q = ::fmaf(q, r, 0.166665465f);
  q = ::fmaf(q, r, 0.49999997f);
  const float half_power = __uint_as_float((__float_as_uint(rounder) << 23) + 0x3f000000u);  // 2^(n - 1)
  const float half = ::fmaf(half_power, ::fmaf(r, r * q, r), half_power - 0.5f);
  return half + half;
#else
  return ::expm1f(given);
#endif
}
FUSEDLOSS_INLINE double expm1(double x) { return ::expm1(x); }

// log(1 + x) for 0 <= x <= 1 or NaN, with an error below 1.6 ulp: x + x^2 q(x), where q is fitted to a relative error
// of the result of 3.3e-8. log1pf takes twice as many instructions, and a branch.
FUSEDLOSS_INLINE float log1p_up_to_1(float x) {
  float q = 0.00536542246f;
  q = ::fmaf(q, x, -0.0300683007f);
  q = ::fmaf(q, x, 0.0792088285f);
  q = ::fmaf(q, x, -0.137541875f);
  q = ::fmaf(q, x, 0.191538483f);
  q = ::fmaf(q, x, -0.248572171f);
  q = ::fmaf(q, x, 0.3332133f);
  q = ::fmaf(q, x, -0.499996483f);
  return ::fmaf(x, x * q, x);
}
FUSEDLOSS_INLINE double log1p_up_to_1(double x) { return ::log1p(x); }

// ---- CUDA's own

#define FUSEDLOSS_ELEMENTARY(name)                              \
  FUSEDLOSS_INLINE float name(float x) { return ::name##f(x); } \
  FUSEDLOSS_INLINE double name(double x) { return ::name(x); }
FUSEDLOSS_ELEMENTARY(sqrt)
FUSEDLOSS_ELEMENTARY(exp)
FUSEDLOSS_ELEMENTARY(sin)
FUSEDLOSS_ELEMENTARY(cos)
FUSEDLOSS_ELEMENTARY(atan)
FUSEDLOSS_ELEMENTARY(erf)
#undef FUSEDLOSS_ELEMENTARY

}  // namespace fusedloss::cuda::math
