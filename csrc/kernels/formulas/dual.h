// Dual numbers: a value and its derivatives by a loss's operands, so that a formula that is written once gives both.
//
// Dual<V, kWrt> carries the derivatives by the operands whose bits are set in kWrt; an operation's result carries those
// of either of its arguments. What does not depend on an operand so has no derivative by it, rather than one of 0: that
// costs nothing, and 0 times an infinite slope would be NaN where torch has none. A V is a scalar, or a vector whose
// lanes are elements of their own; conditions are what comparing two V gives, joined by & and |.
//
// Each function has torch's name and, where its slope jumps, torch's derivative: 0 for abs at 0 and relu at 0, half to
// each of two equal arguments of maximum and minimum; of clamp, what that torch has.
//
// Without include guard, as formulas/cross_entropy.h, and for the same reason. The includer provides `elementary`: the
// functions of a V. Some of them are told that their argument is of a kind that a GPU takes fewer instructions for:
// divide_by_moderate has a divisor neither near 0 nor near overflow, log1p_up_to_1 an argument from 0 to 1.

FUSEDLOSS_INLINE constexpr int count_bits(unsigned bits) {
  return bits == 0 ? 0 : int(bits & 1) + count_bits(bits >> 1);
}

// The place among the set bits of `bits` of its bit number `i`.
FUSEDLOSS_INLINE constexpr int place_of(unsigned bits, int i) {
  return count_bits(bits & ((1u << i) - 1));
}

// The number of the set bit at `place`.
FUSEDLOSS_INLINE constexpr int bit_at(unsigned bits, int place) {
  int i = 0;
  while (place_of(bits, i) != place || (bits >> i & 1) == 0) ++i;
  return i;
}

template <typename V, unsigned kWrt>
struct Dual {
  V value;
  V partial[count_bits(kWrt)];
};
template <typename V>
struct Dual<V, 0> {
  V value;
};

template <typename V>
FUSEDLOSS_INLINE Dual<V, 0> constant(double value) {
  return {elementary::constant<V>(value)};
}

// Operand number kOperand, with its derivative by itself if kWrt has it.
template <int kOperand, unsigned kWrt, typename V>
FUSEDLOSS_INLINE auto operand(V value) {
  constexpr unsigned kOwn = kWrt & (1u << kOperand);
  if constexpr (kOwn != 0) {
    return Dual<V, kOwn>{value, {elementary::constant<V>(1)}};
  } else {
    return Dual<V, 0>{value};
  }
}

template <int kOperand, typename V, unsigned kWrt>
FUSEDLOSS_INLINE V partial_by(const Dual<V, kWrt>& a) {
  if constexpr ((kWrt >> kOperand & 1) != 0) {
    constexpr int kPlace = place_of(kWrt, kOperand);
    return a.partial[kPlace];
  } else {
    return elementary::constant<V>(0);
  }
}

// ---- the chain rule: value depends on a by the slope by_a (and on b by by_b)

template <typename V, unsigned kA, int... kPlace>
FUSEDLOSS_INLINE Dual<V, kA> chain_at(V value, V by_a, const Dual<V, kA>& a, std::integer_sequence<int, kPlace...>) {
  return {value, {by_a * a.partial[kPlace]...}};
}

template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> chain(V value, V by_a, const Dual<V, kA>& a) {
  if constexpr (kA == 0) {
    return {value};
  } else {
    return chain_at(value, by_a, a, std::make_integer_sequence<int, count_bits(kA)>{});
  }
}

template <int kOperand, typename V, unsigned kA, unsigned kB>
FUSEDLOSS_INLINE V partial_of_both(V by_a, const Dual<V, kA>& a, V by_b, const Dual<V, kB>& b) {
  if constexpr ((kA >> kOperand & 1) == 0) {
    return by_b * partial_by<kOperand>(b);
  } else if constexpr ((kB >> kOperand & 1) == 0) {
    return by_a * partial_by<kOperand>(a);
  } else {
    return by_a * partial_by<kOperand>(a) + by_b * partial_by<kOperand>(b);
  }
}

template <typename V, unsigned kA, unsigned kB, int... kPlace>
FUSEDLOSS_INLINE Dual<V, kA | kB> chain_at(V value, V by_a, const Dual<V, kA>& a, V by_b, const Dual<V, kB>& b,
                                           std::integer_sequence<int, kPlace...>) {
  return {value, {partial_of_both<bit_at(kA | kB, kPlace)>(by_a, a, by_b, b)...}};
}

template <typename V, unsigned kA, unsigned kB>
FUSEDLOSS_INLINE Dual<V, kA | kB> chain(V value, V by_a, const Dual<V, kA>& a, V by_b, const Dual<V, kB>& b) {
  if constexpr ((kA | kB) == 0) {
    return {value};
  } else {
    return chain_at(value, by_a, a, by_b, b, std::make_integer_sequence<int, count_bits(kA | kB)>{});
  }
}

// For derivatives that are given by hand: a without any, and a with a further slope, by b.
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, 0> plain(const Dual<V, kA>& a) {
  return {a.value};
}
template <typename V, unsigned kA, unsigned kSlope, unsigned kB>
FUSEDLOSS_INLINE auto with_slope(const Dual<V, kA>& a, const Dual<V, kSlope>& slope, const Dual<V, kB>& b) {
  return chain(a.value, elementary::constant<V>(1), a, slope.value, b);
}

// An element's gradient, from the slope of its loss; of half of the slope where the formula F says so.
template <typename F, typename = void>
struct HasHalfSlope : std::false_type {};
template <typename F>
struct HasHalfSlope<F, std::enable_if_t<F::kHasHalfSlope>> : std::true_type {};

template <typename F, typename V>
FUSEDLOSS_INLINE V gradient(V grad_output, V slope) {
  const V product = grad_output * slope;
  return HasHalfSlope<F>::value ? V(product + product) : product;
}

// ---- arithmetic and comparisons, also with numbers

template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> operator-(const Dual<V, kA>& a) {
  return chain(V(-a.value), elementary::constant<V>(-1), a);
}
template <typename V, unsigned kA, unsigned kB>
FUSEDLOSS_INLINE auto operator+(const Dual<V, kA>& a, const Dual<V, kB>& b) {
  return chain(V(a.value + b.value), elementary::constant<V>(1), a, elementary::constant<V>(1), b);
}
template <typename V, unsigned kA, unsigned kB>
FUSEDLOSS_INLINE auto operator-(const Dual<V, kA>& a, const Dual<V, kB>& b) {
  return chain(V(a.value - b.value), elementary::constant<V>(1), a, elementary::constant<V>(-1), b);
}
template <typename V, unsigned kA, unsigned kB>
FUSEDLOSS_INLINE auto operator*(const Dual<V, kA>& a, const Dual<V, kB>& b) {
  return chain(V(a.value * b.value), b.value, a, a.value, b);
}
template <typename V, unsigned kA, unsigned kB>
FUSEDLOSS_INLINE auto operator/(const Dual<V, kA>& a, const Dual<V, kB>& b) {
  const V quotient = elementary::divide(a.value, b.value);
  return chain(quotient, elementary::inverse(b.value), a, V(-elementary::divide(quotient, b.value)), b);
}

#define FUSEDLOSS_COMPARISON(op)                                                  \
  template <typename V, unsigned kA, unsigned kB>                                 \
  FUSEDLOSS_INLINE auto operator op(const Dual<V, kA>& a, const Dual<V, kB>& b) { \
    return a.value op b.value;                                                    \
  }
#define FUSEDLOSS_WITH_NUMBERS(op)                                   \
  template <typename V, unsigned kA>                                 \
  FUSEDLOSS_INLINE auto operator op(const Dual<V, kA>& a, double b) { \
    return a op constant<V>(b);                                      \
  }                                                                  \
  template <typename V, unsigned kB>                                 \
  FUSEDLOSS_INLINE auto operator op(double a, const Dual<V, kB>& b) { \
    return constant<V>(a) op b;                                      \
  }
FUSEDLOSS_COMPARISON(<)
FUSEDLOSS_COMPARISON(<=)
FUSEDLOSS_COMPARISON(>)
FUSEDLOSS_COMPARISON(>=)
FUSEDLOSS_COMPARISON(==)
FUSEDLOSS_COMPARISON(!=)
FUSEDLOSS_WITH_NUMBERS(+)
FUSEDLOSS_WITH_NUMBERS(-)
FUSEDLOSS_WITH_NUMBERS(*)
FUSEDLOSS_WITH_NUMBERS(/)
FUSEDLOSS_WITH_NUMBERS(<)
FUSEDLOSS_WITH_NUMBERS(<=)
FUSEDLOSS_WITH_NUMBERS(>)
FUSEDLOSS_WITH_NUMBERS(>=)
FUSEDLOSS_WITH_NUMBERS(==)
FUSEDLOSS_WITH_NUMBERS(!=)
#undef FUSEDLOSS_COMPARISON
#undef FUSEDLOSS_WITH_NUMBERS

template <typename V, unsigned kA>
FUSEDLOSS_INLINE auto is_nonzero(const Dual<V, kA>& a) {
  return a.value != elementary::constant<V>(0);
}

// ---- choices

template <typename M>
FUSEDLOSS_INLINE auto not_(M condition) {
  return condition == M{};
}

template <typename M, typename V, unsigned kA, unsigned kB, int... kPlace>
FUSEDLOSS_INLINE Dual<V, kA | kB> where_at(M condition, const Dual<V, kA>& a, const Dual<V, kB>& b,
                                           std::integer_sequence<int, kPlace...>) {
  return {elementary::select(condition, a.value, b.value),
          {elementary::select(condition, partial_by<bit_at(kA | kB, kPlace)>(a),
                              partial_by<bit_at(kA | kB, kPlace)>(b))...}};
}
template <typename M, typename V, unsigned kA, unsigned kB>
FUSEDLOSS_INLINE Dual<V, kA | kB> where(M condition, const Dual<V, kA>& a, const Dual<V, kB>& b) {
  if constexpr ((kA | kB) == 0) {
    return {elementary::select(condition, a.value, b.value)};
  } else {
    return where_at(condition, a, b, std::make_integer_sequence<int, count_bits(kA | kB)>{});
  }
}

// a, where it is not less than b; where one is NaN, that. Both arguments of an equal pair have half of the slope.
template <typename V, unsigned kA, unsigned kB>
FUSEDLOSS_INLINE auto maximum(const Dual<V, kA>& a, const Dual<V, kB>& b) {
  const V zero = elementary::constant<V>(0), one = elementary::constant<V>(1), half = elementary::constant<V>(0.5);
  const auto equal = a.value == b.value, less = a.value < b.value, greater = a.value > b.value;
  const V value = elementary::select(less | (b.value != b.value), b.value, a.value);
  return chain(value, elementary::select(equal, half, elementary::select(less, zero, one)), a,
               elementary::select(equal, half, elementary::select(greater, zero, one)), b);
}
template <typename V, unsigned kA, unsigned kB>
FUSEDLOSS_INLINE auto minimum(const Dual<V, kA>& a, const Dual<V, kB>& b) {
  return -maximum(-a, -b);
}

// What is NaN comes through, x without a derivative. Not by `where`: the slope of what is not chosen is multiplied by 0,
// as in torch, where one that is infinite becomes NaN.
template <typename M, typename V>
FUSEDLOSS_INLINE V slope_if(M condition, V) {
  return elementary::select(condition, elementary::constant<V>(1), elementary::constant<V>(0));
}
// At a bound, kHalves halves of the derivative are x's: 2 before torch 2.14; since then 0 where bounds are numbers and 1
// where they are tensors, the other being the bound's.
template <int kHalves, typename V, unsigned kX, unsigned kLow>
FUSEDLOSS_INLINE auto clamp_min(const Dual<V, kX>& x, const Dual<V, kLow>& low) {
  const V of_x = elementary::constant<V>(0.5 * kHalves), of_low = elementary::constant<V>(kHalves == 1 ? 0.5 : 0);
  const auto below = x.value < low.value, equal = x.value == low.value;
  const V value = elementary::select(below | (low.value != low.value), low.value, x.value);
  return chain(value, elementary::select(equal, of_x, slope_if(x.value > low.value, value)), x,
               elementary::select(equal, of_low, slope_if(below, value)), low);
}
template <int kHalves, typename V, unsigned kX, unsigned kHigh>
FUSEDLOSS_INLINE auto clamp_max(const Dual<V, kX>& x, const Dual<V, kHigh>& high) {
  return -clamp_min<kHalves>(-x, -high);
}
template <int kHalves, typename V, unsigned kX, unsigned kLow, unsigned kHigh>
FUSEDLOSS_INLINE auto clamp(const Dual<V, kX>& x, const Dual<V, kLow>& low, const Dual<V, kHigh>& high) {
  const V value = clamp_max<kHalves>(clamp_min<kHalves>(plain(x), plain(low)), plain(high)).value;
  const V of_x = elementary::constant<V>(0.5 * kHalves), of_bound = elementary::constant<V>(kHalves == 1 ? 0.5 : 0);
  const auto apart = low.value < high.value;
  const auto at_low = apart & (x.value == low.value), at_high = apart & (x.value == high.value);
  const auto inside = kHalves == 0 ? (x.value > low.value) & (x.value < high.value)
                                   : (x.value >= low.value) & (x.value <= high.value);
  const auto in_order = kHalves == 1 ? low.value <= high.value : apart;
  const V by_x = elementary::select(at_low | at_high, of_x, slope_if(inside, value));
  const V by_low = elementary::select(at_low, of_bound, slope_if((x.value < low.value) & in_order, value));
  const V by_high = elementary::select(at_high, of_bound,
                                       slope_if((x.value > high.value) | (high.value < low.value), value));
  return with_slope(chain(value, by_x, x, by_low, low), Dual<V, 0>{by_high}, high);
}

// At least `low`, with the derivative of x in either case.
template <typename V, unsigned kX>
FUSEDLOSS_INLINE Dual<V, kX> raise_to(Dual<V, kX> x, V low) {
  x.value = elementary::select(x.value < low, low, x.value);
  return x;
}

// ---- functions of one number

template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, 0> sign(const Dual<V, kA>& a) {
  const V zero = elementary::constant<V>(0);
  return {elementary::select(a.value > zero, elementary::constant<V>(1),
                             elementary::select(a.value < zero, elementary::constant<V>(-1), zero))};
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> abs(const Dual<V, kA>& a) {
  return chain(elementary::abs(a.value), sign(a).value, a);
}
// |a| with a slope at 0 too, that of -a: for a term of a loss that has no kink there, because another term has the
// opposite one.
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> magnitude(const Dual<V, kA>& a) {
  const V one = elementary::constant<V>(1);
  return chain(elementary::abs(a.value), elementary::select(a.value > elementary::constant<V>(0), one, V(-one)), a);
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> relu(const Dual<V, kA>& a) {
  const V zero = elementary::constant<V>(0);
  const auto none = a.value <= zero;
  return chain(elementary::select(none, zero, a.value), elementary::select(none, zero, elementary::constant<V>(1)), a);
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> square(const Dual<V, kA>& a) {
  return a * a;
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> sqrt(const Dual<V, kA>& a) {
  const V root = elementary::sqrt(a.value);
  return chain(root, elementary::divide(elementary::constant<V>(0.5), root), a);
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> rsqrt(const Dual<V, kA>& a) {
  const V inverse = elementary::inverse(elementary::sqrt(a.value));
  return chain(inverse, V(elementary::constant<V>(-0.5) * inverse * inverse * inverse), a);
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> exp(const Dual<V, kA>& a) {
  const V power = elementary::exp(a.value);
  return chain(power, power, a);
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> expm1(const Dual<V, kA>& a) {
  return chain(elementary::expm1(a.value), elementary::exp(a.value), a);
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> log(const Dual<V, kA>& a) {
  return chain(elementary::log(a.value), elementary::inverse(a.value), a);
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> log1p(const Dual<V, kA>& a) {
  const V one = elementary::constant<V>(1);
  return chain(elementary::log1p(a.value), elementary::inverse(V(one + a.value)), a);
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> sin(const Dual<V, kA>& a) {
  return chain(elementary::sin(a.value), elementary::cos(a.value), a);
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> cos(const Dual<V, kA>& a) {
  return chain(elementary::cos(a.value), V(-elementary::sin(a.value)), a);
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> tan(const Dual<V, kA>& a) {
  const V cos = elementary::cos(a.value), inverse = elementary::inverse(cos);
  return chain(elementary::divide(elementary::sin(a.value), cos), V(inverse * inverse), a);
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> atan(const Dual<V, kA>& a) {
  const V one = elementary::constant<V>(1);
  return chain(elementary::atan(a.value), elementary::inverse(V(one + a.value * a.value)), a);
}

// Of an odd function, its value at |x|: that at x, with the sign that 0 has.
template <typename V>
FUSEDLOSS_INLINE V odd(V positive, V x) {
  const V zero = elementary::constant<V>(0);
  return elementary::select(x > zero, positive, elementary::select(x < zero, V(-positive), x));
}

// From e^(-2|x|) and that less 1: neither the value near 0 nor the slope far from it, 1 - tanh(x)^2, is a difference.
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> tanh(const Dual<V, kA>& a) {
  const V two = elementary::constant<V>(2), exponent = -two * elementary::abs(a.value);
  const V small = elementary::exp(exponent), larger = elementary::constant<V>(1) + small;
  const V inverse = elementary::divide_by_moderate(two, larger);
  return chain(odd(elementary::divide_by_moderate(V(-elementary::expm1(exponent)), larger), a.value),
               V(small * inverse * inverse), a);
}

// e^(-x^2), also of what rounding takes away from x^2, which would be a multiple of the result's last place.
template <typename V>
FUSEDLOSS_INLINE V gaussian(V x) {
  const V limit = elementary::constant<V>(30), one = elementary::constant<V>(1);  // 0 beyond
  const V magnitude = elementary::abs(x);
  const V limited = elementary::select(magnitude > limit, limit, magnitude), squared = limited * limited;
  return elementary::exp(V(-squared)) * (one - elementary::lost_by_squaring(limited, squared));
}
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> erf(const Dual<V, kA>& a) {
  return chain(elementary::erf(a.value), V(elementary::constant<V>(1.1283791670955126) * gaussian(a.value)), a);
}

// sinh and cosh from those of half of x, where exp does not overflow before they do: sinh(x / 2) from expm1, which is
// exact near 0. Beyond the limit both overflow, and expm1 does not.
template <typename V>
struct Hyperbolic {
  V sinh, cosh;
};
template <typename V>
FUSEDLOSS_INLINE Hyperbolic<V> hyperbolic(V x) {
  const V half = elementary::constant<V>(0.5), one = elementary::constant<V>(1);
  const V limit = elementary::constant<V>(sizeof(elementary::element(x)) == 8 ? 800 : 100);
  const V magnitude = elementary::abs(x);
  const V less_one = elementary::expm1(V(half * elementary::select(magnitude > limit, limit, magnitude)));
  const V inverse = elementary::divide_by_moderate(one, V(less_one + one));
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

// What has 1 + e^x in it, from e^-|x|: nothing overflows, and small results are exact.
template <typename V>
struct Logistic {
  V log_part, sigmoid, complement;  // log(1 + e^-|x|), 1 / (1 + e^-x), 1 / (1 + e^x)
};
template <typename V>
FUSEDLOSS_INLINE Logistic<V> logistic(V x) {
  const V zero = elementary::constant<V>(0), one = elementary::constant<V>(1);
  const V small = elementary::exp(V(-elementary::abs(x)));
  const V larger = elementary::divide_by_moderate(one, V(one + small));
  const V smaller = elementary::divide_by_moderate(small, V(one + small));
  return {elementary::log1p_up_to_1(small), elementary::select(x < zero, smaller, larger),
          elementary::select(x < zero, larger, smaller)};
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
// The softplus of what is not positive, in a third less instructions.
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> softplus_below_0(const Dual<V, kA>& a) {
  const V small = elementary::exp(a.value);
  return chain(elementary::log1p_up_to_1(small),
               elementary::divide_by_moderate(small, V(elementary::constant<V>(1) + small)), a);
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
    return elementary::inverse(integer_power<-kExponent>(x));
  } else if constexpr (kExponent == 0) {
    return elementary::constant<V>(1);
  } else if constexpr (kExponent == 1) {
    return x;
  } else {
    const V half = integer_power<kExponent / 2>(x);
    return kExponent % 2 == 0 ? V(half * half) : V(half * half * x);
  }
}
template <int kExponent, typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> power(const Dual<V, kA>& a) {
  if constexpr (kExponent == 0) {  // x^-1, which is infinite at 0, must not come into it
    return chain(elementary::constant<V>(1), elementary::constant<V>(0), a);
  } else {
    return chain(integer_power<kExponent>(a.value),
                 V(elementary::constant<V>(kExponent) * integer_power<kExponent - 1>(a.value)), a);
  }
}
// a^(b - 1), from a^b where that is neither 0 nor subnormal nor infinite; mostly that is everywhere.
template <typename V>
FUSEDLOSS_INLINE V lower_power(V a, V b, V power) {
  const V smallest = elementary::constant<V>(sizeof(elementary::element(a)) == 8 ? 0x1p-1022 : 0x1p-126);
  const V magnitude = elementary::abs(power);
  const auto is_exact = (magnitude >= smallest) & (magnitude < elementary::constant<V>(INFINITY)) &
                        (elementary::abs(a) < elementary::constant<V>(INFINITY));
  const V quotient = elementary::divide(power, a);
  if (!elementary::any(not_(is_exact))) return quotient;
  return elementary::select(is_exact, quotient, elementary::pow(a, V(b - elementary::constant<V>(1))));
}
template <typename V, unsigned kA, unsigned kB>
FUSEDLOSS_INLINE auto pow(const Dual<V, kA>& a, const Dual<V, kB>& b) {
  const V zero = elementary::constant<V>(0), two = elementary::constant<V>(2);
  if constexpr (kB == 0)  // what a parameter mostly is
    if (!elementary::any(b.value != two)) return chain(V(a.value * a.value), V(two * a.value), a, zero, b);
  const V power = elementary::pow(a.value, b.value);
  V by_a = zero, by_b = zero;
  if constexpr (kA != 0)
    by_a = elementary::select(b.value == zero, zero, V(b.value * lower_power(a.value, b.value, power)));
  if constexpr (kB != 0)
    by_b = elementary::select((a.value == zero) & (b.value >= zero), zero, V(power * elementary::log(a.value)));
  return chain(power, by_a, a, by_b, b);
}

// a log(b), and 0 where a is 0 whatever b is.
template <typename V, unsigned kA, unsigned kB>
FUSEDLOSS_INLINE auto xlogy(const Dual<V, kA>& a, const Dual<V, kB>& b) {
  const V zero = elementary::constant<V>(0), log = elementary::log(b.value);
  const auto is_zero = a.value == zero;
  return chain(elementary::select(is_zero & (b.value == b.value), zero, V(a.value * log)),
               elementary::select(is_zero & (b.value <= zero), zero, log), a, elementary::divide(a.value, b.value), b);
}
