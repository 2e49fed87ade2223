// A chunk of neighbouring rows in the layout "columns" (cross_entropy_chunks.h): its target classes, and its losses
// from the sums over all classes. A vector holds one class of a group of neighbouring rows.
#if defined(FUSEDLOSS_CROSS_ENTROPY_COLUMN_CHUNK_INL) == defined(FUSEDLOSS_ISA_TOGGLE)
#ifdef FUSEDLOSS_CROSS_ENTROPY_COLUMN_CHUNK_INL
#undef FUSEDLOSS_CROSS_ENTROPY_COLUMN_CHUNK_INL
#else
#define FUSEDLOSS_CROSS_ENTROPY_COLUMN_CHUNK_INL
#endif

#include <algorithm>
#include <type_traits>

#include "kernels/cpu/cross_entropy_options-inl.h"
#include "kernels/cpu/reduce-inl.h"

FUSEDLOSS_BEGIN_NAMESPACE

// Up to kColumnChunk neighbouring rows. They are processed in groups, each of which fills a vector.
template <typename T>
struct ColumnChunk {
  int64_t row;  // the number of the first row
  int n;        // the number of rows
  const T* x;   // [classes, n], classes are logits_strides.classes apart
  const T* t;   // [classes, n], classes are target_strides.classes apart; probabilities only
  T* grad;      // [classes, n], classes are grad_strides.classes apart; null if it is not wanted

  ColumnChunk(const TypedOptions<T>& p, ChunkRange range)
      : row(range.outer * p.o.inner + range.begin),
        n(int(range.end - range.begin)),
        x(p.logits + range.outer * p.o.logits_strides.outer + range.begin),
        t(p.probability ? p.probability + range.outer * p.o.target_strides.outer + range.begin : nullptr),
        grad(p.o.grad_logits ? static_cast<T*>(p.o.grad_logits) + range.outer * p.o.grad_strides.outer + range.begin
                             : nullptr) {}
};

// q of class c for the group that starts at column i, without the part that only the target class has. For a smoothed
// class-index target, it is in units of smoothing.uniform.
template <bool kWhole, typename T, bool kSpread>
FUSEDLOSS_INLINE VectorOf<T> column_coefficients(const TypedOptions<T>& p, const ColumnChunk<T>& columns, int64_t c,
                                                 int i) {
  using V = VectorOf<T>;
  if constexpr (!kSpread) return V{};
  const V w = V{} + p.weight_of(c);
  if (has_class<kSpread>(p)) return w;
  return probability_coefficient(load_lanes<kWhole>(columns.t + c * p.o.target_strides.classes + i, columns.n - i), w,
                                 p.smoothing);
}

// ---- target classes

// The target class of each row of a chunk. It is -1 for a row that adds nothing to the loss: one that is ignored, whose
// class does not exist, or that only pads the last group. It is 0 for a row whose target is probabilities.
template <typename T>
struct TargetClasses {
  using A = AccumulateType<T>;
  using Index = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;

  typedef Index Narrow __attribute__((vector_size(Simd<double>::kLanes * sizeof(Index))));  // as many lanes as DoubleI

  alignas(64) Index y[kColumnChunk];
  bool all_count = true;

  FUSEDLOSS_INLINE typename Simd<A>::I group(int i) const {
    typename Simd<A>::I v;
    __builtin_memcpy(&v, y + i, sizeof v);
    return v;
  }
};

template <typename T, bool kSpread>
FUSEDLOSS_INLINE void read_target_classes(const TypedOptions<T>& p, const ColumnChunk<T>& columns,
                                          TargetClasses<T>& classes) {
  using Index = typename TargetClasses<T>::Index;
  using Narrow = typename TargetClasses<T>::Narrow;
  for (int i = columns.n; i % kLanesOf<T> != 0; ++i) classes.y[i] = -1;
  if (!has_class<kSpread>(p)) {
    std::fill_n(classes.y, columns.n, Index(0));
    return;
  }
  DoubleI some = {};  // negative in a lane where any row does not count
  for_each_vector<double>(0, columns.n, [&](auto whole, int begin) __attribute__((always_inline)) {
    if constexpr (whole) {
      const DoubleI y = p.target_classes(columns.row + begin);
      __builtin_prefetch(p.o.target_index + columns.row + begin + kColumnChunk);
      const Narrow narrow = __builtin_convertvector(y, Narrow);
      __builtin_memcpy(classes.y + begin, &narrow, sizeof narrow);
      some |= y;
    } else {
      for (int i = begin; i < columns.n; ++i) {
        classes.y[i] = p.row_counts(columns.row + i) ? Index(p.o.target_index[columns.row + i]) : Index(-1);
        classes.all_count &= classes.y[i] >= 0;
      }
    }
  });
  for (int lane = 0; lane < Simd<double>::kLanes; ++lane) classes.all_count &= some[lane] >= 0;
}

// The target classes of a group, with their logits and weights, which are 0 for a row without a target class.
template <typename T>
struct GroupTarget {
  typename Simd<AccumulateType<T>>::I y;  // as in TargetClasses
  VectorOf<T> x = {}, w = {};
};

template <typename T, bool kSpread>
FUSEDLOSS_INLINE GroupTarget<T> gather_target(const TypedOptions<T>& p, const ColumnChunk<T>& columns,
                                              const TargetClasses<T>& classes, int i) {
  using A = AccumulateType<T>;
  alignas(64) A x[kLanesOf<T>] = {}, w[kLanesOf<T>] = {};
  for (int lane = 0; has_class<kSpread>(p) && lane < kLanesOf<T>; ++lane) {
    const int64_t y = classes.y[i + lane];
    if (y < 0) continue;
    x[lane] = load_one(columns.x + i + lane + y * p.o.logits_strides.classes);
    w[lane] = p.weight_of(y);
  }
  return {classes.group(i), load(x), load(w)};
}

// ---- losses and statistics, from the sums over all classes

// Stores the losses and statistics of a group of rows. Returns the row_scale of the rows.
template <bool kWhole, typename T, bool kSpread>
FUSEDLOSS_INLINE VectorOf<T> finish_group(const TypedOptions<T>& p, const ColumnChunk<T>& columns, int i,
                                          RowState<VectorOf<T>> s, const GroupTarget<T>& target,
                                          CompensatedSum<DoubleV>& loss_sum) {
  using A = AccumulateType<T>;
  using V = typename Simd<A>::V;
  const int n = columns.n - i;
  const int64_t row = columns.row + i;
  // A row that adds nothing has a loss of 0, whatever its logits are.
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
    const DoubleV loss =
        row_loss<kSpread>(p, wide, double_part(logsum, part), double_part(target.x, part), double_part(target.w, part));
    if (p.o.reduction == Reduction::kNone) store_double_part(losses, loss, part);
    sum += loss;
  }
  if (p.o.reduction == Reduction::kNone) write_losses<kWhole, T>(p.o, row, load(losses), n);
  add(loss_sum, sum);
  return scale;
}

FUSEDLOSS_END_NAMESPACE

#endif  // include guard
