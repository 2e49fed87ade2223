// torch's functions on dual numbers.
//
// Each function has torch's name and, where its slope jumps, torch's derivative: 0 for abs at 0 and relu at 0, and half
// for each of two equal arguments of maximum and minimum. The derivative of clamp at a bound depends on the version of
// torch.
//
// Some functions of `math` restrict their argument, because a GPU then needs fewer instructions: the divisor of
// divide_by_moderate is neither near 0 nor near overflow, and the argument of log1p_up_to_1 is from 0 to 1.
#if defined(FUSEDLOSS_DUAL_FUNCTIONS_INL) == defined(FUSEDLOSS_ISA_TOGGLE)
#ifdef FUSEDLOSS_DUAL_FUNCTIONS_INL
#undef FUSEDLOSS_DUAL_FUNCTIONS_INL
#else
#define FUSEDLOSS_DUAL_FUNCTIONS_INL
#endif

#include <cmath>

#include "kernels/formulas/dual-inl.h"

FUSEDLOSS_BEGIN_NAMESPACE

// The larger of a and b, or NaN if one of them is NaN. If they are equal, each has half of the slope.
template <typename V, unsigned kA, unsigned kB>
FUSEDLOSS_INLINE auto maximum(const Dual<V, kA>& a, const Dual<V, kB>& b) {
  const V zero = math::constant<V>(0), one = math::constant<V>(1), half = math::constant<V>(0.5);
  const auto equal = a.value == b.value, less = a.value<b.value, greater = a.value> b.value;
  const V value = math::select(less | (b.value != b.value), b.value, a.value);
  return chain(value, math::select(equal, half, math::select(less, zero, one)), a,
               math::select(equal, half, math::select(greater, zero, one)), b);
}
template <typename V, unsigned kA, unsigned kB>
FUSEDLOSS_INLINE auto minimum(const Dual<V, kA>& a, const Dual<V, kB>& b) {
  return -maximum(-a, -b);
}

// The slope of clamp's result by one of its arguments: 1 if the argument was chosen, else 0. A NaN among the arguments
// is returned, and x then has no derivative. `where` is not used here: as in torch, the slope of an argument that was
// not chosen is multiplied by 0, so that an infinite slope becomes NaN.
template <typename M, typename V>
FUSEDLOSS_INLINE V slope_if(M condition, V) {
  return math::select(condition, math::constant<V>(1), math::constant<V>(0));
}
// Which argument has the derivative of clamp if x equals a bound. Before torch 2.14 it is always x. Since then it is
// the bound if bounds are numbers, which have no derivative; if they are tensors, x and the bound have half each.
enum class AtBound { kX, kBoth, kBound };

template <AtBound kAtBound, typename V>
FUSEDLOSS_INLINE V slope_of_x_at_bound() {
  return math::constant<V>(kAtBound == AtBound::kX ? 1 : kAtBound == AtBound::kBoth ? 0.5 : 0);
}
template <AtBound kAtBound, typename V>
FUSEDLOSS_INLINE V slope_of_bound_at_bound() {
  return math::constant<V>(kAtBound == AtBound::kBoth ? 0.5 : 0);
}

template <AtBound kAtBound, typename V, unsigned kX, unsigned kLow>
FUSEDLOSS_INLINE auto clamp_min(const Dual<V, kX>& x, const Dual<V, kLow>& low) {
  const V of_x = slope_of_x_at_bound<kAtBound, V>(), of_low = slope_of_bound_at_bound<kAtBound, V>();
  const auto below = x.value < low.value, equal = x.value == low.value;
  const V value = math::select(below | (low.value != low.value), low.value, x.value);
  return chain(value, math::select(equal, of_x, slope_if(x.value > low.value, value)), x,
               math::select(equal, of_low, slope_if(below, value)), low);
}
template <AtBound kAtBound, typename V, unsigned kX, unsigned kHigh>
FUSEDLOSS_INLINE auto clamp_max(const Dual<V, kX>& x, const Dual<V, kHigh>& high) {
  return -clamp_min<kAtBound>(-x, -high);
}
template <AtBound kAtBound, typename V, unsigned kX, unsigned kLow, unsigned kHigh>
FUSEDLOSS_INLINE auto clamp(const Dual<V, kX>& x, const Dual<V, kLow>& low, const Dual<V, kHigh>& high) {
  const V value = clamp_max<kAtBound>(clamp_min<kAtBound>(plain(x), plain(low)), plain(high)).value;
  const V of_x = slope_of_x_at_bound<kAtBound, V>(), of_bound = slope_of_bound_at_bound<kAtBound, V>();
  const auto apart = low.value < high.value;
  const auto at_low = apart & (x.value == low.value), at_high = apart & (x.value == high.value);
  const auto inside = kAtBound == AtBound::kBound ? (x.value > low.value) & (x.value < high.value)
                                                  : (x.value >= low.value) & (x.value <= high.value);
  const auto in_order = kAtBound == AtBound::kBoth ? low.value <= high.value : apart;
  const V by_x = math::select(at_low | at_high, of_x, slope_if(inside, value));
  const V by_low = math::select(at_low, of_bound, slope_if((x.value < low.value) & in_order, value));
  const V by_high = math::select(at_high, of_bound, slope_if((x.value > high.value) | (high.value < low.value), value));
  return with_slope(chain(value, by_x, x, by_low, low), Dual<V, 0>{by_high}, high);
}

// x raised to at least `low`, with the derivative of x in either case.
template <typename V, unsigned kX>
FUSEDLOSS_INLINE Dual<V, kX> raise_to(Dual<V, kX> x, V low) {
  x.value = math::select(x.value < low, low, x.value);
  return x;
}

// ---- functions of one number

template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, 0> sign(const Dual<V, kA>& a) {
  const V zero = math::constant<V>(0);
  return {
      math::select(a.value > zero, math::constant<V>(1), math::select(a.value < zero, math::constant<V>(-1), zero))};
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> abs(const Dual<V, kA>& a) {
  return chain(math::abs(a.value), sign(a).value, a);
}
// |a|, with the slope of -a at 0. For a term of a loss that is smooth at 0 because another term has the opposite kink.
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> magnitude(const Dual<V, kA>& a) {
  const V one = math::constant<V>(1);
  return chain(math::abs(a.value), math::select(a.value > math::constant<V>(0), one, V(-one)), a);
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> relu(const Dual<V, kA>& a) {
  const V zero = math::constant<V>(0);
  const auto none = a.value <= zero;
  return chain(math::select(none, zero, a.value), math::select(none, zero, math::constant<V>(1)), a);
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> square(const Dual<V, kA>& a) {
  return a * a;
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> sqrt(const Dual<V, kA>& a) {
  const V root = math::sqrt(a.value);
  return chain(root, math::divide(math::constant<V>(0.5), root), a);
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> rsqrt(const Dual<V, kA>& a) {
  const V inverse = math::inverse(math::sqrt(a.value));
  return chain(inverse, V(math::constant<V>(-0.5) * inverse * inverse * inverse), a);
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> exp(const Dual<V, kA>& a) {
  const V power = math::exp(a.value);
  return chain(power, power, a);
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> expm1(const Dual<V, kA>& a) {
  return chain(math::expm1(a.value), math::exp(a.value), a);
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> log(const Dual<V, kA>& a) {
  return chain(math::log(a.value), math::inverse(a.value), a);
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> log1p(const Dual<V, kA>& a) {
  const V one = math::constant<V>(1);
  return chain(math::log1p(a.value), math::inverse(V(one + a.value)), a);
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> sin(const Dual<V, kA>& a) {
  return chain(math::sin(a.value), math::cos(a.value), a);
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> cos(const Dual<V, kA>& a) {
  return chain(math::cos(a.value), V(-math::sin(a.value)), a);
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> tan(const Dual<V, kA>& a) {
  const V cos = math::cos(a.value), inverse = math::inverse(cos);
  return chain(math::divide(math::sin(a.value), cos), V(inverse * inverse), a);
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> atan(const Dual<V, kA>& a) {
  const V one = math::constant<V>(1);
  return chain(math::atan(a.value), math::inverse(V(one + a.value * a.value)), a);
}

// The value of an odd function at x, from its value at |x| (`positive`). A zero keeps its sign.
template <typename V>
FUSEDLOSS_INLINE V odd(V positive, V x) {
  const V zero = math::constant<V>(0);
  return math::select(x > zero, positive, math::select(x < zero, V(-positive), x));
}

// Computed from e^(-2|x|) and e^(-2|x|) - 1, so that nothing cancels in the value near 0, nor in the slope,
// 1 - tanh(x)^2, far from 0.
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> tanh(const Dual<V, kA>& a) {
  const V two = math::constant<V>(2), exponent = -two * math::abs(a.value);
  const V small = math::exp(exponent), larger = math::constant<V>(1) + small;
  const V inverse = math::divide_by_moderate(two, larger);
  return chain(odd(math::divide_by_moderate(V(-math::expm1(exponent)), larger), a.value), V(small * inverse * inverse),
               a);
}

// e^(-x^2), corrected for the rounding error of x^2, which would otherwise cost several units in the last place.
template <typename V>
FUSEDLOSS_INLINE V gaussian(V x) {
  const V limit = math::constant<V>(30), one = math::constant<V>(1);  // the result is 0 beyond the limit
  const V magnitude = math::abs(x);
  const V limited = math::select(magnitude > limit, limit, magnitude), squared = limited * limited;
  return math::exp(V(-squared)) * (one - math::lost_by_squaring(limited, squared));
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> erf(const Dual<V, kA>& a) {
  return chain(math::erf(a.value), V(math::constant<V>(1.1283791670955126) * gaussian(a.value)), a);
}

// sinh and cosh, computed from those of x / 2, because exp(x) would overflow before they do. sinh(x / 2) comes from
// expm1, which is exact near 0. Beyond the limit both results overflow, but expm1 of half the limit does not.
template <typename V>
struct Hyperbolic {
  V sinh, cosh;
};
template <typename V>
FUSEDLOSS_INLINE Hyperbolic<V> hyperbolic(V x) {
  const V half = math::constant<V>(0.5), one = math::constant<V>(1);
  const V limit = math::constant<V>(sizeof(math::element(x)) == 8 ? 800 : 100);
  const V magnitude = math::abs(x);
  const V less_one = math::expm1(V(half * math::select(magnitude > limit, limit, magnitude)));
  const V inverse = math::divide_by_moderate(one, V(less_one + one));
  const V sinh = half * (less_one + less_one * inverse), cosh = half * (less_one + one + inverse);
  const V twice = (sinh + sinh) * cosh;
  return {odd(twice, x), one + (sinh + sinh) * sinh};
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> sinh(const Dual<V, kA>& a) {
  const auto [sinh, cosh] = hyperbolic(a.value);
  return chain(V(sinh), V(cosh), a);
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> cosh(const Dual<V, kA>& a) {
  const auto [sinh, cosh] = hyperbolic(a.value);
  return chain(V(cosh), V(sinh), a);
}

// The functions that contain 1 + e^x, computed from e^-|x|, so that nothing overflows and small results are exact.
template <typename V>
struct Logistic {
  V log_part, sigmoid, complement;  // log(1 + e^-|x|), 1 / (1 + e^-x), 1 / (1 + e^x)
};
template <typename V>
FUSEDLOSS_INLINE Logistic<V> logistic(V x) {
  const V zero = math::constant<V>(0), one = math::constant<V>(1);
  const V small = math::exp(V(-math::abs(x)));
  const V larger = math::divide_by_moderate(one, V(one + small));
  const V smaller = math::divide_by_moderate(small, V(one + small));
  return {math::log1p_up_to_1(small), math::select(x < zero, smaller, larger), math::select(x < zero, larger, smaller)};
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> softplus(const Dual<V, kA>& a) {
  const Logistic<V> of = logistic(a.value);
  return chain(V(relu(Dual<V, 0>{a.value}).value + of.log_part), of.sigmoid, a);
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> logsigmoid(const Dual<V, kA>& a) {
  const Logistic<V> of = logistic(a.value);
  return chain(V(-relu(Dual<V, 0>{-a.value}).value - of.log_part), of.complement, a);
}
// The softplus of an argument that is not positive, in a third fewer instructions.
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> softplus_below_0(const Dual<V, kA>& a) {
  const V small = math::exp(a.value);
  return chain(math::log1p_up_to_1(small), math::divide_by_moderate(small, V(math::constant<V>(1) + small)), a);
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> sigmoid(const Dual<V, kA>& a) {
  const Logistic<V> of = logistic(a.value);
  return chain(of.sigmoid, V(of.sigmoid * of.complement), a);
}

// ---- powers

template <int kExponent, typename V>
FUSEDLOSS_INLINE V integer_power(V x) {
  if constexpr (kExponent < 0) {
    return math::inverse(integer_power<-kExponent>(x));
  } else if constexpr (kExponent == 0) {
    return math::constant<V>(1);
  } else if constexpr (kExponent == 1) {
    return x;
  } else {
    const V half = integer_power<kExponent / 2>(x);
    return kExponent % 2 == 0 ? V(half * half) : V(half * half * x);
  }
}
template <int kExponent, typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> power(const Dual<V, kA>& a) {
  if constexpr (kExponent == 0) {  // the general case would compute x^-1, which is infinite at 0
    return chain(math::constant<V>(1), math::constant<V>(0), a);
  } else {
    return chain(integer_power<kExponent>(a.value),
                 V(math::constant<V>(kExponent) * integer_power<kExponent - 1>(a.value)), a);
  }
}
// a^(b - 1), computed as a^b / a if a^b is neither 0 nor subnormal nor infinite, which usually holds for all lanes.
template <typename V>
FUSEDLOSS_INLINE V lower_power(V a, V b, V power) {
  const V smallest = math::constant<V>(sizeof(math::element(a)) == 8 ? 0x1p-1022 : 0x1p-126);
  const V magnitude = math::abs(power);
  const auto is_exact = (magnitude >= smallest) & (magnitude < math::constant<V>(INFINITY)) &
                        (math::abs(a) < math::constant<V>(INFINITY));
  const V quotient = math::divide(power, a);
  if (!math::any(not_(is_exact))) return quotient;
  return math::select(is_exact, quotient, math::pow(a, V(b - math::constant<V>(1))));
}
template <typename V, unsigned kA, unsigned kB>
FUSEDLOSS_INLINE auto pow(const Dual<V, kA>& a, const Dual<V, kB>& b) {
  const V zero = math::constant<V>(0), two = math::constant<V>(2);
  if constexpr (kB == 0)  // a parameter is usually 2
    if (!math::any(b.value != two)) return chain(V(a.value * a.value), V(two * a.value), a, zero, b);
  const V power = math::pow(a.value, b.value);
  V by_a = zero, by_b = zero;
  if constexpr (kA != 0) by_a = math::select(b.value == zero, zero, V(b.value * lower_power(a.value, b.value, power)));
  if constexpr (kB != 0)
    by_b = math::select((a.value == zero) & (b.value >= zero), zero, V(power * math::log(a.value)));
  return chain(power, by_a, a, by_b, b);
}

// a log(b), which is 0 where a is 0, for every b but NaN.
template <typename V, unsigned kA, unsigned kB>
FUSEDLOSS_INLINE auto xlogy(const Dual<V, kA>& a, const Dual<V, kB>& b) {
  const V zero = math::constant<V>(0), log = math::log(b.value);
  const auto is_zero = a.value == zero;
  return chain(math::select(is_zero & (b.value == b.value), zero, V(a.value * log)),
               math::select(is_zero & (b.value <= zero), zero, log), a, math::divide(a.value, b.value), b);
}

FUSEDLOSS_END_NAMESPACE

#endif  // include guard
