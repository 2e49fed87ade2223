// The kernels of one instruction set, and the choice among them.
#if defined(FUSEDLOSS_CROSS_ENTROPY_KERNELS_INL) == defined(FUSEDLOSS_ISA_TOGGLE)
#ifdef FUSEDLOSS_CROSS_ENTROPY_KERNELS_INL
#undef FUSEDLOSS_CROSS_ENTROPY_KERNELS_INL
#else
#define FUSEDLOSS_CROSS_ENTROPY_KERNELS_INL
#endif

#include "kernels/cpu/cross_entropy_columns-inl.h"
#include "kernels/cpu/cross_entropy_cpu.h"
#include "kernels/cpu/cross_entropy_rows-inl.h"
#include "kernels/cpu/reduce_lanes-inl.h"

FUSEDLOSS_BEGIN_NAMESPACE

template <typename T, bool kSpread>
void backward_chunks(const CrossEntropyOptions& o, int64_t begin, int64_t end) {
  const Problem<T> p(o);
  for (int64_t k = begin; k < end; ++k) {
    if (in_rows(o)) {
      backward_rows<T, kSpread>(p, chunk_range(o, k));
    } else {
      backward_columns<T, kSpread>(p, chunk_range(o, k));
    }
  }
}

// Up to so many classes, counting the rows of each takes less time than looking each row's weight up.
constexpr int64_t kFewToCount = 8;

inline int64_t rows_of_class(const CrossEntropyOptions& o, int64_t c, int64_t begin, int64_t end) {
  constexpr int kLanes = Simd<double>::kLanes;
  DoubleI others = {};  // minus how many there are
  int64_t row = begin;
  for (; row + kLanes <= end; row += kLanes) {
    DoubleI y;
    __builtin_memcpy(&y, o.target_index + row, sizeof y);
    others += y != c;
  }
  int64_t count = row - begin;
  for (int lane = 0; lane < kLanes; ++lane) count += others[lane];
  for (; row < end; ++row) count += o.target_index[row] == c;
  return count;
}

// What the mean divides by, of one chunk's rows.
template <typename T>
FUSEDLOSS_NOINLINE void weigh_chunk(const Problem<T>& p, int64_t k) {
  const CrossEntropyOptions& o = p.o;
  const ChunkRange range = chunk_range(o, k);
  const int64_t first = range.outer * o.inner + range.begin;
  const int64_t last = first + range.end - range.begin;
  CompensatedSum weight;
  if (o.target_index == nullptr) {
    weight.add(double(last - first));
  } else if (o.weight == nullptr) {
    constexpr int kLanes = Simd<double>::kLanes;
    DoubleI none = {};  // minus how many rows do not count
    int64_t row = first;
    for (; row + kLanes <= last; row += kLanes) none += p.classes_of(row) < 0;
    int64_t count = row - first;
    for (int lane = 0; lane < kLanes; ++lane) count += none[lane];
    for (; row < last; ++row) count += p.counts(row);
    weight.add(double(count));
  } else if (o.classes <= kFewToCount) {
    for (int64_t c = 0; c < o.classes; ++c) {
      const int64_t count = c == o.ignore_index ? 0 : rows_of_class(o, c, first, last);
      if (count > 0) weight.add(double(count) * double(p.weight_of(c)));  // 0 of an infinite weight are nothing
    }
  } else {
    for (int64_t row = first; row < last; ++row)
      if (p.counts(row)) weight.add(p.weight_of(o.target_index[row]));
  }
  static_cast<ChunkResult*>(o.scratch)[k].weight = weight;
}

// Where grad_logits is given it is written too, while the cache holds the logits.
template <typename T, bool kSpread>
void forward_chunks(const CrossEntropyOptions& o, int64_t begin, int64_t end) {
  const Problem<T> p(o);
  for (int64_t k = begin; k < end; ++k) {
    ChunkResult& result = static_cast<ChunkResult*>(o.scratch)[k];
    result.loss = CompensatedSum();
    result.bad_row = -1;
    if (weighs_in_forward(o)) weigh_chunk(p, k);
    if (in_rows(o)) {
      forward_rows<T, kSpread>(p, chunk_range(o, k), chunk_range(o, end - 1).end, result);
    } else {
      forward_columns<T, kSpread>(p, chunk_range(o, k), result);
    }
  }
}

template <typename T>
void forward(const CrossEntropyOptions& o, int64_t begin, int64_t end) {
  o.is_spread() ? forward_chunks<T, true>(o, begin, end) : forward_chunks<T, false>(o, begin, end);
}

template <typename T>
void backward(const CrossEntropyOptions& o, int64_t begin, int64_t end) {
  o.is_spread() ? backward_chunks<T, true>(o, begin, end) : backward_chunks<T, false>(o, begin, end);
}

template <typename A>
void weight_sum(const CrossEntropyOptions& o) {
  constexpr int kLanes = Simd<A>::kLanes;
  const A* weight = static_cast<const A*>(o.weight);
  typename Simd<A>::V sum = {};
  int64_t c = 0;
  for (; c + kLanes <= o.classes; c += kLanes) sum += load(weight + c);
  if (c < o.classes) sum += load_first(weight + c, int(o.classes - c));
  *static_cast<A*>(o.weight_sum) = sum_of_lanes<A>(sum);
}

// The weights that the mean divides by, known before the first row's gradient is written.
template <typename T>
void sum_target_weights(const CrossEntropyOptions& o, int64_t begin, int64_t end) {
  const Problem<T> p(o);
  for (int64_t k = begin; k < end; ++k) weigh_chunk(p, k);
}

inline CompensatedSum sum_of_weights(const CrossEntropyOptions& o) {
  CompensatedSum weight;
  for (int64_t k = 0; k < chunk_count(o); ++k) weight.add(static_cast<const ChunkResult*>(o.scratch)[k].weight);
  return weight;
}

template <typename T>
void total_weight(const CrossEntropyOptions& o) {
  *static_cast<AccumulateType<T>*>(o.total_weight) = AccumulateType<T>(sum_of_weights(o).value());
}

// The chunks' sums in their order, in double; rounded once.
template <typename T>
int64_t finish(const CrossEntropyOptions& o) {
  if (weighs_in_forward(o)) total_weight<T>(o);
  CompensatedSum loss;
  int64_t bad_row = -1;
  const int64_t chunks = chunk_count(o);
  for (int64_t k = 0; k < chunks; ++k) {
    const ChunkResult& chunk = static_cast<const ChunkResult*>(o.scratch)[k];
    loss.add(chunk.loss);
    if (bad_row < 0) bad_row = chunk.bad_row;
  }
  if (o.reduction == Reduction::kMean)
    write_loss<T>(o, 0, AccumulateType<T>(divide_by_total_weight(loss.value(), sum_of_weights(o).value())));
  if (o.reduction == Reduction::kSum) write_loss<T>(o, 0, AccumulateType<T>(loss.value()));
  return bad_row;
}

template <typename T>
constexpr CrossEntropyKernels kKernelsOf = {weight_sum<AccumulateType<T>>, sum_target_weights<T>, total_weight<T>,
                                            forward<T>,                    finish<T>,             backward<T>};
constexpr CrossEntropyKernels kCrossEntropyKernels[] = FUSEDLOSS_FOR_EACH_DTYPE(kKernelsOf);

FUSEDLOSS_END_NAMESPACE

#endif  // include guard
