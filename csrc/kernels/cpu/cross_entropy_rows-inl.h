// Cross entropy for the layout "rows", where the classes of a row are contiguous. A long row is merged from several
// blocks. Short rows have one block each, and several of them are computed at once.
#if defined(FUSEDLOSS_CROSS_ENTROPY_ROWS_INL) == defined(FUSEDLOSS_ISA_TOGGLE)
#ifdef FUSEDLOSS_CROSS_ENTROPY_ROWS_INL
#undef FUSEDLOSS_CROSS_ENTROPY_ROWS_INL
#else
#define FUSEDLOSS_CROSS_ENTROPY_ROWS_INL
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels/cpu/cross_entropy_row_blocks-inl.h"
#include "kernels/integers.h"

FUSEDLOSS_BEGIN_NAMESPACE

// The type in which blocks are merged and the loss of a row is computed. It is more precise than the accumulate type; a
// row has only a few such numbers.
template <typename A>
using Wide = std::conditional_t<std::is_same_v<A, double>, long double, double>;

// ---- the end of a row

// For a row that adds nothing to the loss: its target class is ignored or does not exist.
template <typename T>
FUSEDLOSS_INLINE void skip_row(const TypedOptions<T>& p, int64_t row, ChunkResult& chunk) {
  p.row_max[row] = p.row_scale[row] = 0;
  if (p.o.target_index[row] != p.o.ignore_index && chunk.bad_row < 0) chunk.bad_row = row;
  if (p.o.reduction == Reduction::kNone) write_loss<T>(p.o, row, 0);
}

template <typename T>
FUSEDLOSS_INLINE void write_zeros(const TypedOptions<T>& p, int64_t row) {
  std::memset(p.grad_of(row), 0, size_t(p.o.classes) * sizeof(T));
}

// Stores the loss and the statistics of a row. x: [classes]; logsum: log(state.sum); inverse_sum: 1 / state.sum.
// loss_sum: the sum of the losses of a few rows, which is therefore rounded only a few times.
template <typename T, bool kSpread>
FUSEDLOSS_INLINE void finish_row(const TypedOptions<T>& p, int64_t row, const T* x,
                                 RowState<Wide<AccumulateType<T>>> state, Wide<AccumulateType<T>> logsum,
                                 AccumulateType<T> inverse_sum, double& loss_sum) {
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

// ---- the gradient from the logits, with recomputed exponentials

template <typename T, bool kSpread>
FUSEDLOSS_INLINE void write_short_row(const RowGradient<T, kSpread>& gradient, const T* x, int classes) {
  const RecomputedExponentials<T, T> exponentials = {x, shift(gradient.max), {x + classes, gradient.grad + classes}};
  write_block(gradient, 0, classes, gradient.max, exponentials);
}

template <typename T, bool kSpread>
FUSEDLOSS_NOINLINE void write_long_row(const RowGradient<T, kSpread>& gradient, const T* x, int64_t classes) {
  using A = AccumulateType<T>;
  alignas(64) A widened[std::is_same_v<T, A> ? 1 : kRowBlock<A>];
  VectorOf<T> largest;
  for (int64_t c = 0; c < classes; c += kRowBlock<A>) {
    const int n = int(std::min(kRowBlock<A>, classes - c));
    const A* block_x = max_of_block(x + c, n, widened, &largest);
    const A max = max_of_lanes<A>(largest);
    const Prefetch<T> prefetch = {x + c + n, gradient.grad + c + n};
    write_block(gradient, c, n, max, RecomputedExponentials<A, T>{block_x, shift(max), prefetch});
  }
}

// ---- the forward pass

// The distance, in elements, between the exponentials of neighbouring short rows; and how many short rows are computed
// at once, which is limited by the lanes of a vector and by kExponentialsOnStack.
template <typename T>
FUSEDLOSS_INLINE int64_t pitch_of_exponentials(int64_t classes) {
  return divide_up(classes, kLanesOf<T>) * kLanesOf<T>;
}
template <typename T>
FUSEDLOSS_INLINE int short_rows_at_once(int64_t classes) {
  const int64_t pitch = std::max<int64_t>(1, pitch_of_exponentials<T>(classes));
  return int(std::min<int64_t>(kLanesOf<T>, kExponentialsOnStack<AccumulateType<T>> / pitch));
}

// The sums over the classes of `count` short rows, one row in each lane. x: the first class of each row; exponentials:
// [count, pitch].
template <typename T, bool kSpread>
FUSEDLOSS_INLINE RowState<VectorOf<T>> sweep_short_rows(const TypedOptions<T>& p, const int64_t* rows, int count,
                                                        const T* const* x, AccumulateType<T>* exponentials, int pitch) {
  using A = AccumulateType<T>;
  using V = VectorOf<T>;
  constexpr int kLanes = kLanesOf<T>;
  const int classes = int(p.o.classes);
  const A* values[kLanes];
  V max[kLanes], sum[kLanes], dot[kLanes], mass[kLanes];
  for (int i = count; i < kLanes; ++i) max[i] = sum[i] = dot[i] = mass[i] = V{};
  for (int i = 0; i < count; ++i) values[i] = max_of_block(x[i], classes, exponentials + i * pitch, &max[i]);
  fold_each<Larger, A>(max);
  const V relative_to = shift(max[0]);
  for (int i = 0; i < count; ++i) {
    const RowCoefficients<T, kSpread> q(p, rows[i]);
    const T* next = x[i] + count * p.o.logits_strides.outer;
    const Prefetch<T> prefetch = {next, p.o.grad_logits == nullptr ? next : p.grad_of(rows[i])};
    const RowState<V> s = sweep_block(values[i], q, 0, classes, relative_to[i], exponentials + i * pitch, prefetch);
    sum[i] = s.sum;
    dot[i] = s.dot;
    mass[i] = s.mass;
  }
  fold_each<Add, A>(sum);
  if constexpr (!kSpread) return {max[0], sum[0], V{}, V{}};
  fold_each<Add, A>(dot);
  fold_each<Add, A>(mass);
  return {max[0], sum[0], dot[0], mass[0]};
}

// Up to kLanes short rows. The steps after the sums are computed for all of them at once: for a single very short row,
// they would take longer than its sums.
template <typename T, bool kSpread>
FUSEDLOSS_INLINE void forward_short_rows(const TypedOptions<T>& p, const int64_t* rows, int count, ChunkResult& chunk) {
  using A = AccumulateType<T>;
  using V = VectorOf<T>;
  const int pitch = int(pitch_of_exponentials<T>(p.o.classes));
  alignas(64) A exponentials[kExponentialsOnStack<A>];
  const T* x[kLanesOf<T>];
  for (int i = 0; i < count; ++i) x[i] = p.logits + p.offset(p.o.logits_strides, rows[i]);
  const RowState<V> state = sweep_short_rows<T, kSpread>(p, rows, count, x, exponentials, pitch);
  const V logsum = math::log_of_normal(state.sum), inverse_sum = 1 / state.sum;
  double loss = 0;
  for (int i = 0; i < count; ++i) {
    const RowState<Wide<A>> row = {state.max[i], state.sum[i], state.dot[i], state.mass[i]};
    finish_row<T, kSpread>(p, rows[i], x[i], row, logsum[i], inverse_sum[i], loss);
  }
  add(chunk.loss, loss);
  if (p.o.grad_logits == nullptr) return;
  for (int i = 0; i < count; ++i) {
    const RowCoefficients<T, kSpread> q(p, rows[i]);
    const RowGradient<T, kSpread> gradient(p, rows[i], q);
    write_block(gradient, 0, int(p.o.classes), gradient.max, KeptExponentials<A>{exponentials + i * pitch});
  }
}

// Memory in which the exponentials of a longer row are kept until its gradient overwrites them, or null if there is
// none. It is the memory of that gradient. If the gradient has 16-bit elements, it is also that of the next row's
// gradient, which must belong to the same caller and be written later.
template <typename T>
FUSEDLOSS_INLINE AccumulateType<T>* exponentials_in_gradient(const TypedOptions<T>& p, int64_t row, int64_t end_row) {
  using A = AccumulateType<T>;
  if (p.o.grad_logits == nullptr || p.o.classes > kExponentialsInGradient<A>) return nullptr;
  if constexpr (!std::is_same_v<T, A>) {
    static_assert(sizeof(A) == 2 * sizeof(T));
    if (row + 1 >= end_row || p.grad_of(row + 1) - p.grad_of(row) != p.o.classes) return nullptr;
  }
  return reinterpret_cast<A*>(p.grad_of(row));
}

// exponentials: [classes], where they are kept, or null.
template <typename T, bool kSpread>
FUSEDLOSS_INLINE void forward_long_row(const TypedOptions<T>& p, int64_t row, AccumulateType<T>* exponentials,
                                       ChunkResult& chunk) {
  using A = AccumulateType<T>;
  const bool keeps = exponentials != nullptr;
  const T* x = p.logits + p.offset(p.o.logits_strides, row);
  const RowCoefficients<T, kSpread> q(p, row);
  alignas(64) A widened[std::is_same_v<T, A> ? 1 : kRowBlock<A>];
  A block_max[kExponentialsInGradient<A> / kRowBlock<A>];  // where exponentials are kept
  VectorOf<T> largest;
  auto state = empty_row_state<Wide<A>>();
  for (int64_t c = 0; c < p.o.classes; c += kRowBlock<A>) {
    const int n = int(std::min(kRowBlock<A>, p.o.classes - c));
    const A* block_x = max_of_block(x + c, n, widened, &largest);
    const A max = max_of_lanes<A>(largest);
    if (keeps) block_max[c / kRowBlock<A>] = max;
    const Prefetch<T> prefetch = {x + c + n, x + c};  // the stores of exponentials need no prefetch
    const auto s = sweep_block(block_x, q, c, n, shift(max), keeps ? exponentials + c : nullptr, prefetch);
    RowState<Wide<A>> block = {max, sum_of_lanes<A>(s.sum), 0, 0};
    if constexpr (kSpread) {
      block.dot = sum_of_lanes<A>(s.dot);
      block.mass = sum_of_lanes<A>(s.mass);
    }
    state = merge(state, block);
  }
  double loss = 0;
  finish_row<T, kSpread>(p, row, x, state, std::log(state.sum), A(1 / state.sum), loss);
  add(chunk.loss, loss);
  if (p.o.grad_logits == nullptr) return;
  const RowGradient<T, kSpread> gradient(p, row, q);
  if (!keeps) return write_long_row(gradient, x, p.o.classes);
  for (int64_t c = 0; c < p.o.classes; c += kRowBlock<A>)
    write_block(gradient, c, int(std::min(kRowBlock<A>, p.o.classes - c)), block_max[c / kRowBlock<A>],
                KeptExponentials<A>{exponentials + c});
}

// Rows [range.begin, range.end). The caller then continues with the rows up to end_row.
template <typename T, bool kSpread>
void forward_rows(const TypedOptions<T>& p, ChunkRange range, int64_t end_row, ChunkResult& chunk) {
  const bool is_short = is_short_row<T>(p.o.classes);
  const int at_once = is_short ? short_rows_at_once<T>(p.o.classes) : 1;
  int64_t rows[kLanesOf<T>];
  int count = 0;
  for (int64_t row = range.begin; row < range.end; ++row) {
    if (has_class<kSpread>(p) && !p.row_counts(row)) {
      skip_row(p, row, chunk);
      if (p.o.grad_logits != nullptr) write_zeros(p, row);
    } else if (is_short) {
      rows[count++] = row;
    } else {
      forward_long_row<T, kSpread>(p, row, exponentials_in_gradient(p, row, end_row), chunk);
    }
    if (count == at_once || (count > 0 && row + 1 == range.end)) {
      forward_short_rows<T, kSpread>(p, rows, count, chunk);
      count = 0;
    }
  }
}

// ---- the backward pass

template <typename T, bool kSpread>
void backward_rows(const TypedOptions<T>& p, ChunkRange range) {
  for (int64_t row = range.begin; row < range.end; ++row) {
    if (has_class<kSpread>(p) && !p.row_counts(row)) {
      write_zeros(p, row);
      continue;
    }
    const RowCoefficients<T, kSpread> q(p, row);
    const T* x = p.logits + p.offset(p.o.logits_strides, row);
    const RowGradient<T, kSpread> gradient(p, row, q);
    if (is_short_row<T>(p.o.classes)) {
      write_short_row(gradient, x, int(p.o.classes));
    } else {
      write_long_row(gradient, x, p.o.classes);
    }
  }
}

FUSEDLOSS_END_NAMESPACE

#endif  // include guard
