// The vector functions that the formulas use. A function with the name of an elementary function is accurate to a few
// ulp over its whole domain. The functions that most losses use are written here; the others come from the C library
// (cpu/libmvec-inl.h).
#if defined(FUSEDLOSS_MATH_INL) == defined(FUSEDLOSS_ISA_TOGGLE)
#ifdef FUSEDLOSS_MATH_INL
#undef FUSEDLOSS_MATH_INL
#else
#define FUSEDLOSS_MATH_INL
#endif

#include <cmath>
#include <cstdint>

#include "kernels/cpu/libmvec-inl.h"
#include "kernels/cpu/reduce-inl.h"
#include "kernels/cpu/vec-inl.h"

FUSEDLOSS_BEGIN_NAMESPACE

namespace math {

FUSEDLOSS_INLINE float element(FloatV v) { return v[0]; }
FUSEDLOSS_INLINE double element(DoubleV v) { return v[0]; }

template <typename V>
using ElementOf = decltype(element(V{}));

template <typename V>
FUSEDLOSS_INLINE V constant(double value) {
  return V{} + ElementOf<V>(value);
}

// The binary formats of float and double.
template <typename A>
constexpr int kFractionBits = sizeof(A) == 8 ? 52 : 23;
template <typename A>
constexpr int kExponentBias = sizeof(A) == 8 ? 1023 : 127;

// True if the condition holds in any lane.
template <typename M>
FUSEDLOSS_INLINE bool any(M condition) {
#if FUSEDLOSS_VECTOR_BYTES == 64
  return _mm512_test_epi64_mask((__m512i)condition, (__m512i)condition) != 0;
#elif FUSEDLOSS_VECTOR_BYTES == 32
  return _mm256_movemask_epi8((__m256i)condition) != 0;
#else
  uint64_t halves[2];
  __builtin_memcpy(halves, &condition, sizeof halves);
  return (halves[0] | halves[1]) != 0;
#endif
}

template <typename M, typename V>
FUSEDLOSS_INLINE V select(M condition, V a, V b) {
  return condition ? a : b;
}

FUSEDLOSS_INLINE FloatV abs(FloatV x) { return (FloatV)((FloatI)x & 0x7fffffff); }
FUSEDLOSS_INLINE DoubleV abs(DoubleV x) { return (DoubleV)((DoubleI)x & 0x7fffffffffffffff); }

// The magnitude of `magnitude` with the sign of `sign`.
FUSEDLOSS_INLINE FloatV with_sign(FloatV magnitude, FloatV sign) {
  return (FloatV)(((FloatI)magnitude & 0x7fffffff) | ((FloatI)sign & ~0x7fffffff));
}
FUSEDLOSS_INLINE DoubleV with_sign(DoubleV magnitude, DoubleV sign) {
  return (DoubleV)(((DoubleI)magnitude & 0x7fffffffffffffff) | ((DoubleI)sign & ~0x7fffffffffffffff));
}

// x with only the upper half of its digits, so that its square is exact.
FUSEDLOSS_INLINE FloatV upper_half(FloatV x) { return (FloatV)((FloatI)x & ~0xfff); }
FUSEDLOSS_INLINE DoubleV upper_half(DoubleV x) { return (DoubleV)((DoubleI)x & ~0x7ffffffll); }

// x * x - squared, where `squared` is x * x rounded.
template <typename V>
FUSEDLOSS_INLINE V lost_by_squaring(V x, V squared) {
  const V upper = upper_half(x);
  return (upper * upper - squared) + (x - upper) * (x + upper);
}

FUSEDLOSS_INLINE FloatV sqrt(FloatV x) {
#if FUSEDLOSS_VECTOR_BYTES == 64
  return (FloatV)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#elif FUSEDLOSS_VECTOR_BYTES == 32
  return (FloatV)_mm256_sqrt_ps((__m256)x);
#else
  return by_lanes(x, [](float lane) { return std::sqrt(lane); });
#endif
}
FUSEDLOSS_INLINE DoubleV sqrt(DoubleV x) {
#if FUSEDLOSS_VECTOR_BYTES == 64
  return (DoubleV)_mm512_maskz_sqrt_pd(0xff, (__m512d)x);
#elif FUSEDLOSS_VECTOR_BYTES == 32
  return (DoubleV)_mm256_sqrt_pd((__m256d)x);
#else
  return by_lanes(x, [](double lane) { return std::sqrt(lane); });
#endif
}

// On the CPU, division is always one instruction, so these functions do not differ.
template <typename V>
FUSEDLOSS_INLINE V divide(V a, V b) {
  return a / b;
}
template <typename V>
FUSEDLOSS_INLINE V divide_by_moderate(V a, V b) {
  return a / b;
}
template <typename V>
FUSEDLOSS_INLINE V inverse(V x) {
  return constant<V>(1) / x;
}

template <typename A>
FUSEDLOSS_INLINE A rounded_product(A a, A b) {
  return prevent_contraction(a * b);
}

// ---- exp for arguments up to a little above 0
//
// exp(x) = 2^n exp(r) with n = round(x / ln 2), |r| <= ln 2 / 2; exp(r) = 1 + r + r^2 q(r). q is fitted at Chebyshev
// nodes, which gives exp a relative error of 8e-9 (float) and 1.3e-17 (double). The result is 0 below kLowest and for
// -inf, and NaN for NaN.

// Adding this number leaves the nearest integer in the low bits of the sum.
template <typename A>
constexpr A kRound = sizeof(A) == 8 ? A(0x1.8p52) : A(0x1.8p23);

// x = n ln 2 + r. n is also the difference between the bits of `shifted` and those of kRound, as integers. exp(r) is
// 1 + r + r^2 q in float, and 1 + r q in double.
template <typename A>
struct ReducedExp {
  using V = typename Simd<A>::V;
  using I = typename Simd<A>::I;
  V shifted, n, r, q;

  FUSEDLOSS_INLINE I exponent() const { return (I)shifted - (I)(V{} + kRound<A>); }
};
FUSEDLOSS_INLINE ReducedExp<float> reduce_exp(FloatV x) {
  const FloatV shifted = x * 1.44269504f + kRound<float>;
  const FloatV n = shifted - kRound<float>;
  const FloatV r = (x - n * 0.693145752f) - n * 1.42860682e-6f;
  FloatV q = FloatV{} + 1.39263256e-3f;
  q = q * r + 8.36329275e-3f;
  q = q * r + 4.16665538e-2f;
  q = q * r + 1.66665763e-1f;
  q = q * r + 0.5f;
  return {shifted, n, r, q};
}
FUSEDLOSS_INLINE ReducedExp<double> reduce_exp(DoubleV x) {
  const DoubleV shifted = x * 1.4426950408889634 + kRound<double>;
  const DoubleV n = shifted - kRound<double>;
  const DoubleV r = (x - n * 0x1.62e42feep-1) - n * 1.9082149292705877e-10;
  DoubleV q = DoubleV{} + 2.5100395159429243e-08;
  q = q * r + 2.7620101012097998e-07;
  q = q * r + 2.7557268439678002e-06;
  q = q * r + 2.4801521269532122e-05;
  q = q * r + 1.9841269863066696e-04;
  q = q * r + 1.3888888917230724e-03;
  q = q * r + 8.3333333333300598e-03;
  q = q * r + 4.1666666666624094e-02;
  q = q * r + 1.6666666666666669e-01;
  q = q * r + 5.0000000000000011e-01;
  q = q * r + 1.;
  return {shifted, n, r, q};
}

FUSEDLOSS_INLINE FloatV exp_of_rest(const ReducedExp<float>& e) { return (e.q * e.r + 1.f) * e.r + 1.f; }
FUSEDLOSS_INLINE DoubleV exp_of_rest(const ReducedExp<double>& e) { return e.q * e.r + 1.; }

template <typename V>
FUSEDLOSS_INLINE V exp_nonpositive(V x) {
  using A = ElementOf<V>;
  constexpr A kLowest = sizeof(A) == 8 ? -760 : -110;
  const auto e = reduce_exp(Larger::of(V{} + kLowest, x));
  const V exp_r = exp_of_rest(e);
#if FUSEDLOSS_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 8) {
    return (V)_mm512_maskz_scalef_pd(0xff, (__m512d)exp_r, (__m512d)e.n);
  } else {
    return (V)_mm512_maskz_scalef_ps(0xffff, (__m512)exp_r, (__m512)e.n);
  }
#else
  // 2^n is applied in two factors, because the 2^n of a subnormal result is not a normal number.
  const auto exponent = e.exponent(), half = exponent >> 1;
  const V first = (V)((half + kExponentBias<A>) << kFractionBits<A>);
  const V second = (V)((exponent - half + kExponentBias<A>) << kFractionBits<A>);
  return exp_r * first * second;
#endif
}
FUSEDLOSS_INLINE float exp_nonpositive(float x) { return std::exp(x); }
FUSEDLOSS_INLINE double exp_nonpositive(double x) { return std::exp(x); }
FUSEDLOSS_INLINE long double exp_nonpositive(long double x) { return std::exp(x); }

// ---- log for 0, positive normal numbers, infinity and NaN ----
//
// log(x) = e ln 2 + log(1 + f) with x = 2^e (1 + f), 1 + f in [sqrt(1/2), sqrt(2)); log(1 + f) = f - f^2 / 2 +
// f^3 q(f). q is fitted so that the relative error of the result is 6e-9.

FUSEDLOSS_INLINE FloatV log_of_normal(FloatV x) {
  constexpr int32_t kSqrtHalf = 0x3f3504f3;
  const FloatI exponent = ((FloatI)x - kSqrtHalf) >> 23;
  const FloatV e = __builtin_convertvector(exponent, FloatV);
  const FloatV f = (FloatV)((FloatI)x - (exponent << 23)) - 1.f;
  FloatV q = FloatV{} - 0.0763447136f;
  q = q * f + 0.127615571f;
  q = q * f - 0.131601810f;
  q = q * f + 0.142017603f;
  q = q * f - 0.166233584f;
  q = q * f + 0.200012267f;
  q = q * f - 0.250008196f;
  q = q * f + 0.333333313f;
  const FloatV square = f * f;
  const FloatV small = e * 1.42860682e-6f + square * (f * q - 0.5f);
  const FloatV log = e * 0.693145752f + (f + small);
  const FloatV special = x == 0.f ? FloatV{} - INFINITY : x;
  return (x > 0.f) & (x < INFINITY) ? log : special;
}

// In double: with s = f / (2 + f), log(1 + f) = 2 s + s R = f - (f^2 / 2 - s (f^2 / 2 + R)), where s R is the rest of
// the series of 2 atanh(s), and R = s^2 p(s^2). p is fitted so that the relative error of the result is 5e-18.
FUSEDLOSS_INLINE DoubleV log_of_normal(DoubleV x) {
  constexpr int64_t kSqrtHalf = 0x3fe6a09e667f3bcd;
  const DoubleI exponent = ((DoubleI)x - kSqrtHalf) >> 52;
  const DoubleV round = DoubleV{} + kRound<double>;
  const DoubleV e = (DoubleV)(exponent + (DoubleI)round) - round;
  const DoubleV f = (DoubleV)((DoubleI)x - (exponent << 52)) - 1.;
  const DoubleV s = f / (f + 2.), square = s * s, half_square = 0.5 * f * f;
  DoubleV p = DoubleV{} + 0.1461793403127802;
  p = p * square + 0.15331601446484086;
  p = p * square + 0.1818289274199408;
  p = p * square + 0.22222211085127702;
  p = p * square + 0.2857142862627991;
  p = p * square + 0.39999999999898833;
  p = p * square + 0.666666666666667;
  const DoubleV small = s * (half_square + square * p) + e * 1.9082149292705877e-10;
  const DoubleV log = e * 0x1.62e42feep-1 + (f - (half_square - small));
  const DoubleV special = x == 0. ? DoubleV{} - INFINITY : x;
  return (x > 0.) & (x < INFINITY) ? log : special;
}

// ---- exp, log and similar functions over their whole domain; a NaN passes through each `select`

// Infinity is selected above `highest`. It must not result from a final multiplication, which would not overflow if the
// compiler fused it with an addition.
template <typename V>
FUSEDLOSS_INLINE V exp(V x) {
  const V highest = constant<V>(sizeof(ElementOf<V>) == 8 ? 709.782712893384 : 88.7228317f);
  return select(x > highest, constant<V>(INFINITY), exp_nonpositive(x));
}

// exp(r) - 1
FUSEDLOSS_INLINE FloatV less_one(const ReducedExp<float>& e) { return e.r * e.r * e.q + e.r; }
FUSEDLOSS_INLINE DoubleV less_one(const ReducedExp<double>& e) { return e.r * e.q; }

// 2^n (exp(r) - 1) + (2^n - 1), with n and r as in reduce_exp. Nothing cancels, whatever n is. Half of it is computed
// first, because 2^n alone overflows before the result does.
template <typename V>
FUSEDLOSS_INLINE V expm1(V given) {
  constexpr bool kIsDouble = sizeof(ElementOf<V>) == 8;
  const V highest = constant<V>(kIsDouble ? 710 : 89), lowest = constant<V>(kIsDouble ? -45 : -25);
  const auto e = reduce_exp(select(given > highest, highest, select(given < lowest, lowest, given)));
  const V half_power = (V)((e.exponent() + (kExponentBias<ElementOf<V>> - 1)) << kFractionBits<ElementOf<V>>);
  const V half = half_power * less_one(e) + (half_power - constant<V>(0.5));
  return with_sign(half + half, given);
}

// Extends log_of_normal to subnormal numbers, without losing precision, and to negative numbers, which give NaN.
template <typename V>
FUSEDLOSS_INLINE V log(V x) {
  constexpr bool kIsDouble = sizeof(ElementOf<V>) == 8;
  const V scale = constant<V>(kIsDouble ? 0x1p54 : 0x1p32);
  const V log_of_scale = constant<V>(kIsDouble ? 37.429947750237048 : 22.1807098);
  const auto subnormal = x < constant<V>(kIsDouble ? 0x1p-1022 : 0x1p-126);
  const V log = log_of_normal(select(subnormal, x * scale, x)) - select(subnormal, log_of_scale, V{});
  return select(x < V{}, constant<V>(NAN), log);
}

// log(u), with u = 1 + x rounded, plus a correction for the rounding error of u. An infinite u needs no correction.
template <typename V>
FUSEDLOSS_INLINE V log1p(V x) {
  const V zero = constant<V>(0), one = constant<V>(1);
  const V u = x + one, lost = x - (u - one);
  return with_sign(log(u) + select((u < constant<V>(INFINITY)) & (u > zero), lost / u, zero), x);
}

// log1p for x from 0 to 1 (or NaN), so that u is from 1 to 2. The correction approximates 1 / u by 1 - x / 2, which
// changes the result by a quarter of its last place.
template <typename V>
FUSEDLOSS_INLINE V log1p_up_to_1(V x) {
  const V one = constant<V>(1), u = x + one, lost = x - (u - one);
  return log_of_normal(u) + lost * (one - constant<V>(0.5) * x);
}

// c[0] + c[1] x + …
template <int kCount>
FUSEDLOSS_INLINE FloatV polynomial(FloatV x, const float (&c)[kCount]) {
  FloatV sum = FloatV{} + c[kCount - 1];
  FUSEDLOSS_UNROLL for (int i = kCount - 2; i >= 0; --i) sum = sum * x + c[i];
  return sum;
}

// x p(x^2) for |x| up to 1, and pi / 2 - atan(1 / x) beyond. p is fitted to a relative error of 3e-9.
FUSEDLOSS_INLINE FloatV atan(FloatV x) {
  constexpr float kFitted[] = {9.999999973e-01f, -3.333327779e-01f, 1.999811347e-01f, -1.426039479e-01f,
                               1.093423499e-01f, -8.355068439e-02f, 5.717845688e-02f, -3.043831170e-02f,
                               1.053308240e-02f, -1.711137443e-03f};
  const FloatV magnitude = abs(x);
  const FloatI is_large = magnitude > 1.f;
  const FloatV y = select(is_large, 1.f / magnitude, magnitude);
  const FloatV angle = y * polynomial(y * y, kFitted);
  return with_sign(select(is_large, 1.57079633f - angle, angle), x);
}

// x p(x^2) for |x| up to 1.5, 1 - e^(-x^2) q(1 / (1 + x)) from there to 4, and 1 beyond. p and q are fitted to a
// relative error of 1e-8.
FUSEDLOSS_INLINE FloatV erf(FloatV x) {
  constexpr float kNear[] = {1.128379166e+00f,  -3.761263233e-01f, 1.128371659e-01f,
                             -2.686281633e-02f, 5.216358773e-03f,  -8.449447699e-04f,
                             1.128304744e-04f,  -1.125735937e-05f, 6.127650052e-07f};
  constexpr float kFar[] = {-1.843065890e-04f, 5.687810344e-01f, 5.164842281e-01f, 5.451210916e-01f,
                            -1.072475497e+00f, 3.609492469e-01f, 1.199555840e-01f};
  const FloatV magnitude = abs(x);
  const FloatV near = magnitude * polynomial(x * x, kNear);
  const FloatV far = 1.f - exp(-x * x) * polynomial(1.f / (1.f + magnitude), kFar);
  return with_sign(select(magnitude > 4.f, FloatV{} + 1.f, select(magnitude > 1.5f, far, near)), x);
}

}  // namespace math

FUSEDLOSS_END_NAMESPACE

#endif  // include guard
