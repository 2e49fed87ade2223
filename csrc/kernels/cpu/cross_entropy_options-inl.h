// The values that all rows of a call share, and the loss of a row from the sums over its classes.
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

// The options with typed pointers, and values computed from them that are the same for all rows.
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
  A common_grad_output;  // scaled_grad_output, if it is the same for all rows

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

  // True if a row with the target class y counts, i.e. it is not ignored and the class exists. If y is a vector, the
  // result is a mask.
  template <typename Y>
  FUSEDLOSS_INLINE auto counts(Y y) const {
    return (y >= 0) & (y < o.classes) & (y != o.ignore_index);
  }
  FUSEDLOSS_INLINE bool row_counts(int64_t row) const {
    const int64_t y = o.target_index[row];
    return y != o.ignore_index && y >= 0 && y < o.classes;
  }

  // The target classes of a vector of rows, from `row` on; -1 for a row that does not count.
  FUSEDLOSS_INLINE DoubleI target_classes(int64_t row) const {
    const DoubleI y = load_indices(o.target_index + row);
    return counts(y) ? y : DoubleI{} - 1;
  }

  // The factor of a row's gradient: its grad_output, divided by total_weight for the mean.
  FUSEDLOSS_INLINE A scaled_grad_output(int64_t row) const {
    return o.grad_output_stride == 0 ? common_grad_output : scaled_grad_output_at(row);
  }
  // The same for n neighbouring rows. If each row has its own grad_output, there is no mean and thus no division.
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

// True if targets are class indices. If kSpread is false, q is known at compile time to be nonzero for one class only.
// If it is true, targets are probabilities or smoothed class indices, and q may be nonzero for all classes.
template <bool kSpread, typename T>
FUSEDLOSS_INLINE bool has_class(const TypedOptions<T>& p) {
  return !kSpread || p.o.target_index != nullptr;
}

// The loss of a row from the sums over its classes. W is a scalar, or a vector with one row in each lane. x_y, w_y: the
// logit and the weight of the target class.
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
