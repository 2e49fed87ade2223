// Cross entropy for the layout "columns", where neighbouring rows are contiguous, as in (N, C, d1, …). A vector holds
// one class of neighbouring rows, so that loads are contiguous without a transposed copy.
#if defined(FUSEDLOSS_CROSS_ENTROPY_COLUMNS_INL) == defined(FUSEDLOSS_ISA_TOGGLE)
#ifdef FUSEDLOSS_CROSS_ENTROPY_COLUMNS_INL
#undef FUSEDLOSS_CROSS_ENTROPY_COLUMNS_INL
#else
#define FUSEDLOSS_CROSS_ENTROPY_COLUMNS_INL
#endif

#include <algorithm>

#include "kernels/cpu/cross_entropy_column_chunk-inl.h"

FUSEDLOSS_BEGIN_NAMESPACE

// kColumnBlock: classes that are read twice, for the maximum and for the sums, while L1 still holds them for all rows
// of a chunk. kColumnPart: classes that are summed separately, because a single sum over all classes would be rounded
// once for each class.
constexpr int64_t kColumnBlock = 16, kColumnPart = 1024;
// Up to this many classes, a group of rows is computed from its logits to its gradient at once, and its exponentials
// are kept. Its target classes are selected as the classes are read: one comparison for each class, instead of loads
// for each row.
constexpr int kFewColumnClasses = 32;

// ---- few classes

// The values of each class that the gradient of a chunk needs.
template <typename T, bool kSpread>
struct FewColumnClassesGradient {
  using A = AccumulateType<T>;
  using V = VectorOf<T>;

  A unit = 1;                // the unit of q: smoothing.uniform for a smoothed class-index target
  A q_y[kFewColumnClasses];  // q of each class where it is the target class

  explicit FewColumnClassesGradient(const TypedOptions<T>& p) {
    if (!has_class<kSpread>(p)) return;
    unit = p.smoothing.uniform;
    for (int c = 0; c < p.o.classes; ++c) q_y[c] = index_coefficient(p.weight_of(c), p.smoothing);
  }

  // e: exp(x - max).
  template <bool kWhole>
  FUSEDLOSS_INLINE void write(const TypedOptions<T>& p, const ColumnChunk<T>& columns, int c, int i, V e, V scale, V g,
                              typename Simd<A>::I y) const {
    V q = V{};
    if constexpr (kSpread) q = column_coefficients<kWhole, T, kSpread>(p, columns, c, i) * unit;
    if (has_class<kSpread>(p)) q = y == c ? V{} + q_y[c] : q;
    const V grad = y < 0 ? V{} : logit_gradient(e, scale, q, g);
    store_lanes<kWhole>(columns.grad + c * p.o.grad_strides.classes + i, grad, columns.n - i);
  }
};

// A group's sums over its classes. target: its y is given, its x and w are filled in. exponentials: [classes], receives
// exp(x - max).
template <bool kWhole, typename T, bool kSpread>
FUSEDLOSS_INLINE RowState<VectorOf<T>> sweep_columns_of_few_classes(const TypedOptions<T>& p,
                                                                    const ColumnChunk<T>& columns, int i,
                                                                    GroupTarget<T>& target, VectorOf<T>* exponentials) {
  using V = VectorOf<T>;
  const int count = int(p.o.classes);
  auto s = empty_row_state<V>();
  for (int c = 0; c < count; ++c) {
    const T* const from = columns.x + c * p.o.logits_strides.classes + i;
    __builtin_prefetch(from + kColumnChunk);  // of the next chunk
    const V x = exponentials[c] = load_lanes<kWhole>(from, columns.n - i);
    s.max = x > s.max ? x : s.max;
    target.x = target.y == c ? x : target.x;
    if (p.weight != nullptr) target.w = target.y == c ? V{} + p.weight[c] : target.w;
  }
  const V relative_to = shift(s.max);
  for (int c = 0; c < count; ++c) {
    const V d = exponentials[c] - relative_to;
    exponentials[c] = math::exp_nonpositive(d);
    add_class<kSpread>(s, d, exponentials[c], column_coefficients<kWhole, T, kSpread>(p, columns, c, i));
  }
  return s;
}

// Several groups complete each step before any of them starts the next, so that their latencies overlap.
template <typename T, bool kSpread>
FUSEDLOSS_INLINE void forward_columns_of_few_classes(const TypedOptions<T>& p, const ColumnChunk<T>& columns,
                                                     const TargetClasses<T>& classes, CompensatedSum<DoubleV>& loss) {
  using V = VectorOf<T>;
  constexpr int kGroups = 8, kLanes = kLanesOf<T>;
  const FewColumnClassesGradient<T, kSpread> gradient(p);
  V exponentials[kGroups][kFewColumnClasses], scale[kGroups];
  RowState<V> state[kGroups];
  GroupTarget<T> target[kGroups];
  for (int first = 0; first < columns.n; first += kGroups * kLanes) {
    const int end = std::min(first + kGroups * kLanes, columns.n);
    for_each_vector<T>(first, end, [&](auto whole, int i) __attribute__((always_inline)) {
      const int g = (i - first) / kLanes;
      target[g] = {classes.group(i), V{}, classes.group(i) < 0 ? V{} : V{} + 1};
      state[g] = sweep_columns_of_few_classes<whole, T, kSpread>(p, columns, i, target[g], exponentials[g]);
    });
    for_each_vector<T>(first, end, [&](auto whole, int i) __attribute__((always_inline)) {
      const int g = (i - first) / kLanes;
      scale[g] = finish_group<whole, T, kSpread>(p, columns, i, state[g], target[g], loss);
    });
    if (columns.grad == nullptr) continue;
    for_each_vector<T>(first, end, [&](auto whole, int i) __attribute__((always_inline)) {
      const int g = (i - first) / kLanes;
      const V grad_output = V{} + p.common_grad_output;
      for (int c = 0; c < p.o.classes; ++c)
        gradient.template write<whole>(p, columns, c, i, exponentials[g][c], scale[g], grad_output, target[g].y);
    });
  }
}

template <typename T, bool kSpread>
FUSEDLOSS_INLINE void backward_columns_of_few_classes(const TypedOptions<T>& p, const ColumnChunk<T>& columns,
                                                      const TargetClasses<T>& classes) {
  using V = VectorOf<T>;
  const FewColumnClassesGradient<T, kSpread> gradient(p);
  for_each_vector<T>(0, columns.n, [&](auto whole, int i) __attribute__((always_inline)) {
    const int n = columns.n - i;
    const V max = load_lanes<whole>(p.row_max + columns.row + i, n);
    const V scale = load_lanes<whole>(p.row_scale + columns.row + i, n);
    const V g = p.template scaled_grad_outputs<whole>(columns.row + i, n);
    for (int c = 0; c < p.o.classes; ++c) {
      const V x = load_lanes<whole>(columns.x + c * p.o.logits_strides.classes + i, n);
      gradient.template write<whole>(p, columns, c, i, math::exp_nonpositive(x - max), scale, g, classes.group(i));
    }
  });
}

// ---- any number of classes

template <bool kWhole, typename T, bool kSpread>
FUSEDLOSS_INLINE RowState<VectorOf<T>> sweep_group(const TypedOptions<T>& p, const ColumnChunk<T>& columns,
                                                   int64_t begin, int64_t end, int i) {
  using V = VectorOf<T>;
  const int64_t stride = p.o.logits_strides.classes;
  auto s = empty_row_state<V>();
  for (int64_t c = begin; c < end; ++c) {
    const V v = load_lanes<kWhole>(columns.x + c * stride + i, columns.n - i);
    s.max = v > s.max ? v : s.max;
  }
  const V relative_to = shift(s.max);
  for (int64_t c = begin; c < end; ++c) {
    const V d = load_lanes<kWhole>(columns.x + c * stride + i, columns.n - i) - relative_to;
    add_class<kSpread>(s, d, math::exp_nonpositive(d), column_coefficients<kWhole, T, kSpread>(p, columns, c, i));
  }
  return s;
}

template <typename T, bool kSpread>
FUSEDLOSS_INLINE void forward_columns_of_many_classes(const TypedOptions<T>& p, const ColumnChunk<T>& columns,
                                                      const TargetClasses<T>& classes, CompensatedSum<DoubleV>& loss) {
  using V = VectorOf<T>;
  constexpr int kLanes = kLanesOf<T>, kGroups = kColumnChunk / kLanes;
  RowState<V> state[kGroups], part[kGroups];
  for (auto& s : state) s = empty_row_state<V>();
  for (int64_t first = 0; first < p.o.classes; first += kColumnPart) {
    const int64_t last = std::min(first + kColumnPart, p.o.classes);
    for (auto& s : part) s = empty_row_state<V>();
    for (int64_t c = first; c < last; c += kColumnBlock) {
      const int64_t end = std::min(c + kColumnBlock, last);
      for_each_vector<T>(0, columns.n, [&](auto whole, int i) __attribute__((always_inline)) {
        part[i / kLanes] = merge(part[i / kLanes], sweep_group<whole, T, kSpread>(p, columns, c, end, i));
      });
    }
    for (int g = 0; g * kLanes < columns.n; ++g) state[g] = merge(state[g], part[g]);
  }
  for_each_vector<T>(0, columns.n, [&](auto whole, int i) __attribute__((always_inline)) {
    const auto target = gather_target<T, kSpread>(p, columns, classes, i);
    finish_group<whole, T, kSpread>(p, columns, i, state[i / kLanes], target, loss);
  });
}

// The values of each row of a chunk that its gradient needs.
template <typename T>
struct ColumnGradient {
  using A = AccumulateType<T>;

  A max[kColumnChunk], scale[kColumnChunk], g[kColumnChunk];  // as in RowGradient
  A unit;
  A at_target[kColumnChunk];  // the gradient at the target class, which is written after that of all classes
};

template <bool kWhole, typename T, bool kSpread>
FUSEDLOSS_INLINE void fill_column_gradient(const TypedOptions<T>& p, const ColumnChunk<T>& columns,
                                           const TargetClasses<T>& classes, ColumnGradient<T>& rows, int i) {
  using V = VectorOf<T>;
  const int n = columns.n - i;
  const V max = load_lanes<kWhole>(p.row_max + columns.row + i, n);
  const V scale = load_lanes<kWhole>(p.row_scale + columns.row + i, n);
  const V g = p.template scaled_grad_outputs<kWhole>(columns.row + i, n);
  store(rows.max + i, max);
  store(rows.scale + i, scale);
  store(rows.g + i, g);
  if (!has_class<kSpread>(p)) return;
  const auto target = gather_target<T, kSpread>(p, columns, classes, i);
  const V q = index_coefficient(target.w, Smoothing<V>{V{} + p.smoothing.kept, V{} + p.smoothing.uniform});
  store(rows.at_target + i, logit_gradient(math::exp_nonpositive(target.x - max), scale, q, g));
}

template <bool kWhole, typename T, bool kSpread>
FUSEDLOSS_INLINE void write_gradient_of_group(const TypedOptions<T>& p, const ColumnChunk<T>& columns,
                                              const TargetClasses<T>& classes, const ColumnGradient<T>& rows, int64_t c,
                                              int i) {
  using V = VectorOf<T>;
  const V x = load_lanes<kWhole>(columns.x + c * p.o.logits_strides.classes + i, columns.n - i);
  const V e = math::exp_nonpositive(x - load(rows.max + i));
  V grad = V{};
  if constexpr (kSpread) {
    const V q = column_coefficients<kWhole, T, kSpread>(p, columns, c, i) * rows.unit;
    grad = logit_gradient(e, load(rows.scale + i), q, load(rows.g + i));
  } else {
    grad = e * (load(rows.scale + i) * load(rows.g + i));
  }
  grad = classes.group(i) < 0 ? V{} : grad;
  store_lanes<kWhole>(columns.grad + c * p.o.grad_strides.classes + i, grad, columns.n - i);
}

template <typename T, bool kSpread>
FUSEDLOSS_INLINE void backward_columns_of_many_classes(const TypedOptions<T>& p, const ColumnChunk<T>& columns,
                                                       const TargetClasses<T>& classes) {
  ColumnGradient<T> rows;
  rows.unit = has_class<kSpread>(p) ? p.smoothing.uniform : 1;
  for_each_vector<T>(0, columns.n, [&](auto whole, int i) __attribute__((always_inline)) {
    fill_column_gradient<whole, T, kSpread>(p, columns, classes, rows, i);
  });
  for (int64_t c = 0; c < p.o.classes; ++c)
    for_each_vector<T>(0, columns.n, [&](auto whole, int i) __attribute__((always_inline)) {
      write_gradient_of_group<whole, T, kSpread>(p, columns, classes, rows, c, i);
    });
  for (int i = 0; has_class<kSpread>(p) && i < columns.n; ++i)
    if (classes.y[i] >= 0) store_one(columns.grad + i + classes.y[i] * p.o.grad_strides.classes, rows.at_target[i]);
}

// ---- a chunk

template <typename T, bool kSpread>
void forward_columns(const TypedOptions<T>& p, ChunkRange range, ChunkResult& chunk) {
  const ColumnChunk<T> columns(p, range);
  TargetClasses<T> classes;
  read_target_classes<T, kSpread>(p, columns, classes);
  for (int i = 0; !classes.all_count && chunk.bad_row < 0 && i < columns.n; ++i)
    if (classes.y[i] < 0 && p.o.target_index[columns.row + i] != p.o.ignore_index) chunk.bad_row = columns.row + i;
  CompensatedSum<DoubleV> loss = {};
  if (p.o.classes > kFewColumnClasses) {
    forward_columns_of_many_classes<T, kSpread>(p, columns, classes, loss);
    if (columns.grad != nullptr) backward_columns_of_many_classes<T, kSpread>(p, columns, classes);
  } else {
    forward_columns_of_few_classes<T, kSpread>(p, columns, classes, loss);
  }
  add_lanes(chunk.loss, loss);
}

// The gradient may be written over the logits.
template <typename T, bool kSpread>
void backward_columns(const TypedOptions<T>& p, ChunkRange range) {
  const ColumnChunk<T> columns(p, range);
  TargetClasses<T> classes;
  read_target_classes<T, kSpread>(p, columns, classes);
  if (p.o.classes > kFewColumnClasses) {
    backward_columns_of_many_classes<T, kSpread>(p, columns, classes);
  } else {
    backward_columns_of_few_classes<T, kSpread>(p, columns, classes);
  }
}

FUSEDLOSS_END_NAMESPACE

#endif  // include guard
