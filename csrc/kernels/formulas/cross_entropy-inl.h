// The formulas of cross entropy, on scalars or vectors, for both devices.
//
// With logits x, m = max(x), sum = sum(exp(x - m)), logsum = log(sum), softmax p = exp(x - m) / sum, and a target
// distribution q over the classes, which includes weights and smoothing:
//
//   loss       = sum_c q_c * (logsum - (x_c - m)) = mass * logsum - dot
//   d loss/dx_c = mass * p_c - q_c                   where mass = sum(q), dot = sum(q * (x - m))
//
// With weights w and smoothing e, a class-index target y has q_c = (1 - e) w_y [c = y] + (e / C) w_c, and class
// probabilities t have q_c = w_c ((1 - e) t_c + e / C).
//
// m and sum are kept separate, because m + logsum in float32 would lose three digits for logits of 1e4.
#if defined(FUSEDLOSS_CROSS_ENTROPY_INL) == defined(FUSEDLOSS_ISA_TOGGLE)
#ifdef FUSEDLOSS_CROSS_ENTROPY_INL
#undef FUSEDLOSS_CROSS_ENTROPY_INL
#else
#define FUSEDLOSS_CROSS_ENTROPY_INL
#endif

#include <cmath>
#include <cstdint>

#include "kernels/device_math-inl.h"

FUSEDLOSS_BEGIN_NAMESPACE

// Statistics of some of a row's classes. `dot` and `mass` are used only if q may be nonzero for several classes. V is a
// scalar, or a vector with a separate row in each lane, so conditions are masks and are combined with |.
template <typename V>
struct RowState {
  V max;   // -inf before the first class, or if all classes are -inf
  V sum;   // sum(exp(x - shift(max)))
  V dot;   // sum(q * (x - shift(max)))
  V mass;  // sum(q)
};

template <typename V>
FUSEDLOSS_INLINE RowState<V> empty_row_state() {
  return {V{} - INFINITY, V{}, V{}, V{}};
}

// The value that is subtracted before exp: the maximum, or 0 if all classes so far are -inf, because -inf - -inf is
// NaN.
template <typename V>
FUSEDLOSS_INLINE V shift(V max) {
  return max == V{} - INFINITY ? V{} : max;
}

// Adds a class to the sums: distance = x - shift(max), e = exp(distance).
template <bool kSpread, typename V>
FUSEDLOSS_INLINE void add_class(RowState<V>& s, V distance, V e, V q) {
  s.sum += e;
  if constexpr (kSpread) {
    s.dot += q * distance;
    s.mass += q;
  }
}

// The same sums relative to a maximum that is at least as large.
template <typename V>
FUSEDLOSS_INLINE RowState<V> rescale(RowState<V> s, V max) {
  // If the maximum is -inf, the sum is 0 (or NaN, if a class is NaN) and needs no factor.
  const V factor = ((s.max == V{} - INFINITY) | (s.max == max)) ? V{} + 1 : math::exp_nonpositive(s.max - max);
  // Both conditions avoid 0 * inf, which is NaN: a mass of 0 times an infinite shift, and an infinite mass times a
  // shift of 0.
  const V moved = ((s.mass == V{}) | (s.max == max)) ? V{} : s.mass * (shift(s.max) - shift(max));
  return {max, s.sum * factor, s.dot + moved, s.mass};
}

template <typename V>
FUSEDLOSS_INLINE RowState<V> merge(RowState<V> a, RowState<V> b) {
  const V max = a.max > b.max ? a.max : b.max;
  a = rescale(a, max);
  b = rescale(b, max);
  return {max, a.sum + b.sum, a.dot + b.dot, a.mass + b.mass};
}

// Label smoothing, the same for all rows of a call.
template <typename A>
struct Smoothing {
  A kept;     // 1 - e: the factor of the original target
  A uniform;  // e / C: the part that is added to every class
};

template <typename A>
FUSEDLOSS_INLINE Smoothing<A> make_smoothing(double label_smoothing, int64_t classes) {
  return {A(1.0 - label_smoothing), A(label_smoothing / double(classes))};
}

// -log p_y for the class with logit x.
template <typename A>
FUSEDLOSS_INLINE A negative_log_likelihood(A x, A max, A logsum) {
  return logsum - (x - max);
}

// sum_c q_c (-log p_c) from the statistics of all classes. With an infinite weight the result is usually infinite, but
// the difference is NaN in two cases. If the weight's class has the maximum, dot is inf * 0, and -log p is logsum. If
// logsum is 0, mass * logsum is inf * 0, and the result is infinite only if that class is below the maximum: dot is
// then -mass.
template <typename V>
FUSEDLOSS_INLINE V expected_negative_log_likelihood(RowState<V> s, V logsum) {
  const auto is_infinite =
      ((s.mass == V{} + INFINITY) | (s.mass == V{} - INFINITY)) & ((logsum > V{}) | (s.dot == -s.mass));
  return is_infinite ? s.mass : s.mass * logsum - s.dot;
}

// q_c of a probability target; V is a scalar or a vector of A.
template <typename V, typename A>
FUSEDLOSS_INLINE V probability_coefficient(V t, V w, Smoothing<A> s) {
  return w * (s.kept * t + s.uniform);
}

// q of the target class of a class-index target, whose weight is w_y.
template <typename A>
FUSEDLOSS_INLINE A index_coefficient(A w_y, Smoothing<A> s) {
  return math::rounded_product(s.kept, w_y) + math::rounded_product(s.uniform, w_y);
}

// sum(q) of a class-index target.
template <typename A>
FUSEDLOSS_INLINE A index_mass(A w_y, A weight_sum, Smoothing<A> s) {
  return math::rounded_product(s.kept, w_y) + math::rounded_product(s.uniform, weight_sum);
}

// grad_output * d loss/dx_c, with e = exp(x_c - m) and scale = mass / sum.
template <typename V, typename A>
FUSEDLOSS_INLINE V logit_gradient(V e, A scale, V q, A grad_output) {
  return (e * scale - q) * grad_output;
}

// Divides a sum of losses, or a grad_output, for the mean. A total weight of 0 gives NaN, never infinity, as in torch:
// torch divides the target classes' part of the loss separately, and that part is 0 if no target class has a weight.
template <typename A>
FUSEDLOSS_INLINE A divide_by_total_weight(A value, A total_weight) {
  return total_weight == A(0) ? A(NAN) : value / total_weight;
}

FUSEDLOSS_END_NAMESPACE

#endif  // include guard
