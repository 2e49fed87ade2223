// What every row of one call shares, and the loss of a row from the sums over its classes.
#if defined(FUSEDLOSS_CROSS_ENTROPY_OPTIONS_INL) == defined(FUSEDLOSS_ISA_TOGGLE)
#ifdef FUSEDLOSS_CROSS_ENTROPY_OPTIONS_INL
#undef FUSEDLOSS_CROSS_ENTROPY_OPTIONS_INL
#else
#define FUSEDLOSS_CROSS_ENTROPY_OPTIONS_INL
#endif

#include "kernels/cpu/cross_entropy_chunks.h"
#include "kernels/cpu/loss_values-inl.h"
#include "kernels/formulas/cross_entropy-inl.h"
#include "kernels/options.h"

FUSEDLOSS_BEGIN_NAMESPACE

// The options with typed pointers, and what follows from them for all rows.
template <typename T>
struct TypedOptions {
  using A = AccumulateType<T>;

  const CrossEntropyOptions& o;
  const T* logits;       // [outer, classes, inner]
  const T* probability;  // [outer, classes, inner]
  const A* weight;       // [classes]
  A weight_sum;
  Smoothing<A> smoothing;
  A* row_max;            // [rows]
  A* row_scale;          // [rows]
  A common_grad_output;  // what every row's gradient is multiplied by, where one value serves all

  explicit TypedOptions(const CrossEntropyOptions& options)
      : o(options),
        logits(static_cast<const T*>(options.logits)),
        probability(static_cast<const T*>(options.target_probability)),
        weight(static_cast<const A*>(options.weight)),
        weight_sum(options.weight_sum ? *static_cast<const A*>(options.weight_sum) : A(options.classes)),
        smoothing(make_smoothing<A>(options.label_smoothing, options.classes)),
        row_max(static_cast<A*>(options.row_max)),
        row_scale(static_cast<A*>(options.row_scale)),
        common_grad_output(options.grad_logits && options.grad_output_stride == 0 ? scaled_grad_output_at(0) : A(0)) {}

  FUSEDLOSS_INLINE int64_t offset(const Strides& strides, int64_t row) const {
    return o.inner == 1 ? row * strides.outer : row / o.inner * strides.outer + row % o.inner * strides.inner;
  }
  FUSEDLOSS_INLINE T* grad_of(int64_t row) const {
    return static_cast<T*>(o.grad_logits) + offset(o.grad_strides, row);
  }
  FUSEDLOSS_INLINE A weight_of(int64_t c) const { return weight ? weight[c] : A(1); }

  // Does a row with the target class y have a loss, or which rows with those of a vector do? Not if they are ignored,
  // nor if the class does not exist.
  template <typename Y>
  FUSEDLOSS_INLINE auto counts(Y y) const {
    return (y >= 0) & (y < o.classes) & (y != o.ignore_index);
  }
  FUSEDLOSS_INLINE bool row_counts(int64_t row) const {
    const int64_t y = o.target_index[row];
    return y != o.ignore_index && y >= 0 && y < o.classes;
  }

  // The target classes of as many rows as a vector of them holds; -1 for a row that does not count.
  FUSEDLOSS_INLINE DoubleI target_classes(int64_t row) const {
    const DoubleI y = load_indices(o.target_index + row);
    return counts(y) ? y : DoubleI{} - 1;
  }

  // What a row's gradient is multiplied by.
  FUSEDLOSS_INLINE A scaled_grad_output(int64_t row) const {
    return o.grad_output_stride == 0 ? common_grad_output : scaled_grad_output_at(row);
  }
  // Of neighbouring rows; where each has a grad_output of its own, nothing is divided by a total weight.
  template <bool kWhole>
  FUSEDLOSS_INLINE typename Simd<A>::V scaled_grad_outputs(int64_t row, int n) const {
    using V = typename Simd<A>::V;
    return o.grad_output_stride == 0 ? V{} + common_grad_output : read_grad_outputs<kWhole, T>(o, row, n);
  }

 private:
  FUSEDLOSS_INLINE A scaled_grad_output_at(int64_t row) const {
    const A g = read_grad_output<T>(o, row);
    return o.reduction == Reduction::kMean ? divide_by_total_weight(g, *static_cast<const A*>(o.total_weight)) : g;
  }
};

// Are targets class indices? kSpread says that their distribution is spread over all classes: probabilities, or
// smoothed class indices; else it is known at compile time that q is 0 but for one class.
template <bool kSpread, typename T>
FUSEDLOSS_INLINE bool has_class(const TypedOptions<T>& p) {
  return !kSpread || p.o.target_index != nullptr;
}

// The loss of a row from the sums over its classes, in W, a scalar or a vector of rows. x_y, w_y: the logit and the
// weight of the target class.
template <bool kSpread, typename T, typename W>
FUSEDLOSS_INLINE W row_loss(const TypedOptions<T>& p, RowState<W> state, W logsum, W x_y, W w_y) {
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

FUSEDLOSS_END_NAMESPACE

#endif  // include guard
