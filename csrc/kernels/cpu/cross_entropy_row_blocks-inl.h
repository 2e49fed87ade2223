// A block of a row's classes, which are contiguous: its maximum, its sums, and its gradient. A vector holds
// neighbouring classes.
#if defined(FUSEDLOSS_CROSS_ENTROPY_ROW_BLOCKS_INL) == defined(FUSEDLOSS_ISA_TOGGLE)
#ifdef FUSEDLOSS_CROSS_ENTROPY_ROW_BLOCKS_INL
#undef FUSEDLOSS_CROSS_ENTROPY_ROW_BLOCKS_INL
#else
#define FUSEDLOSS_CROSS_ENTROPY_ROW_BLOCKS_INL
#endif

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kernels/cpu/cross_entropy_options-inl.h"
#include "kernels/cpu/reduce-inl.h"

FUSEDLOSS_BEGIN_NAMESPACE

// Classes of a block. They are read twice, for the maximum and for the sums, while L1 still holds them, so that memory
// is read once. The forward and the backward pass both compute exponentials relative to the block's own maximum, so
// that these are identical. A block of doubles is shorter because they fill L1 sooner.
template <typename A>
constexpr int64_t kRowBlock = std::is_same_v<A, double> ? 512 : 2048;
// If the forward pass also writes the gradient, it keeps exponentials for it, to avoid a second exp. Those of short
// rows (of one block each) are kept on the stack, in half of L1; the other half is for the logits.
template <typename A>
constexpr int64_t kExponentialsOnStack = 16384 / sizeof(A);
// Those of a longer row are kept where its gradient will be, if L2 holds them.
template <typename A>
constexpr int64_t kExponentialsInGradient = 524288 / sizeof(A);
// Independent accumulators, to hide the latency of an addition and of exp.
constexpr int kUnroll = 4;

template <typename T>
FUSEDLOSS_INLINE bool is_short_row(int64_t classes) {
  return classes <= kRowBlock<AccumulateType<T>>;
}

// q of neighbouring classes, without the part that only the target class has. For a smoothed class-index target, it is
// in units of smoothing.uniform, in which the sums of equal weights are exact.
template <typename T, bool kSpread>
struct RowCoefficients {
  using A = AccumulateType<T>;
  using V = VectorOf<T>;

  const T* probability;  // [classes] of this row; null for class indices
  const A* weight;       // [classes]
  Smoothing<A> smoothing;

  RowCoefficients(const TypedOptions<T>& p, int64_t row)
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
      if constexpr (!kWhole) q = lanes_from<A>(n) ? V{} : q;
    }
    return q;
  }
};

// Writes to each lane of `max` the maximum of the classes that fall into it (every kLanes-th of n), or -inf if there
// are none. Returns the classes in the accumulate type: x itself, or `widened` ([n]), into which they are converted
// once for all later steps.
template <typename T>
FUSEDLOSS_NOINLINE const AccumulateType<T>* max_of_block(const T* x, int n, AccumulateType<T>* widened,
                                                         VectorOf<T>* max) {
  using A = AccumulateType<T>;
  using V = VectorOf<T>;
  V largest[kUnroll];
  FUSEDLOSS_UNROLL for (int k = 0; k < kUnroll; ++k) largest[k] = V{} - INFINITY;
  for_each_vector_unrolled<T, kUnroll>(n, [&](auto whole, int64_t i, int k) __attribute__((always_inline)) {
    const int lanes = int(n - i);  // not used for a whole vector
    V v = load_lanes<whole>(x + i, lanes);
    if constexpr (!std::is_same_v<T, A>) store_lanes<whole>(widened + i, v, lanes);
    if constexpr (!whole) v = lanes_from<A>(lanes) ? V{} - INFINITY : v;
    largest[k] = Larger::of(v, largest[k]);
  });
  FUSEDLOSS_UNROLL for (int k = 1; k < kUnroll; ++k) largest[0] = Larger::of(largest[k], largest[0]);
  *max = largest[0];
  if constexpr (std::is_same_v<T, A>) {
    return x;
  } else {
    return widened;
  }
}

template <bool kWhole, typename T, bool kSpread>
FUSEDLOSS_INLINE void add_classes(RowState<VectorOf<T>>& s, const AccumulateType<T>* x,
                                  const RowCoefficients<T, kSpread>& q, int64_t c, int n, AccumulateType<T> relative_to,
                                  AccumulateType<T>* exponentials) {
  using A = AccumulateType<T>;
  using V = typename Simd<A>::V;
  const V d = load_lanes<kWhole>(x, n) - relative_to;
  V e = math::exp_nonpositive(d);
  if constexpr (!kWhole) e = lanes_from<A>(n) ? V{} : e;
  if (exponentials != nullptr) store_lanes<kWhole>(exponentials, e, n);
  add_class<kSpread>(s, d, e, q.template at<kWhole>(c, n));
}

// Prefetches, during the arithmetic of a sweep, the memory that is read and the memory that is written soon after it.
template <typename T>
struct Prefetch {
  static constexpr int kVectorsOfLine = std::max(1, 64 / int(sizeof(T)) / kLanesOf<T>);  // of a cache line

  const T *read, *write;

  FUSEDLOSS_INLINE void line_at(int64_t i) const {
    __builtin_prefetch(read + i);
    __builtin_prefetch(write + i, /*to write=*/1);
  }
};

// The sums over classes [begin, begin + n), of every kLanes-th class in each lane; `max` is not set. x: [n].
// exponentials: [n], where they are kept, or null; it may be x.
template <typename T, bool kSpread>
FUSEDLOSS_INLINE RowState<VectorOf<T>> sweep_block(const AccumulateType<T>* x, const RowCoefficients<T, kSpread>& q,
                                                   int64_t begin, int n, AccumulateType<T> relative_to,
                                                   AccumulateType<T>* exponentials, Prefetch<T> prefetch) {
  using V = VectorOf<T>;
  RowState<V> s[kUnroll];
  FUSEDLOSS_UNROLL for (int k = 0; k < kUnroll; ++k) s[k] = empty_row_state<V>();
  for_each_vector_unrolled<T, kUnroll>(n, [&](auto whole, int64_t i, int k) __attribute__((always_inline)) {
    if (k % Prefetch<T>::kVectorsOfLine == 0) prefetch.line_at(i);
    add_classes<whole>(s[k], x + i, q, begin + i, int(n - i), relative_to,
                       exponentials == nullptr ? nullptr : exponentials + i);
  });
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
  A unit = 1;      // the unit of q: smoothing.uniform for a smoothed class-index target
  int64_t y = -1;  // the target class
  A q_y = 0;       // the part of q that only the target class has

  // row_max and row_scale of the row must have been written.
  RowGradient(const TypedOptions<T>& p, int64_t row, const RowCoefficients<T, kSpread>& coefficients)
      : q(coefficients),
        grad(p.grad_of(row)),
        max(p.row_max[row]),
        scale(p.row_scale[row]),
        g(p.scaled_grad_output(row)) {
    if (has_class<kSpread>(p)) {
      y = p.o.target_index[row];
      q_y = math::rounded_product(p.smoothing.kept, p.weight_of(y));
      unit = p.smoothing.uniform;
    }
  }

  // The scale for exponentials that are relative to the maximum of a block.
  FUSEDLOSS_INLINE A scale_of_block(A block_max) const {
    return block_max == max ? scale : scale * math::exp_nonpositive(block_max - max);
  }

  // Writes the gradient of classes [c, c + n), as if none of them were the target class.
  template <bool kWhole>
  FUSEDLOSS_INLINE void write(int64_t c, int n, V e, A scale_of_e) const {
    if constexpr (kSpread) {
      e = logit_gradient(e, scale_of_e, prevent_contraction(q.template at<kWhole>(c, n) * unit), g);
    } else {
      e *= scale_of_e * g;
    }
    store_lanes<kWhole>(grad + c, e, n);
  }

  // Writes the gradient of the target class.
  FUSEDLOSS_INLINE void write_target(A e, A scale_of_e) const {
    A q_c = q_y;
    if constexpr (kSpread) q_c += prevent_contraction((q.weight ? q.weight[y] : A(1)) * unit);
    store_one(grad + y, logit_gradient(e, scale_of_e, q_c, g));
  }
};

// Exponentials of a block that were kept, possibly in the memory of the gradient.
template <typename A>
struct KeptExponentials {
  const A* e;  // [n]

  template <bool kWhole>
  FUSEDLOSS_INLINE typename Simd<A>::V at(int64_t i, int n) const {
    return load_lanes<kWhole>(e + i, n);
  }
  FUSEDLOSS_INLINE A one(int i) const { return e[i]; }
};

// Exponentials of a block that are recomputed. x: [n], of type T or the accumulate type; the gradient may be written
// over it.
template <typename X, typename T>
struct RecomputedExponentials {
  using A = AccumulateType<X>;
  using V = typename Simd<A>::V;

  const X* x;
  A relative_to;
  Prefetch<T> prefetch;

  template <bool kWhole>
  FUSEDLOSS_INLINE V at(int64_t i, int n) const {
    prefetch.line_at(i);
    return math::exp_nonpositive(load_lanes<kWhole>(x + i, n) - relative_to);
  }
  FUSEDLOSS_INLINE A one(int i) const { return math::exp_nonpositive(V{} + load_one(x + i) - relative_to)[0]; }
};

// Writes the gradient of classes [begin, begin + n) from their exponentials.
template <typename T, bool kSpread, typename Exponentials>
FUSEDLOSS_INLINE void write_block(const RowGradient<T, kSpread>& gradient, int64_t begin, int n,
                                  AccumulateType<T> block_max, const Exponentials& e) {
  const auto scale = gradient.scale_of_block(block_max);
  // The target class is corrected afterwards: a comparison for each class would cost more.
  const int64_t y = gradient.y - begin;
  const bool has_target = uint64_t(y) < uint64_t(n);
  const auto e_y = has_target ? e.one(int(y)) : 0;
  for_each_vector<T>(int64_t(0), int64_t(n), [&](auto whole, int64_t i) __attribute__((always_inline)) {
    const int lanes = int(n - i);
    gradient.template write<whole>(begin + i, lanes, e.template at<whole>(i, lanes), scale);
  });
  if (has_target) gradient.write_target(e_y, scale);
}

FUSEDLOSS_END_NAMESPACE

#endif  // include guard
