// The functions of one number that the formulas use on the GPU. Where CUDA's accurate function is short (expf takes 8
// instructions) or rarely used, it is taken as it is, over its whole domain. Where CUDA's is long or branches, there is
// a replacement in float. A loss of more than about forty instructions per 16-bit element is bound by instructions, not
// by memory, and a branch for each element keeps the compiler from interleaving the elements. The pointwise losses need
// small results to be accurate; exp_nonpositive, which only cross entropy uses, gives 0 below 2^-126.
//
// The errors that are stated for log, log1p and expm1 were found by running the same arithmetic on a CPU for tens of
// millions of floats. Those of quotients follow from the documented error of the hardware's reciprocal, 1 ulp. The
// emulator uses the C library's functions instead.
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

// M is bool, or int after two conditions were combined by & or |.
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
// x * x - squared, where `squared` is x * x rounded: the rounding error of the square.
FUSEDLOSS_INLINE float lost_by_squaring(float x, float squared) { return ::fmaf(x, x, -squared); }
FUSEDLOSS_INLINE double lost_by_squaring(double x, double squared) { return ::fma(x, x, -squared); }
FUSEDLOSS_INLINE float pow(float x, float y) { return ::powf(x, y); }
FUSEDLOSS_INLINE double pow(double x, double y) { return ::pow(x, y); }

// If one argument is NaN, the result is the other one.
FUSEDLOSS_INLINE float max(float a, float b) { return ::fmaxf(a, b); }
FUSEDLOSS_INLINE double max(double a, double b) { return ::fmax(a, b); }

// The hardware's 2^x, instead of the eight instructions of expf. Its error is 2 ulp for x around 0, where the large
// terms of a softmax lie. Further below, the error is no larger than the one that rounding the argument to float32
// causes anyway. Results under 2^-126 are flushed to 0.
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

// A product and a sum that the compiler must not fuse. It might fuse a product with the sum that uses it in one kernel
// and not in another; their results would then differ in the last place.
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

// ---- Division
//
// IEEE division takes 10 instructions and a branch for each quotient. The quotients here end in a rounded product: if
// it were fused with a sum in one kernel and not in another, the results would differ.

// The hardware's 1/x. The error is at most 1 ulp for 2^-126 <= |x| <= 2^126. Subnormal arguments count as 0, and
// subnormal results are flushed to 0.
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

// A power of two that brings x into the range where inverse_of_moderate is accurate: x * scale is in [0.5, 4) for a
// normal x and in [2^-23, 1) for a subnormal one, and remains 0, infinite or NaN. The scale is computed from the bits
// of x: its exponent makes x * scale at least 0.5, but is no less than -126, so that the scale itself is normal.
FUSEDLOSS_INLINE float scale_for_inverse(float x) {
#if FUSEDLOSS_CUDA_ARCH
  return __int_as_float(::max(0x7e800000 - (__float_as_int(x) & 0x7f800000), 0x00800000));
#else
  (void)x;
  return 1;
#endif
}

// 1/x over its whole domain. The error is at most 1 ulp, like that of inverse_of_moderate, and 1.5 times the smallest
// subnormal number where the result is subnormal.
FUSEDLOSS_INLINE float inverse(float x) {
  const float scale = scale_for_inverse(x);
  return math::rounded_product(inverse_of_moderate(x * scale), scale);
}
FUSEDLOSS_INLINE double inverse(double x) { return 1 / x; }

// a/b over its whole domain, including subnormal results. The error is below 3 ulp, and below 2 ulp where the
// hardware's inverse is the nearest float. a is scaled first: that product cannot overflow unless the quotient does.
// This takes two instructions more than inverse(b).
FUSEDLOSS_INLINE float divide(float a, float b) {
#if FUSEDLOSS_CUDA_ARCH
  const float scale = scale_for_inverse(b);
  return math::rounded_product(a * scale, inverse_of_moderate(b * scale));
#else
  return a / b;
#endif
}
FUSEDLOSS_INLINE double divide(double a, double b) { return a / b; }

// a/b for 2^-126 <= |b| <= 2^126 or NaN.
FUSEDLOSS_INLINE float divide_by_moderate(float a, float b) {
#if FUSEDLOSS_CUDA_ARCH
  return math::rounded_product(a, inverse_of_moderate(b));
#else
  return a / b;
#endif
}
FUSEDLOSS_INLINE double divide_by_moderate(double a, double b) { return a / b; }

// a/b for the same b and |a| >= 2^-100, with an error below 0.51 ulp: the remainder of a is divided as well. For an
// infinite a, the remainder is NaN, which max replaces by a finite number, so that the quotient stays infinite. IEEE
// division takes twice the five instructions of this, and a branch.
FUSEDLOSS_INLINE float divide_closely_by_moderate(float a, float b) {
#if FUSEDLOSS_CUDA_ARCH
  const float inverse = inverse_of_moderate(b), quotient = math::rounded_product(a, inverse);
  return ::fmaf(math::max(::fmaf(-quotient, b, a), -0x1p127f), inverse, quotient);
#else
  return a / b;
#endif
}
FUSEDLOSS_INLINE double divide_closely_by_moderate(double a, double b) { return a / b; }

// ---- Logarithms and expm1

#if FUSEDLOSS_CUDA_ARCH
// The hardware's logarithm to base 2. The absolute error is at most 2^-22 between 1/2 and 2, and the relative error is
// at most 2^-22 elsewhere. Subnormal arguments count as 0.
__device__ __forceinline__ float binary_log(float x) {
  float log;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log) : "f"(x));
  return log;
}

// For x = 2^k (1 + f) with f in [-1/3, 1/3): 2^23 k. Subtracting that from the bits of a number divides it by 2^k.
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

// log(x) over its whole domain. The error is below 1.1 ulp, and 4 ulp where x is subnormal. Where x is subnormal or 0
// or has no finite logarithm, the hardware's logarithm gives the result. logf takes 25 instructions, this 20.
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

// log(x) for x >= 1, 0 or NaN, in 17 instructions.
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

// log(1 + x) over its whole domain. The error is below 1.9 ulp, and 4 ulp from 2^126 on. The rounded sum 1 + x only
// determines k; f is computed from x, with no error but that of its own rounding. As above, the hardware's logarithm
// gives results that are not finite. log1pf takes as many instructions, but has a branch.
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

// e^x - 1 over its whole domain, with an error below 1.6 ulp: 2^n (e^r - 1) + (2^n - 1) for x = n log 2 + r, where
// nothing cancels. e^r - 1 = r + r^2 q(r), where q is fitted to a relative error of 1.4e-8. Half of the result is
// computed first, because 2^n alone may overflow where the result does not. expm1f takes 28 instructions, this 19.
FUSEDLOSS_INLINE float expm1(float given) {
#if FUSEDLOSS_CUDA_ARCH
  const float x = given > 89 ? 89 : given < -25 ? -25 : given;  // a NaN stays NaN
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

// ---- CUDA's own functions

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
