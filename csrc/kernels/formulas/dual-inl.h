// Dual numbers: a value and its derivatives by a loss's operands. A formula is written once and gives both.
//
// Dual<V, kWrt> carries the derivatives by the operands whose bits are set in kWrt. The result of an operation carries
// the derivatives of all its arguments. A value that does not depend on an operand therefore has no derivative by it,
// rather than a derivative of 0: this costs nothing, and it avoids 0 times an infinite slope, which would be NaN where
// torch has none. V is a scalar, or a vector with a separate element in each lane. A condition is the result of
// comparing two V; conditions are combined with & and |.
#if defined(FUSEDLOSS_DUAL_INL) == defined(FUSEDLOSS_ISA_TOGGLE)
#ifdef FUSEDLOSS_DUAL_INL
#undef FUSEDLOSS_DUAL_INL
#else
#define FUSEDLOSS_DUAL_INL
#endif

#include <type_traits>
#include <utility>

#include "kernels/device_math-inl.h"

FUSEDLOSS_BEGIN_NAMESPACE

FUSEDLOSS_INLINE constexpr int count_bits(unsigned bits) {
  return bits == 0 ? 0 : int(bits & 1) + count_bits(bits >> 1);
}

// The place of bit `i` among the set bits of `bits`.
FUSEDLOSS_INLINE constexpr int place_of(unsigned bits, int i) { return count_bits(bits & ((1u << i) - 1)); }

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
  return {math::constant<V>(value)};
}

// Operand number kOperand, with its derivative by itself if its bit is set in kWrt.
template <int kOperand, unsigned kWrt, typename V>
FUSEDLOSS_INLINE auto operand(V value) {
  constexpr unsigned kOwn = kWrt & (1u << kOperand);
  if constexpr (kOwn != 0) {
    return Dual<V, kOwn>{value, {math::constant<V>(1)}};
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
    return math::constant<V>(0);
  }
}

// ---- the chain rule: by_a is the slope of `value` with respect to a (and by_b, with respect to b)

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

// For derivatives that are written by hand: `plain` drops the derivatives of a; `with_slope` adds to those of a the
// derivatives that come from a slope with respect to b.
template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, 0> plain(const Dual<V, kA>& a) {
  return {a.value};
}
template <typename V, unsigned kA, unsigned kSlope, unsigned kB>
FUSEDLOSS_INLINE auto with_slope(const Dual<V, kA>& a, const Dual<V, kSlope>& slope, const Dual<V, kB>& b) {
  return chain(a.value, math::constant<V>(1), a, slope.value, b);
}

// An element's gradient, from the slope of its loss, or from half of the slope if the formula F has kHasHalfSlope.
template <typename F, typename = void>
struct HasHalfSlope : std::false_type {};
template <typename F>
struct HasHalfSlope<F, std::enable_if_t<F::kHasHalfSlope>> : std::true_type {};

template <typename F, typename V>
FUSEDLOSS_INLINE V gradient(V grad_output, V slope) {
  const V product = grad_output * slope;
  return HasHalfSlope<F>::value ? V(product + product) : product;
}

// ---- arithmetic and comparisons of dual numbers, and of a dual number with a double

template <typename V, unsigned kA>
FUSEDLOSS_INLINE Dual<V, kA> operator-(const Dual<V, kA>& a) {
  return chain(V(-a.value), math::constant<V>(-1), a);
}
template <typename V, unsigned kA, unsigned kB>
FUSEDLOSS_INLINE auto operator+(const Dual<V, kA>& a, const Dual<V, kB>& b) {
  return chain(V(a.value + b.value), math::constant<V>(1), a, math::constant<V>(1), b);
}
template <typename V, unsigned kA, unsigned kB>
FUSEDLOSS_INLINE auto operator-(const Dual<V, kA>& a, const Dual<V, kB>& b) {
  return chain(V(a.value - b.value), math::constant<V>(1), a, math::constant<V>(-1), b);
}
template <typename V, unsigned kA, unsigned kB>
FUSEDLOSS_INLINE auto operator*(const Dual<V, kA>& a, const Dual<V, kB>& b) {
  return chain(V(a.value * b.value), b.value, a, a.value, b);
}
template <typename V, unsigned kA, unsigned kB>
FUSEDLOSS_INLINE auto operator/(const Dual<V, kA>& a, const Dual<V, kB>& b) {
  const V quotient = math::divide(a.value, b.value);
  return chain(quotient, math::inverse(b.value), a, V(-math::divide(quotient, b.value)), b);
}

#define FUSEDLOSS_COMPARISON(op)                                                  \
  template <typename V, unsigned kA, unsigned kB>                                 \
  FUSEDLOSS_INLINE auto operator op(const Dual<V, kA>& a, const Dual<V, kB>& b) { \
    return a.value op b.value;                                                    \
  }
#define FUSEDLOSS_WITH_NUMBERS(op)                                    \
  template <typename V, unsigned kA>                                  \
  FUSEDLOSS_INLINE auto operator op(const Dual<V, kA>& a, double b) { \
    return a op constant<V>(b);                                       \
  }                                                                   \
  template <typename V, unsigned kB>                                  \
  FUSEDLOSS_INLINE auto operator op(double a, const Dual<V, kB>& b) { \
    return constant<V>(a) op b;                                       \
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
  return a.value != math::constant<V>(0);
}

// ---- choices

template <typename M>
FUSEDLOSS_INLINE auto not_(M condition) {
  return condition == M{};
}

template <typename M, typename V, unsigned kA, unsigned kB, int... kPlace>
FUSEDLOSS_INLINE Dual<V, kA | kB> where_at(M condition, const Dual<V, kA>& a, const Dual<V, kB>& b,
                                           std::integer_sequence<int, kPlace...>) {
  return {math::select(condition, a.value, b.value),
          {math::select(condition, partial_by<bit_at(kA | kB, kPlace)>(a), partial_by<bit_at(kA | kB, kPlace)>(b))...}};
}
template <typename M, typename V, unsigned kA, unsigned kB>
FUSEDLOSS_INLINE Dual<V, kA | kB> where(M condition, const Dual<V, kA>& a, const Dual<V, kB>& b) {
  if constexpr ((kA | kB) == 0) {
    return {math::select(condition, a.value, b.value)};
  } else {
    return where_at(condition, a, b, std::make_integer_sequence<int, count_bits(kA | kB)>{});
  }
}

FUSEDLOSS_END_NAMESPACE

#endif  // include guard
