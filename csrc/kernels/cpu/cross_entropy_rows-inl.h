// Cross entropy where a row's classes lie side by side: a vector holds neighbouring classes of one row.
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

#include "kernels/cpu/cross_entropy_problem-inl.h"
#include "kernels/cpu/reduce_lanes-inl.h"

FUSEDLOSS_BEGIN_NAMESPACE

// Classes that are swept twice, for the maximum and for the sums, while L1 still holds them: memory is read once. Their
// exponentials are taken relative to the block's own maximum, in both passes, so that both have the same ones. Doubles
// fill L1 sooner.
template <typename A>
constexpr int64_t kRowBlock = std::is_same_v<A, double> ? 512 : 2048;
// Exponentials that the forward pass keeps for the gradient, where it writes that too, to spare the second exp. Those of
// short rows, of one block each, lie on the stack: half of L1, the rest is for the logits.
template <typename A>
constexpr int64_t kKeptOnStack = 16384 / sizeof(A);
// Those of a longer row lie where its gradient will be, as long as L2 holds them.
template <typename A>
constexpr int64_t kKeptInGradient = 524288 / sizeof(A);
// Independent accumulators, to hide the latency of an addition and of exp.
constexpr int kUnroll = 4;

template <typename T>
FUSEDLOSS_INLINE bool is_short_row(int64_t classes) {
  return classes <= kRowBlock<AccumulateType<T>>;
}

// q of neighbouring classes, without the target class's own part; of a smoothed target in units of smoothing.uniform, in
// which the sums of equal weights are exact.
template <typename T, bool kSpread>
struct RowCoefficients {
  using A = AccumulateType<T>;
  using V = typename Simd<A>::V;

  const T* probability;  // [classes] of this row; null for class indices
  const A* weight;       // [classes]
  Smoothing<A> smoothing;

  RowCoefficients(const Problem<T>& p, int64_t row)
      : probability(has_class<kSpread>(p) ? nullptr : p.probability + p.offset(p.o.target_strides, row)),
        weight(p.weight),
        smoothing(p.smoothing) {}

  // Lanes n and up are 0.
  template <bool kWhole>
  FUSEDLOSS_INLINE V at(int64_t c, int n) const {
    V q = V{};
    if constexpr (kSpread) {
      const V w = weight ? load_lanes<kWhole>(weight + c, n) : V{} + 1;
      if (probability == nullptr) {
        q = w;
      } else {
        q = prevent_contraction(probability_coefficient(load_lanes<kWhole>(probability + c, n), w, smoothing));
      }
      if constexpr (!kWhole) q = lanes_from(n, A{}) ? V{} : q;
    }
    return q;
  }
};

template <bool kWhole, typename T>
FUSEDLOSS_INLINE typename Simd<AccumulateType<T>>::V read_classes(const T* x, int n, AccumulateType<T>* room) {
  const auto v = load_lanes<kWhole>(x, n);
  if constexpr (!std::is_same_v<T, AccumulateType<T>>) store_lanes<kWhole>(room, v, n);
  return v;
}

// Writes the largest of every kLanes-th of n classes to max, of lanes without a class -inf. Returns the classes in the
// accumulate type: x itself, or room ([n]), where they are widened for all that comes after.
template <typename T>
FUSEDLOSS_NOINLINE const AccumulateType<T>* read_block(const T* x, int n, AccumulateType<T>* room,
                                                  typename Simd<AccumulateType<T>>::V* max) {
  using A = AccumulateType<T>;
  using V = typename Simd<A>::V;
  constexpr int kLanes = kLanesOf<T>;
  V best[kUnroll];
  FUSEDLOSS_UNROLL for (int k = 0; k < kUnroll; ++k) best[k] = V{} - INFINITY;
  int c = 0;
  for (; c + kUnroll * kLanes <= n; c += kUnroll * kLanes) {
    FUSEDLOSS_UNROLL for (int k = 0; k < kUnroll; ++k)
        best[k] = Larger::of(read_classes<true>(x + c + k * kLanes, kLanes, room + c + k * kLanes), best[k]);
  }
  for (; c + kLanes <= n; c += kLanes) best[0] = Larger::of(read_classes<true>(x + c, kLanes, room + c), best[0]);
  if (c < n) {
    const V rest = read_classes<false>(x + c, n - c, room + c);
    best[0] = Larger::of(lanes_from(n - c, A{}) ? V{} - INFINITY : rest, best[0]);
  }
  FUSEDLOSS_UNROLL for (int k = 1; k < kUnroll; ++k) best[0] = Larger::of(best[k], best[0]);
  *max = best[0];
  if constexpr (std::is_same_v<T, A>) {
    return x;
  } else {
    return room;
  }
}

template <bool kWhole, typename T, bool kSpread>
FUSEDLOSS_INLINE void add_classes(RowState<typename Simd<AccumulateType<T>>::V>& s, const AccumulateType<T>* x,
                                  const RowCoefficients<T, kSpread>& q, int64_t c, int n, AccumulateType<T> relative_to,
                                  AccumulateType<T>* kept) {
  using A = AccumulateType<T>;
  using V = typename Simd<A>::V;
  const V d = load_lanes<kWhole>(x, n) - relative_to;
  V e = math::exp_nonpositive(d);
  if constexpr (!kWhole) e = lanes_from(n, A{}) ? V{} : e;
  if (kept != nullptr) store_lanes<kWhole>(kept, e, n);
  s.sum += e;
  if constexpr (kSpread) {
    const V q_c = q.template at<kWhole>(c, n);
    s.dot += q_c * d;
    s.mass += q_c;
  }
}

// Where memory is read, and written, soon after a sweep: it is asked for while the arithmetic goes on.
template <typename T>
struct Ahead {
  const T *read, *write;

  FUSEDLOSS_INLINE void prefetch(int begin, int count) const {
    constexpr int kCacheLine = 64 / sizeof(T);
    FUSEDLOSS_UNROLL for (int i = begin; i < begin + count; i += kCacheLine) {
      __builtin_prefetch(read + i);
      __builtin_prefetch(write + i, /*to write=*/1);
    }
  }
};

// The sums over classes [begin, begin + n), of every kLanes-th one; without their maximum. x: [n]; kept: [n], where the
// exponentials are to be kept, or null; it may be x.
template <typename T, bool kSpread>
FUSEDLOSS_INLINE RowState<typename Simd<AccumulateType<T>>::V> sweep_block(const AccumulateType<T>* x,
                                                                      const RowCoefficients<T, kSpread>& q,
                                                                      int64_t begin, int n, AccumulateType<T> relative_to,
                                                                      AccumulateType<T>* kept, Ahead<T> ahead) {
  using V = typename Simd<AccumulateType<T>>::V;
  constexpr int kLanes = kLanesOf<T>;
  RowState<V> s[kUnroll];
  FUSEDLOSS_UNROLL for (int k = 0; k < kUnroll; ++k) s[k] = empty_row_state<V>();
  const auto add = [&](RowState<V>& state, int i) __attribute__((always_inline)) {
    add_classes<true>(state, x + i, q, begin + i, kLanes, relative_to, kept == nullptr ? kept : kept + i);
  };
  int i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
    ahead.prefetch(i, kUnroll * kLanes);
    FUSEDLOSS_UNROLL for (int k = 0; k < kUnroll; ++k) add(s[k], i + k * kLanes);
  }
  ahead.prefetch(i, n - i);
  for (; i + kLanes <= n; i += kLanes) add(s[0], i);
  if (i < n) add_classes<false>(s[0], x + i, q, begin + i, n - i, relative_to, kept == nullptr ? kept : kept + i);
  FUSEDLOSS_UNROLL for (int k = 1; k < kUnroll; ++k) {
    s[0].sum += s[k].sum;
    s[0].dot += s[k].dot;
    s[0].mass += s[k].mass;
  }
  return s[0];
}

// ---- the gradient of a row, from its exponentials

template <typename T, bool kSpread>
struct RowGradient {
  using A = AccumulateType<T>;
  using V = typename Simd<A>::V;

  const RowCoefficients<T, kSpread>& q;
  T* grad;         // [classes]
  A max;           // of the row
  A scale;         // sum(q) / sum(exp(x - max))
  A g;             // grad_output
  A unit = 1;      // of q: smoothing.uniform for a smoothed target
  int64_t y = -1;  // the target class
  A q_y = 0;       // what q has at y above the others

  // The row's statistics are known.
  RowGradient(const Problem<T>& p, int64_t row, const RowCoefficients<T, kSpread>& coefficients)
      : q(coefficients),
        grad(p.grad_of(row)),
        max(p.row_max[row]),
        scale(p.row_scale[row]),
        g(p.upstream(row)) {
    if (has_class<kSpread>(p)) {
      y = p.o.target_index[row];
      q_y = math::rounded_product(p.smoothing.kept, p.weight_of(y));
      unit = p.smoothing.uniform;
    }
  }

  // scale for exponentials relative to the maximum of a block.
  FUSEDLOSS_INLINE A scale_of_block(A block_max) const {
    return block_max == max ? scale : scale * math::exp_nonpositive(block_max - max);
  }

  // Of classes [c, c + n), all as if none were the target class.
  template <bool kWhole>
  FUSEDLOSS_INLINE void write(int64_t c, int n, V e, A scale_of_e) const {
    if constexpr (kSpread) {
      e = logit_gradient(e, scale_of_e, prevent_contraction(q.template at<kWhole>(c, n) * unit), g);
    } else {
      e *= scale_of_e * g;
    }
    store_lanes<kWhole>(grad + c, e, n);
  }

  // Of the target class.
  FUSEDLOSS_INLINE void write_target(A e, A scale_of_e) const {
    A q_c = q_y;
    if constexpr (kSpread) q_c += prevent_contraction((q.weight ? q.weight[y] : A(1)) * unit);
    store_one(grad + y, logit_gradient(e, scale_of_e, q_c, g));
  }
};

// Exponentials of a block that were kept; they may lie where the gradient will.
template <typename A>
struct Kept {
  const A* e;  // [n]

  template <bool kWhole>
  FUSEDLOSS_INLINE typename Simd<A>::V at(int i, int n) const {
    return load_lanes<kWhole>(e + i, n);
  }
  FUSEDLOSS_INLINE A one(int i) const { return e[i]; }
};

// Exponentials of a block that are computed anew. x: [n], of T or of the accumulate type; the gradient may be written
// over it.
template <typename X, typename T>
struct Anew {
  using A = AccumulateType<X>;
  using V = typename Simd<A>::V;

  const X* x;
  A relative_to;
  Ahead<T> ahead;

  template <bool kWhole>
  FUSEDLOSS_INLINE V at(int i, int n) const {
    ahead.prefetch(i, n);
    return math::exp_nonpositive(load_lanes<kWhole>(x + i, n) - relative_to);
  }
  FUSEDLOSS_INLINE A one(int i) const { return math::exp_nonpositive(V{} + load_one(x + i) - relative_to)[0]; }
};

// Of classes [begin, begin + n), from their exponentials.
template <typename T, bool kSpread, typename Exponentials>
FUSEDLOSS_INLINE void write_block(const RowGradient<T, kSpread>& gradient, int64_t begin, int n, AccumulateType<T> block_max,
                                  const Exponentials& e) {
  constexpr int kLanes = kLanesOf<T>;
  const auto scale = gradient.scale_of_block(block_max);
  // The target class is put right afterwards: looking out for it costs more.
  const int64_t y = gradient.y - begin;
  const bool has_target = uint64_t(y) < uint64_t(n);
  const auto e_y = has_target ? e.one(int(y)) : 0;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes)
    gradient.template write<true>(begin + i, kLanes, e.template at<true>(i, kLanes), scale);
  if (i < n) gradient.template write<false>(begin + i, n - i, e.template at<false>(i, n - i), scale);
  if (has_target) gradient.write_target(e_y, scale);
}

template <typename T, bool kSpread>
FUSEDLOSS_INLINE void write_short_row_anew(const RowGradient<T, kSpread>& gradient, const T* x, int classes) {
  const Anew<T, T> exponentials = {x, shift(gradient.max), {x + classes, gradient.grad + classes}};
  write_block(gradient, 0, classes, gradient.max, exponentials);
}

template <typename T, bool kSpread>
FUSEDLOSS_NOINLINE void write_long_row_anew(const RowGradient<T, kSpread>& gradient, const T* x, int64_t classes) {
  using A = AccumulateType<T>;
  alignas(64) A room[std::is_same_v<T, A> ? 1 : kRowBlock<A>];
  typename Simd<A>::V largest;
  for (int64_t c = 0; c < classes; c += kRowBlock<A>) {
    const int n = int(std::min(kRowBlock<A>, classes - c));
    const A* block_x = read_block(x + c, n, room, &largest);
    const A max = max_of_lanes<A>(largest);
    write_block(gradient, c, n, max, Anew<A, T>{block_x, shift(max), {x + c + n, gradient.grad + c + n}});
  }
}

template <typename T>
FUSEDLOSS_INLINE void write_zeros(const Problem<T>& p, int64_t row) {
  std::memset(p.grad_of(row), 0, size_t(p.o.classes) * sizeof(T));
}

// ---- the forward pass

// Rows of one block each, of up to kLanes: what comes after the classes, which would take longer than a very short row's
// classes do, is computed for all of them at once.
template <typename T, bool kSpread>
FUSEDLOSS_INLINE void forward_short_rows(const Problem<T>& p, const int64_t* rows, int count, ChunkResult& chunk) {
  using A = AccumulateType<T>;
  using V = typename Simd<A>::V;
  constexpr int kLanes = kLanesOf<T>;
  const int classes = int(p.o.classes), pitch = (classes + kLanes - 1) / kLanes * kLanes;
  alignas(64) A kept[kKeptOnStack<A>];  // [count, pitch]
  const T* x[kLanes];
  const A* values[kLanes];
  V max[kLanes], sum[kLanes], dot[kLanes], mass[kLanes];
  for (int i = count; i < kLanes; ++i) max[i] = sum[i] = dot[i] = mass[i] = V{};
  for (int i = 0; i < count; ++i) {
    x[i] = p.logits + p.offset(p.o.logits_strides, rows[i]);
    values[i] = read_block(x[i], classes, kept + i * pitch, &max[i]);
  }
  fold_each<Larger, A>(max);
  RowState<V> state = {max[0], V{}, V{}, V{}};
  const V relative_to = shift(state.max);
  for (int i = 0; i < count; ++i) {
    const RowCoefficients<T, kSpread> q(p, rows[i]);
    const T* next = x[i] + count * p.o.logits_strides.outer;
    const Ahead<T> ahead = {next, p.o.grad_logits == nullptr ? next : p.grad_of(rows[i])};
    const RowState<V> s = sweep_block(values[i], q, 0, classes, relative_to[i], kept + i * pitch, ahead);
    sum[i] = s.sum;
    dot[i] = s.dot;
    mass[i] = s.mass;
  }
  fold_each<Add, A>(sum);
  state.sum = sum[0];
  if constexpr (kSpread) {
    fold_each<Add, A>(dot);
    fold_each<Add, A>(mass);
    state.dot = dot[0];
    state.mass = mass[0];
  }
  const V logsum = math::log_of_normal(state.sum), inverse_sum = 1 / state.sum;
  double loss = 0;
  for (int i = 0; i < count; ++i) {
    const RowState<Wide<A>> row = {state.max[i], state.sum[i], state.dot[i], state.mass[i]};
    finish_row<T, kSpread>(p, rows[i], x[i], row, logsum[i], inverse_sum[i], loss);
  }
  chunk.loss.add(loss);
  if (p.o.grad_logits == nullptr) return;
  for (int i = 0; i < count; ++i) {
    const RowCoefficients<T, kSpread> q(p, rows[i]);
    const RowGradient<T, kSpread> gradient(p, rows[i], q);
    write_block(gradient, 0, classes, gradient.max, Kept<A>{kept + i * pitch});
  }
}

// How many of them: as many as a vector has lanes, and kept exponentials have room.
template <typename T>
FUSEDLOSS_INLINE int short_rows_at_once(int64_t classes) {
  constexpr int kLanes = kLanesOf<T>;
  const int64_t pitch = (classes + kLanes - 1) / kLanes * kLanes;
  return int(std::min<int64_t>(kLanes, kKeptOnStack<AccumulateType<T>> / std::max<int64_t>(1, pitch)));
}

// Where the exponentials of a longer row can be kept until its gradient is written over them, or null: in that gradient,
// and if it is narrower than they are in the next row's, which must then be the caller's to write, later.
template <typename T>
FUSEDLOSS_INLINE AccumulateType<T>* room_for_exponentials(const Problem<T>& p, int64_t row, int64_t end_row) {
  using A = AccumulateType<T>;
  if (p.o.grad_logits == nullptr || p.o.classes > kKeptInGradient<A>) return nullptr;
  if constexpr (!std::is_same_v<T, A>) {
    static_assert(sizeof(A) == 2 * sizeof(T));
    if (row + 1 >= end_row || p.grad_of(row + 1) - p.grad_of(row) != p.o.classes) return nullptr;
  }
  return reinterpret_cast<A*>(p.grad_of(row));
}

template <typename T, bool kSpread>
FUSEDLOSS_INLINE void forward_long_row(const Problem<T>& p, int64_t row, AccumulateType<T>* kept, ChunkResult& chunk) {
  using A = AccumulateType<T>;
  const T* x = p.logits + p.offset(p.o.logits_strides, row);
  const RowCoefficients<T, kSpread> q(p, row);
  alignas(64) A room[std::is_same_v<T, A> ? 1 : kRowBlock<A>];
  A block_max[kKeptInGradient<A> / kRowBlock<A>];  // where exponentials are kept
  typename Simd<A>::V largest;
  auto state = empty_row_state<Wide<A>>();
  for (int64_t c = 0; c < p.o.classes; c += kRowBlock<A>) {
    const int n = int(std::min(kRowBlock<A>, p.o.classes - c));
    const A* block_x = read_block(x + c, n, room, &largest);
    const A max = max_of_lanes<A>(largest);
    if (kept != nullptr) block_max[c / kRowBlock<A>] = max;
    const Ahead<T> ahead = {x + c + n, x + c};  // the stores of what is kept go on by themselves
    const auto s = sweep_block(block_x, q, c, n, shift(max), kept == nullptr ? kept : kept + c, ahead);
    RowState<Wide<A>> block = {max, sum_of_lanes<A>(s.sum), 0, 0};
    if constexpr (kSpread) {
      block.dot = sum_of_lanes<A>(s.dot);
      block.mass = sum_of_lanes<A>(s.mass);
    }
    state = merge(state, block);
  }
  double loss = 0;
  finish_row<T, kSpread>(p, row, x, state, std::log(state.sum), A(1 / state.sum), loss);
  chunk.loss.add(loss);
  if (p.o.grad_logits == nullptr) return;
  const RowGradient<T, kSpread> gradient(p, row, q);
  if (kept == nullptr) return write_long_row_anew(gradient, x, p.o.classes);
  for (int64_t c = 0; c < p.o.classes; c += kRowBlock<A>)
    write_block(gradient, c, int(std::min(kRowBlock<A>, p.o.classes - c)), block_max[c / kRowBlock<A>],
                Kept<A>{kept + c});
}

// Rows [range.begin, range.end), of which the caller goes on to end_row.
template <typename T, bool kSpread>
void forward_rows(const Problem<T>& p, ChunkRange range, int64_t end_row, ChunkResult& chunk) {
  const bool is_short = is_short_row<T>(p.o.classes);
  const int at_once = is_short ? short_rows_at_once<T>(p.o.classes) : 1;
  int64_t rows[kLanesOf<T>];
  int count = 0;
  for (int64_t row = range.begin; row < range.end; ++row) {
    if (has_class<kSpread>(p) && !p.counts(row)) {
      skip_row(p, row, chunk);
      if (p.o.grad_logits != nullptr) write_zeros(p, row);
    } else if (is_short) {
      rows[count++] = row;
    } else {
      forward_long_row<T, kSpread>(p, row, room_for_exponentials(p, row, end_row), chunk);
    }
    if (count == at_once || (count > 0 && row + 1 == range.end)) {
      forward_short_rows<T, kSpread>(p, rows, count, chunk);
      count = 0;
    }
  }
}

// ---- the backward pass

template <typename T, bool kSpread>
void backward_rows(const Problem<T>& p, ChunkRange range) {
  for (int64_t row = range.begin; row < range.end; ++row) {
    if (has_class<kSpread>(p) && !p.counts(row)) {
      write_zeros(p, row);
      continue;
    }
    const RowCoefficients<T, kSpread> q(p, row);
    const T* x = p.logits + p.offset(p.o.logits_strides, row);
    const RowGradient<T, kSpread> gradient(p, row, q);
    if (is_short_row<T>(p.o.classes)) {
      write_short_row_anew(gradient, x, int(p.o.classes));
    } else {
      write_long_row_anew(gradient, x, p.o.classes);
    }
  }
}

FUSEDLOSS_END_NAMESPACE

#endif  // include guard
