// What every row of one call shares, typed, and the end of a row: statistics in, loss out.
#if defined(FUSEDLOSS_CROSS_ENTROPY_PROBLEM_INL) == defined(FUSEDLOSS_ISA_TOGGLE)
#ifdef FUSEDLOSS_CROSS_ENTROPY_PROBLEM_INL
#undef FUSEDLOSS_CROSS_ENTROPY_PROBLEM_INL
#else
#define FUSEDLOSS_CROSS_ENTROPY_PROBLEM_INL
#endif

#include <type_traits>

#include "kernels/cpu/cross_entropy_chunks.h"
#include "kernels/cpu/loss_values-inl.h"
#include "kernels/formulas/cross_entropy-inl.h"
#include "kernels/options.h"

FUSEDLOSS_BEGIN_NAMESPACE

// What a row's sums are joined and its loss computed in: more than the accumulate type, for a few numbers a row.
template <typename A>
using Wide = std::conditional_t<std::is_same_v<A, double>, long double, double>;

template <typename T>
struct Problem {
  using A = AccumulateType<T>;

  const CrossEntropyOptions& o;
  const T* logits;       // [outer, classes, inner]
  const T* probability;  // [outer, classes, inner]
  const A* weight;       // [classes]
  A weight_sum;
  Smoothing<A> smoothing;
  A* row_max;      // [rows]
  A* row_scale;    // [rows]
  A one_upstream;  // what every row's gradient is multiplied by, where one value serves all

  explicit Problem(const CrossEntropyOptions& options)
      : o(options),
        logits(static_cast<const T*>(options.logits)),
        probability(static_cast<const T*>(options.target_probability)),
        weight(static_cast<const A*>(options.weight)),
        weight_sum(options.weight_sum ? *static_cast<const A*>(options.weight_sum) : A(options.classes)),
        smoothing(make_smoothing<A>(options.label_smoothing, options.classes)),
        row_max(static_cast<A*>(options.row_max)),
        row_scale(static_cast<A*>(options.row_scale)),
        one_upstream(options.grad_logits && options.grad_output_stride == 0 ? upstream_of(0) : A(0)) {}

  FUSEDLOSS_INLINE int64_t offset(const Strides& strides, int64_t row) const {
    return o.inner == 1 ? row * strides.outer : row / o.inner * strides.outer + row % o.inner * strides.inner;
  }
  FUSEDLOSS_INLINE T* grad_of(int64_t row) const {
    return static_cast<T*>(o.grad_logits) + offset(o.grad_strides, row);
  }
  FUSEDLOSS_INLINE A weight_of(int64_t c) const { return weight ? weight[c] : A(1); }
  FUSEDLOSS_INLINE bool in_range(int64_t target) const { return target >= 0 && target < o.classes; }

  // Has the row a target class? Not if it is ignored, nor if its class does not exist.
  FUSEDLOSS_INLINE bool counts(int64_t row) const {
    const int64_t y = o.target_index[row];
    return y != o.ignore_index && in_range(y);
  }

  // The target classes of as many rows as a vector of them holds; -1 for a row that does not count.
  FUSEDLOSS_INLINE DoubleI classes_of(int64_t row) const {
    DoubleI y;
    __builtin_memcpy(&y, o.target_index + row, sizeof y);
    return (y >= 0) & (y < o.classes) & (y != o.ignore_index) ? y : DoubleI{} - 1;
  }

  // What a row's gradient is multiplied by.
  FUSEDLOSS_INLINE A upstream(int64_t row) const {
    return o.grad_output_stride == 0 ? one_upstream : upstream_of(row * o.grad_output_stride);
  }
  // Of neighbouring rows; where each has a grad_output of its own, nothing is divided by a total weight.
  template <bool kWhole>
  FUSEDLOSS_INLINE typename Simd<A>::V upstreams(int64_t row, int n) const {
    using V = typename Simd<A>::V;
    return o.grad_output_stride == 0 ? V{} + one_upstream : read_grad_outputs<kWhole, T>(o, row, n);
  }

 private:
  FUSEDLOSS_INLINE A upstream_of(int64_t i) const {
    const A g = read_grad_output<T>(o, i);
    return o.reduction == Reduction::kMean ? divide_by_total_weight(g, *static_cast<const A*>(o.total_weight)) : g;
  }
};

// Are targets class indices? kSpread says that their distribution is spread over all classes: probabilities, or smoothed
// class indices; else it is known at compile time that q is 0 but for one class.
template <bool kSpread, typename T>
FUSEDLOSS_INLINE bool has_class(const Problem<T>& p) {
  return !kSpread || p.o.target_index != nullptr;
}

// A row that adds nothing: its target is ignored or does not exist.
template <typename T>
FUSEDLOSS_INLINE void skip_row(const Problem<T>& p, int64_t row, ChunkResult& chunk) {
  p.row_max[row] = p.row_scale[row] = 0;
  if (p.o.target_index[row] != p.o.ignore_index && chunk.bad_row < 0) chunk.bad_row = row;
  if (p.o.reduction == Reduction::kNone) write_loss<T>(p.o, row, 0);
}

// The loss of a row from the sums over its classes, in W, a scalar or a vector of rows. x_y, w_y: the logit and the
// weight of the target class.
template <bool kSpread, typename T, typename W>
FUSEDLOSS_INLINE W row_loss(const Problem<T>& p, RowState<W> state, W logsum, W x_y, W w_y) {
  W loss = W{};
  if constexpr (kSpread) loss = expected_negative_log_likelihood(state, logsum);
  if (has_class<kSpread>(p)) {
    if constexpr (kSpread) {
      loss *= (W{} + p.o.label_smoothing) / (W{} + double(p.o.classes));
      w_y *= W{} + double(p.smoothing.kept);
    }
    loss += w_y * negative_log_likelihood(x_y, state.max, logsum);
  }
  return loss;
}

// x: the row's first class, its classes side by side. logsum: log(state.sum); inverse_sum: its inverse. loss_sum: of a
// few rows, so that it rounds a few times.
template <typename T, bool kSpread>
FUSEDLOSS_INLINE void finish_row(const Problem<T>& p, int64_t row, const T* x, RowState<Wide<AccumulateType<T>>> state,
                                 Wide<AccumulateType<T>> logsum, AccumulateType<T> inverse_sum, double& loss_sum) {
  using A = AccumulateType<T>;
  using W = Wide<A>;
  W x_y = 0, w_y = 0;
  A mass = A(state.mass);
  if (has_class<kSpread>(p)) {
    const int64_t y = p.o.target_index[row];
    x_y = load_one(x + y);
    w_y = p.weight_of(y);
    mass = index_mass(p.weight_of(y), p.weight_sum, p.smoothing);
  }
  const W loss = row_loss<kSpread>(p, state, logsum, x_y, w_y);
  p.row_max[row] = A(state.max);
  p.row_scale[row] = prevent_contraction(mass * inverse_sum);
  if (p.o.reduction == Reduction::kNone) write_loss<T>(p.o, row, A(loss));
  loss_sum += double(loss);
}

FUSEDLOSS_END_NAMESPACE

#endif  // include guard
