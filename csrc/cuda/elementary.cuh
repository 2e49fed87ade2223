// Dual numbers on the GPU, and the elementary functions of a scalar that they need: CUDA's accurate ones, over their
// whole domain, where those are short (expf takes 7 instructions, logf 20), and others in float where they are long or
// branch. Instructions, not memory, bound a loss that has more than some forty of them for an element of 16 bits, and
// a branch for each element costs more than its instructions. Small results count: what cross entropy takes
// (formulas.cuh) gives 0 below 2^-126.
#pragma once

#include <cmath>
#include <utility>

#include "cuda/formulas.cuh"

namespace fusedloss::cuda {

namespace elementary {

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

// ---- division: IEEE's takes 10 instructions and a branch for each quotient

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

// 1/x over its whole domain, with an error below 1.5 ulp; for a subnormal result below 1 of the smallest numbers.
FUSEDLOSS_INLINE float inverse(float x) {
  const float scale = scale_for_inverse(x);
  return inverse_of_moderate(x * scale) * scale;
}
FUSEDLOSS_INLINE double inverse(double x) { return 1 / x; }

// a/b over its whole domain, with an error below 2 ulp; for a subnormal result below 2 of the smallest numbers. a is
// scaled first: the product cannot overflow before the quotient does. Beside inverse(b) it takes two instructions more.
FUSEDLOSS_INLINE float divide(float a, float b) {
#if FUSEDLOSS_CUDA_ARCH
  const float scale = scale_for_inverse(b);
  return a * scale * inverse_of_moderate(b * scale);
#else
  return a / b;
#endif
}
FUSEDLOSS_INLINE double divide(double a, double b) { return a / b; }

// a/b for 2^-126 <= |b| <= 2^126 or NaN, with an error below 2 ulp.
FUSEDLOSS_INLINE float divide_by_moderate(float a, float b) {
#if FUSEDLOSS_CUDA_ARCH
  return a * inverse_of_moderate(b);
#else
  return a / b;
#endif
}
FUSEDLOSS_INLINE double divide_by_moderate(double a, double b) { return a / b; }

// ---- logarithms

// log(1 + x) for 0 <= x <= 1 or NaN, with an error below 1.5 ulp: x + x^2 q(x), where q is fitted to a relative error of
// the result of 3.3e-8. log1pf takes twice as many instructions, and a branch.
FUSEDLOSS_INLINE float log1p_up_to_1(float x) {
  float q = 0.005364826414734125f;
  q = ::fmaf(q, x, -0.03006580099463463f);
  q = ::fmaf(q, x, 0.07920455187559128f);
  q = ::fmaf(q, x, -0.13753803074359894f);
  q = ::fmaf(q, x, 0.1915365606546402f);
  q = ::fmaf(q, x, -0.24857163429260254f);
  q = ::fmaf(q, x, 0.3332132399082184f);
  q = ::fmaf(q, x, -0.49999648332595825f);
  return ::fmaf(x, x * q, x);
}
FUSEDLOSS_INLINE double log1p_up_to_1(double x) { return ::log1p(x); }

// ---- CUDA's own

#define FUSEDLOSS_ELEMENTARY(name)                                 \
  FUSEDLOSS_INLINE float name(float x) { return ::name##f(x); }    \
  FUSEDLOSS_INLINE double name(double x) { return ::name(x); }
FUSEDLOSS_ELEMENTARY(sqrt)
FUSEDLOSS_ELEMENTARY(exp)
FUSEDLOSS_ELEMENTARY(expm1)
FUSEDLOSS_ELEMENTARY(log)
FUSEDLOSS_ELEMENTARY(log1p)
FUSEDLOSS_ELEMENTARY(sin)
FUSEDLOSS_ELEMENTARY(cos)
FUSEDLOSS_ELEMENTARY(atan)
FUSEDLOSS_ELEMENTARY(erf)
#undef FUSEDLOSS_ELEMENTARY

}  // namespace elementary

#include "formulas/dual.h"

}  // namespace fusedloss::cuda
