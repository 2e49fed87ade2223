// The elementary functions that come from the C library. On x86-64 with glibc most use its vector library, libmvec;
// otherwise the scalar function is called for each lane.
#if defined(FUSEDLOSS_LIBMVEC_INL) == defined(FUSEDLOSS_ISA_TOGGLE)
#ifdef FUSEDLOSS_LIBMVEC_INL
#undef FUSEDLOSS_LIBMVEC_INL
#else
#define FUSEDLOSS_LIBMVEC_INL
#endif

#include <cmath>

#include "kernels/cpu/vec-inl.h"

FUSEDLOSS_BEGIN_NAMESPACE

#if defined(__x86_64__) && defined(__GLIBC__)
// The names contain the instruction set (b: SSE, d: AVX2, e: AVX-512), the number of lanes and the arguments.
#define FUSEDLOSS_CONCATENATE_(a, b, c) a##b##c
#define FUSEDLOSS_CONCATENATE(a, b, c) FUSEDLOSS_CONCATENATE_(a, b, c)
#if FUSEDLOSS_VECTOR_BYTES == 64
#define FUSEDLOSS_LIBMVEC(arguments, name) FUSEDLOSS_CONCATENATE(_ZGVeN16, arguments##_, name##f)
#define FUSEDLOSS_LIBMVEC_DOUBLE(arguments, name) FUSEDLOSS_CONCATENATE(_ZGVeN8, arguments##_, name)
#elif FUSEDLOSS_VECTOR_BYTES == 32
#define FUSEDLOSS_LIBMVEC(arguments, name) FUSEDLOSS_CONCATENATE(_ZGVdN8, arguments##_, name##f)
#define FUSEDLOSS_LIBMVEC_DOUBLE(arguments, name) FUSEDLOSS_CONCATENATE(_ZGVdN4, arguments##_, name)
#else
#define FUSEDLOSS_LIBMVEC(arguments, name) FUSEDLOSS_CONCATENATE(_ZGVbN4, arguments##_, name##f)
#define FUSEDLOSS_LIBMVEC_DOUBLE(arguments, name) FUSEDLOSS_CONCATENATE(_ZGVbN2, arguments##_, name)
#endif
// Lets the compiler remove a call whose result is not used, such as that of an unwanted derivative.
#define FUSEDLOSS_PURE __attribute__((const))
extern "C" {
FloatV FUSEDLOSS_LIBMVEC(v, sin)(FloatV) FUSEDLOSS_PURE;
FloatV FUSEDLOSS_LIBMVEC(v, cos)(FloatV) FUSEDLOSS_PURE;
FloatV FUSEDLOSS_LIBMVEC(vv, pow)(FloatV, FloatV) FUSEDLOSS_PURE;
DoubleV FUSEDLOSS_LIBMVEC_DOUBLE(v, sin)(DoubleV) FUSEDLOSS_PURE;
DoubleV FUSEDLOSS_LIBMVEC_DOUBLE(v, cos)(DoubleV) FUSEDLOSS_PURE;
DoubleV FUSEDLOSS_LIBMVEC_DOUBLE(vv, pow)(DoubleV, DoubleV) FUSEDLOSS_PURE;
}
#endif

namespace math {

template <typename V, typename F>
FUSEDLOSS_INLINE V by_lanes(V x, F f) {
  for (int lane = 0; lane < int(sizeof x / sizeof x[0]); ++lane) x[lane] = f(x[lane]);
  return x;
}

#if defined(FUSEDLOSS_LIBMVEC)
FUSEDLOSS_INLINE FloatV sin(FloatV x) { return FUSEDLOSS_LIBMVEC(v, sin)(x); }
FUSEDLOSS_INLINE FloatV cos(FloatV x) { return FUSEDLOSS_LIBMVEC(v, cos)(x); }
FUSEDLOSS_INLINE FloatV pow(FloatV x, FloatV y) { return FUSEDLOSS_LIBMVEC(vv, pow)(x, y); }
FUSEDLOSS_INLINE DoubleV sin(DoubleV x) { return FUSEDLOSS_LIBMVEC_DOUBLE(v, sin)(x); }
FUSEDLOSS_INLINE DoubleV cos(DoubleV x) { return FUSEDLOSS_LIBMVEC_DOUBLE(v, cos)(x); }
FUSEDLOSS_INLINE DoubleV pow(DoubleV x, DoubleV y) { return FUSEDLOSS_LIBMVEC_DOUBLE(vv, pow)(x, y); }
#else
template <typename V>
FUSEDLOSS_INLINE V sin(V x) {
  return by_lanes(x, [](auto lane) { return std::sin(lane); });
}
template <typename V>
FUSEDLOSS_INLINE V cos(V x) {
  return by_lanes(x, [](auto lane) { return std::cos(lane); });
}
template <typename V>
FUSEDLOSS_INLINE V pow(V x, V y) {
  for (int lane = 0; lane < int(sizeof x / sizeof x[0]); ++lane) x[lane] = std::pow(x[lane], y[lane]);
  return x;
}
#endif

FUSEDLOSS_INLINE DoubleV atan(DoubleV x) {
  return by_lanes(x, [](double lane) { return std::atan(lane); });
}
FUSEDLOSS_INLINE DoubleV erf(DoubleV x) {
  return by_lanes(x, [](double lane) { return std::erf(lane); });
}

}  // namespace math

#undef FUSEDLOSS_PURE
#undef FUSEDLOSS_LIBMVEC
#undef FUSEDLOSS_LIBMVEC_DOUBLE
#undef FUSEDLOSS_CONCATENATE
#undef FUSEDLOSS_CONCATENATE_

FUSEDLOSS_END_NAMESPACE

#endif  // include guard
