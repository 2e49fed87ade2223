// Cross entropy where neighbouring rows lie side by side, as in (N, C, d1, …): a vector holds one class of
// neighbouring rows, so that loads stay contiguous without a transposed copy.
#if defined(FUSEDLOSS_CROSS_ENTROPY_COLUMNS_INL) == defined(FUSEDLOSS_ISA_TOGGLE)
#ifdef FUSEDLOSS_CROSS_ENTROPY_COLUMNS_INL
#undef FUSEDLOSS_CROSS_ENTROPY_COLUMNS_INL
#else
#define FUSEDLOSS_CROSS_ENTROPY_COLUMNS_INL
#endif

#include <algorithm>
#include <type_traits>

#include "kernels/cpu/cross_entropy_problem-inl.h"

FUSEDLOSS_BEGIN_NAMESPACE

// Classes that are swept twice while L1 still holds this many of each of a tile's rows; and classes that are added up
// apart from the others: one sum over all of them in a row would round as often as there are classes.
constexpr int64_t kColumnBlock = 16, kColumnPart = 1024;
// Up to so many classes, a group of rows is taken from its logits to its gradient at once, with its exponentials kept,
// and its target classes are picked out as the classes come by: a comparison a class instead of loads a row.
constexpr int kFewClasses = 32;

// Up to kTile neighbouring rows, and within them groups of as many as a vector holds.
template <typename T>
struct Tile {
  int64_t row;    // the first one's number
  int n;          // how many
  const T* x;     // [classes, n], classes logits_strides.classes apart
  const T* t;     // [classes, n], classes target_strides.classes apart; probabilities only
  T* grad;        // [classes, n], classes grad_strides.classes apart; backward only

  Tile(const Problem<T>& p, ChunkRange range)
      : row(range.outer * p.o.inner + range.begin),
        n(int(range.end - range.begin)),
        x(p.logits + range.outer * p.o.logits_strides.outer + range.begin),
        t(p.probability ? p.probability + range.outer * p.o.target_strides.outer + range.begin : nullptr),
        grad(p.o.grad_logits
                 ? static_cast<T*>(p.o.grad_logits) + range.outer * p.o.grad_strides.outer + range.begin
                 : nullptr) {}
};

// group(is_whole, i) for each group of the columns [begin, end), of which i is the first.
template <typename T, typename Group>
FUSEDLOSS_INLINE void for_each_group(int begin, int end, Group group) {
  int i = begin;
  for (; i + kLanesOf<T> <= end; i += kLanesOf<T>) group(std::true_type{}, i);
  if (i < end) group(std::false_type{}, i);
}

// q of class c for the group that starts at column i, without the target class's own part; of a smoothed target in
// units of smoothing.uniform.
template <bool kWhole, typename T, bool kSpread>
FUSEDLOSS_INLINE typename Simd<AccumulateType<T>>::V column_coefficients(const Problem<T>& p, const Tile<T>& tile,
                                                                    int64_t c, int i) {
  using V = typename Simd<AccumulateType<T>>::V;
  if constexpr (!kSpread) return V{};
  const V w = V{} + p.weight_of(c);
  if (has_class<kSpread>(p)) return w;
  return probability_coefficient(load_lanes<kWhole>(tile.t + c * p.o.target_strides.classes + i, tile.n - i), w,
                                 p.smoothing);
}

template <bool kWhole, typename T, bool kSpread>
FUSEDLOSS_INLINE RowState<typename Simd<AccumulateType<T>>::V> sweep_group(const Problem<T>& p, const Tile<T>& tile,
                                                                      int64_t begin, int64_t end, int i) {
  using V = typename Simd<AccumulateType<T>>::V;
  const int64_t stride = p.o.logits_strides.classes;
  auto s = empty_row_state<V>();
  for (int64_t c = begin; c < end; ++c) {
    const V v = load_lanes<kWhole>(tile.x + c * stride + i, tile.n - i);
    s.max = v > s.max ? v : s.max;
  }
  const V relative_to = shift(s.max);
  for (int64_t c = begin; c < end; ++c) {
    const V d = load_lanes<kWhole>(tile.x + c * stride + i, tile.n - i) - relative_to;
    s.sum += math::exp_nonpositive(d);
    if constexpr (kSpread) {
      const V q = column_coefficients<kWhole, T, kSpread>(p, tile, c, i);
      s.dot += q * d;
      s.mass += q;
    }
  }
  return s;
}

// ---- target classes

// The target class of each of a tile's rows, and -1 for what adds nothing: rows that are ignored or whose class does
// not exist, and what follows the last row in its group. 0 for a row whose target is probabilities.
template <typename A>
struct TileClasses {
  using Index = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;

  alignas(64) Index y[kTile];
  bool all_count = true;

  FUSEDLOSS_INLINE typename Simd<A>::I group(int i) const {
    typename Simd<A>::I v;
    __builtin_memcpy(&v, y + i, sizeof v);
    return v;
  }
};

template <typename T, bool kSpread>
FUSEDLOSS_INLINE void read_classes(const Problem<T>& p, const Tile<T>& tile, TileClasses<AccumulateType<T>>& classes) {
  using Index = typename TileClasses<AccumulateType<T>>::Index;
  typedef Index Narrow __attribute__((vector_size(Simd<double>::kLanes * sizeof(Index))));
  int i = 0;
  if (has_class<kSpread>(p)) {
    DoubleI some = {};  // negative where a row does not count
    for (; i + Simd<double>::kLanes <= tile.n; i += Simd<double>::kLanes) {
      const DoubleI y = p.classes_of(tile.row + i);
      __builtin_prefetch(p.o.target_index + tile.row + i + kTile);
      const Narrow narrow = __builtin_convertvector(y, Narrow);
      __builtin_memcpy(classes.y + i, &narrow, sizeof narrow);
      some |= y;
    }
    for (int lane = 0; lane < Simd<double>::kLanes; ++lane) classes.all_count &= some[lane] >= 0;
    for (; i < tile.n; ++i) {
      classes.y[i] = p.counts(tile.row + i) ? Index(p.o.target_index[tile.row + i]) : Index(-1);
      classes.all_count &= classes.y[i] >= 0;
    }
  } else {
    for (; i < tile.n; ++i) classes.y[i] = 0;
  }
  for (; i % kLanesOf<T> != 0; ++i) classes.y[i] = -1;
}

// What a group's losses need of its target classes; 0 where there is none.
template <typename A>
struct GroupTarget {
  typename Simd<A>::I y;  // as of TileClasses
  typename Simd<A>::V x = {}, w = {};
};

template <typename T, bool kSpread>
FUSEDLOSS_INLINE GroupTarget<AccumulateType<T>> gather_target(const Problem<T>& p, const Tile<T>& tile,
                                                         const TileClasses<AccumulateType<T>>& classes, int i) {
  using A = AccumulateType<T>;
  alignas(64) A x[kLanesOf<T>] = {}, w[kLanesOf<T>] = {};
  for (int lane = 0; has_class<kSpread>(p) && lane < kLanesOf<T>; ++lane) {
    const int64_t y = classes.y[i + lane];
    if (y < 0) continue;
    x[lane] = load_one(tile.x + i + lane + y * p.o.logits_strides.classes);
    w[lane] = p.weight_of(y);
  }
  return {classes.group(i), load(x), load(w)};
}

// ---- what comes after the classes

// As CompensatedSum, in every lane.
struct CompensatedLanes {
  DoubleV value = {}, lost = {};

  FUSEDLOSS_INLINE void add(DoubleV x) {
    const DoubleV sum = value + x, taken = sum - value;
    lost += (value - (sum - taken)) + (x - taken);
    value = sum;
  }
  FUSEDLOSS_INLINE void add_to(CompensatedSum& sum) const {
    for (int lane = 0; lane < Simd<double>::kLanes; ++lane) sum.add({value[lane], lost[lane]});
  }
};

// From the sums over all classes to the losses and statistics of a group of rows. Returns what is the rows' row_scale.
template <bool kWhole, typename T, bool kSpread>
FUSEDLOSS_INLINE typename Simd<AccumulateType<T>>::V finish_group(const Problem<T>& p, const Tile<T>& tile, int i,
                                                             RowState<typename Simd<AccumulateType<T>>::V> s,
                                                             const GroupTarget<AccumulateType<T>>& target,
                                                             CompensatedLanes& loss_sum) {
  using A = AccumulateType<T>;
  using V = typename Simd<A>::V;
  const int n = tile.n - i;
  const int64_t row = tile.row + i;
  // What adds nothing has a loss of 0, whatever its logits are.
  s.max = target.y < 0 ? V{} : s.max;
  s.sum = target.y < 0 ? V{} + 1 : s.sum;
  if constexpr (kSpread) {
    s.dot = target.y < 0 ? V{} : s.dot;
    s.mass = target.y < 0 ? V{} : s.mass;
  }
  const V logsum = math::log_of_normal(s.sum);
  V mass = kSpread ? s.mass : target.w;
  if (kSpread && has_class<kSpread>(p))
    mass = index_mass(target.w, V{} + p.weight_sum, Smoothing<V>{V{} + p.smoothing.kept, V{} + p.smoothing.uniform});
  const V scale = target.y < 0 ? V{} : prevent_contraction(mass * (1 / s.sum));
  store_lanes<kWhole>(p.row_max + row, s.max, n);
  store_lanes<kWhole>(p.row_scale + row, scale, n);

  alignas(64) A losses[kLanesOf<T>];
  DoubleV sum = {};
  FUSEDLOSS_UNROLL for (int part = 0; part < kDoubleParts<A>; ++part) {
    const RowState<DoubleV> wide = {double_part(s.max, part), double_part(s.sum, part), double_part(s.dot, part),
                                    double_part(s.mass, part)};
    const DoubleV loss = row_loss<kSpread>(p, wide, double_part(logsum, part), double_part(target.x, part),
                                           double_part(target.w, part));
    if (p.o.reduction == Reduction::kNone) store_double_part(losses, loss, part);
    sum += loss;
  }
  if (p.o.reduction == Reduction::kNone) write_losses<kWhole, T>(p.o, row, load(losses), n);
  loss_sum.add(sum);
  return scale;
}

// ---- few classes

// What a tile's gradient needs of each class.
template <typename T, bool kSpread>
struct FewGradient {
  using A = AccumulateType<T>;
  using V = typename Simd<A>::V;

  A unit = 1;           // of q: smoothing.uniform for a smoothed target
  A q_y[kFewClasses];  // q of the target class, if it is this one

  explicit FewGradient(const Problem<T>& p) {
    if (!has_class<kSpread>(p)) return;
    unit = p.smoothing.uniform;
    for (int c = 0; c < p.o.classes; ++c) q_y[c] = index_mass(p.weight_of(c), p.weight_of(c), p.smoothing);
  }

  // e: exp(x - max).
  template <bool kWhole>
  FUSEDLOSS_INLINE void write(const Problem<T>& p, const Tile<T>& tile, int c, int i, V e, V scale, V g,
                              typename Simd<A>::I y) const {
    V q = V{};
    if constexpr (kSpread) q = column_coefficients<kWhole, T, kSpread>(p, tile, c, i) * unit;
    if (has_class<kSpread>(p)) q = y == c ? V{} + q_y[c] : q;
    const V grad = y < 0 ? V{} : logit_gradient(e, scale, q, g);
    store_lanes<kWhole>(tile.grad + c * p.o.grad_strides.classes + i, grad, tile.n - i);
  }
};

// A group's sums over its classes. target: of which y is known; kept: [classes], receives exp(x - max).
template <bool kWhole, typename T, bool kSpread>
FUSEDLOSS_INLINE RowState<typename Simd<AccumulateType<T>>::V> sweep_few(const Problem<T>& p, const Tile<T>& tile, int i,
                                                                    GroupTarget<AccumulateType<T>>& target,
                                                                    typename Simd<AccumulateType<T>>::V* kept) {
  using V = typename Simd<AccumulateType<T>>::V;
  const int count = int(p.o.classes);
  auto s = empty_row_state<V>();
  for (int c = 0; c < count; ++c) {
    const T* const from = tile.x + c * p.o.logits_strides.classes + i;
    __builtin_prefetch(from + kTile);  // of the next tile
    const V x = kept[c] = load_lanes<kWhole>(from, tile.n - i);
    s.max = x > s.max ? x : s.max;
    target.x = target.y == c ? x : target.x;
    if (p.weight != nullptr) target.w = target.y == c ? V{} + p.weight[c] : target.w;
  }
  const V relative_to = shift(s.max);
  for (int c = 0; c < count; ++c) {
    const V d = kept[c] - relative_to;
    kept[c] = math::exp_nonpositive(d);
    s.sum += kept[c];
    if constexpr (kSpread) {
      const V q = column_coefficients<kWhole, T, kSpread>(p, tile, c, i);
      s.dot += q * d;
      s.mass += q;
    }
  }
  return s;
}

// Several groups take each step before any takes the next: what a step waits for is then computed for all of them at
// once.
template <typename T, bool kSpread>
FUSEDLOSS_INLINE void forward_few(const Problem<T>& p, const Tile<T>& tile, const TileClasses<AccumulateType<T>>& classes,
                                  CompensatedLanes& loss) {
  using A = AccumulateType<T>;
  using V = typename Simd<A>::V;
  constexpr int kGroups = 8, kLanes = kLanesOf<T>;
  const FewGradient<T, kSpread> gradient(p);
  V kept[kGroups][kFewClasses], scale[kGroups];
  RowState<V> state[kGroups];
  GroupTarget<A> target[kGroups];
  for (int first = 0; first < tile.n; first += kGroups * kLanes) {
    const int end = std::min(first + kGroups * kLanes, tile.n);
    for_each_group<T>(first, end, [&](auto whole, int i) __attribute__((always_inline)) {
      const int g = (i - first) / kLanes;
      target[g] = {classes.group(i), V{}, classes.group(i) < 0 ? V{} : V{} + 1};
      state[g] = sweep_few<whole, T, kSpread>(p, tile, i, target[g], kept[g]);
    });
    for_each_group<T>(first, end, [&](auto whole, int i) __attribute__((always_inline)) {
      const int g = (i - first) / kLanes;
      scale[g] = finish_group<whole, T, kSpread>(p, tile, i, state[g], target[g], loss);
    });
    if (tile.grad == nullptr) continue;
    for_each_group<T>(first, end, [&](auto whole, int i) __attribute__((always_inline)) {
      const int g = (i - first) / kLanes;
      for (int c = 0; c < p.o.classes; ++c)
        gradient.template write<whole>(p, tile, c, i, kept[g][c], scale[g], V{} + p.one_upstream, target[g].y);
    });
  }
}

template <typename T, bool kSpread>
FUSEDLOSS_INLINE void backward_few(const Problem<T>& p, const Tile<T>& tile, const TileClasses<AccumulateType<T>>& classes) {
  using V = typename Simd<AccumulateType<T>>::V;
  const FewGradient<T, kSpread> gradient(p);
  for_each_group<T>(0, tile.n, [&](auto whole, int i) __attribute__((always_inline)) {
    const int n = tile.n - i;
    const V max = load_lanes<whole>(p.row_max + tile.row + i, n);
    const V scale = load_lanes<whole>(p.row_scale + tile.row + i, n);
    const V g = p.template upstreams<whole>(tile.row + i, n);
    for (int c = 0; c < p.o.classes; ++c) {
      const V x = load_lanes<whole>(tile.x + c * p.o.logits_strides.classes + i, n);
      gradient.template write<whole>(p, tile, c, i, math::exp_nonpositive(x - max), scale, g, classes.group(i));
    }
  });
}

// ---- any number of classes

template <typename T, bool kSpread>
FUSEDLOSS_INLINE void forward_many(const Problem<T>& p, const Tile<T>& tile, const TileClasses<AccumulateType<T>>& classes,
                                   CompensatedLanes& loss) {
  using V = typename Simd<AccumulateType<T>>::V;
  constexpr int kLanes = kLanesOf<T>, kGroups = kTile / kLanes;
  RowState<V> state[kGroups], part[kGroups];
  for (auto& s : state) s = empty_row_state<V>();
  for (int64_t first = 0; first < p.o.classes; first += kColumnPart) {
    const int64_t last = std::min(first + kColumnPart, p.o.classes);
    for (auto& s : part) s = empty_row_state<V>();
    for (int64_t c = first; c < last; c += kColumnBlock) {
      const int64_t end = std::min(c + kColumnBlock, last);
      for_each_group<T>(0, tile.n, [&](auto whole, int i) __attribute__((always_inline)) {
        part[i / kLanes] = merge(part[i / kLanes], sweep_group<whole, T, kSpread>(p, tile, c, end, i));
      });
    }
    for (int g = 0; g * kLanes < tile.n; ++g) state[g] = merge(state[g], part[g]);
  }
  for_each_group<T>(0, tile.n, [&](auto whole, int i) __attribute__((always_inline)) {
    const auto target = gather_target<T, kSpread>(p, tile, classes, i);
    finish_group<whole, T, kSpread>(p, tile, i, state[i / kLanes], target, loss);
  });
}

// What the gradient needs of each row of a tile.
template <typename A>
struct TileGradient {
  A max[kTile], scale[kTile], g[kTile];  // as of RowGradient
  A unit;
  A at_target[kTile];  // the gradient at the target class, which the sweep over all classes gets wrong
};

template <bool kWhole, typename T, bool kSpread>
FUSEDLOSS_INLINE void fill_group(const Problem<T>& p, const Tile<T>& tile, const TileClasses<AccumulateType<T>>& classes,
                                 TileGradient<AccumulateType<T>>& rows, int i) {
  using V = typename Simd<AccumulateType<T>>::V;
  const int n = tile.n - i;
  const V max = load_lanes<kWhole>(p.row_max + tile.row + i, n);
  const V scale = load_lanes<kWhole>(p.row_scale + tile.row + i, n);
  const V g = p.template upstreams<kWhole>(tile.row + i, n);
  store(rows.max + i, max);
  store(rows.scale + i, scale);
  store(rows.g + i, g);
  if (!has_class<kSpread>(p)) return;
  const auto target = gather_target<T, kSpread>(p, tile, classes, i);
  const V q = index_mass(target.w, target.w, Smoothing<V>{V{} + p.smoothing.kept, V{} + p.smoothing.uniform});
  store(rows.at_target + i, logit_gradient(math::exp_nonpositive(target.x - max), scale, q, g));
}

template <bool kWhole, typename T, bool kSpread>
FUSEDLOSS_INLINE void gradient_group(const Problem<T>& p, const Tile<T>& tile, const TileClasses<AccumulateType<T>>& classes,
                                     const TileGradient<AccumulateType<T>>& rows, int64_t c, int i) {
  using V = typename Simd<AccumulateType<T>>::V;
  const V x = load_lanes<kWhole>(tile.x + c * p.o.logits_strides.classes + i, tile.n - i);
  const V e = math::exp_nonpositive(x - load(rows.max + i));
  V grad = V{};
  if constexpr (kSpread) {
    const V q = column_coefficients<kWhole, T, kSpread>(p, tile, c, i) * rows.unit;
    grad = logit_gradient(e, load(rows.scale + i), q, load(rows.g + i));
  } else {
    grad = e * (load(rows.scale + i) * load(rows.g + i));
  }
  grad = classes.group(i) < 0 ? V{} : grad;
  store_lanes<kWhole>(tile.grad + c * p.o.grad_strides.classes + i, grad, tile.n - i);
}

template <typename T, bool kSpread>
FUSEDLOSS_INLINE void backward_many(const Problem<T>& p, const Tile<T>& tile,
                                    const TileClasses<AccumulateType<T>>& classes) {
  TileGradient<AccumulateType<T>> rows;
  rows.unit = has_class<kSpread>(p) ? p.smoothing.uniform : 1;
  for_each_group<T>(0, tile.n, [&](auto whole, int i) __attribute__((always_inline)) {
    fill_group<whole, T, kSpread>(p, tile, classes, rows, i);
  });
  for (int64_t c = 0; c < p.o.classes; ++c)
    for_each_group<T>(0, tile.n, [&](auto whole, int i) __attribute__((always_inline)) {
      gradient_group<whole, T, kSpread>(p, tile, classes, rows, c, i);
    });
  for (int i = 0; has_class<kSpread>(p) && i < tile.n; ++i)
    if (classes.y[i] >= 0) store_one(tile.grad + i + classes.y[i] * p.o.grad_strides.classes, rows.at_target[i]);
}

// ---- a tile

template <typename T, bool kSpread>
void forward_columns(const Problem<T>& p, ChunkRange range, ChunkResult& chunk) {
  const Tile<T> tile(p, range);
  TileClasses<AccumulateType<T>> classes;
  read_classes<T, kSpread>(p, tile, classes);
  for (int i = 0; !classes.all_count && chunk.bad_row < 0 && i < tile.n; ++i)
    if (classes.y[i] < 0 && p.o.target_index[tile.row + i] != p.o.ignore_index) chunk.bad_row = tile.row + i;
  CompensatedLanes loss;
  if (p.o.classes > kFewClasses) {
    forward_many<T, kSpread>(p, tile, classes, loss);
    if (tile.grad != nullptr) backward_many<T, kSpread>(p, tile, classes);
  } else {
    forward_few<T, kSpread>(p, tile, classes, loss);
  }
  loss.add_to(chunk.loss);
}

// grad may be x.
template <typename T, bool kSpread>
void backward_columns(const Problem<T>& p, ChunkRange range) {
  const Tile<T> tile(p, range);
  TileClasses<AccumulateType<T>> classes;
  read_classes<T, kSpread>(p, tile, classes);
  if (p.o.classes > kFewClasses) {
    backward_many<T, kSpread>(p, tile, classes);
  } else {
    backward_few<T, kSpread>(p, tile, classes);
  }
}

FUSEDLOSS_END_NAMESPACE

#endif  // include guard
