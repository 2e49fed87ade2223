// Dual numbers on the GPU, and the elementary functions of a scalar that they need: CUDA's accurate ones, over their
// whole domain. A pointwise loss has a few of them for each element, not for each class, and small results count: what
// cross entropy takes (formulas.cuh) gives 0 below 2^-126.
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
