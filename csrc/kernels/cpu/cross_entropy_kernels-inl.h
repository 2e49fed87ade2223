// The cross entropy kernels for one instruction set, each of which selects the code for the layout and the target.
#if defined(FUSEDLOSS_CROSS_ENTROPY_KERNELS_INL) == defined(FUSEDLOSS_ISA_TOGGLE)
#ifdef FUSEDLOSS_CROSS_ENTROPY_KERNELS_INL
#undef FUSEDLOSS_CROSS_ENTROPY_KERNELS_INL
#else
#define FUSEDLOSS_CROSS_ENTROPY_KERNELS_INL
#endif

#include "kernels/cpu/cross_entropy_columns-inl.h"
#include "kernels/cpu/cross_entropy_cpu.h"
#include "kernels/cpu/cross_entropy_rows-inl.h"
#include "kernels/cpu/reduce-inl.h"

FUSEDLOSS_BEGIN_NAMESPACE

template <typename T, bool kSpread>
void backward_chunks(const CrossEntropyOptions& o, int64_t begin, int64_t end) {
  const TypedOptions<T> p(o);
  for (int64_t k = begin; k < end; ++k) {
    if (in_rows(o)) {
      backward_rows<T, kSpread>(p, chunk_range(o, k));
    } else {
      backward_columns<T, kSpread>(p, chunk_range(o, k));
    }
  }
}

// Up to this many classes, counting the rows of each class is faster than looking up the weight of each row.
constexpr int64_t kFewToCount = 8;

// The number of rows in [begin, end) whose target class `matches`. `matches` takes a single class or a vector of them.
template <typename Matches>
FUSEDLOSS_INLINE int64_t count_targets(const CrossEntropyOptions& o, int64_t begin, int64_t end, Matches matches) {
  DoubleI minus_count = {};
  int64_t count = 0;
  for_each_vector<double>(begin, end, [&](auto whole, int64_t row) __attribute__((always_inline)) {
    if constexpr (whole) {
      minus_count += matches(load_indices(o.target_index + row));
    } else {
      for (; row < end; ++row) count += matches(o.target_index[row]) ? 1 : 0;
    }
  });
  for (int lane = 0; lane < Simd<double>::kLanes; ++lane) count -= minus_count[lane];
  return count;
}

// The part of the mean's divisor that comes from the rows of one chunk.
template <typename T>
FUSEDLOSS_NOINLINE void sum_target_weights_of_chunk(const TypedOptions<T>& p, int64_t k) {
  const CrossEntropyOptions& o = p.o;
  const ChunkRange range = chunk_range(o, k);
  const int64_t begin = range.outer * o.inner + range.begin;
  const int64_t end = begin + range.end - range.begin;
  CompensatedSum<double> sum = {};
  if (o.target_index == nullptr) {
    add(sum, double(end - begin));
  } else if (o.weight == nullptr) {
    const auto counts = [&](auto y) __attribute__((always_inline)) { return p.counts(y); };
    add(sum, double(count_targets(o, begin, end, counts)));
  } else if (o.classes <= kFewToCount) {
    for (int64_t c = 0; c < o.classes; ++c) {
      if (c == o.ignore_index) continue;
      const int64_t count = count_targets(o, begin, end, [&](auto y) __attribute__((always_inline)) { return y == c; });
      if (count > 0) add(sum, double(count) * double(p.weight_of(c)));  // 0 times an infinite weight would be NaN
    }
  } else {
    for (int64_t row = begin; row < end; ++row)
      if (p.row_counts(row)) add(sum, double(p.weight_of(o.target_index[row])));
  }
  static_cast<ChunkResult*>(o.scratch)[k].target_weight = sum;
}

// If grad_logits is not null, the gradient is written too, while the cache still holds the logits.
template <typename T, bool kSpread>
void forward_chunks(const CrossEntropyOptions& o, int64_t begin, int64_t end) {
  const TypedOptions<T> p(o);
  for (int64_t k = begin; k < end; ++k) {
    ChunkResult& result = static_cast<ChunkResult*>(o.scratch)[k];
    if (!needs_total_weight_first(o)) result = {};  // else it holds the chunk's weights, from sum_target_weights
    if (sums_target_weights_in_forward(o)) sum_target_weights_of_chunk(p, k);
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
  const A* weight = static_cast<const A*>(o.weight);
  typename Simd<A>::V sum = {};
  for_each_vector<A>(int64_t(0), o.classes, [&](auto whole, int64_t c) __attribute__((always_inline)) {
    sum += load_lanes<whole>(weight + c, int(o.classes - c));
  });
  *static_cast<A*>(o.weight_sum) = sum_of_lanes<A>(sum);
}

// Sums the weights for the mean's divisor before the first row's gradient is written.
template <typename T>
void sum_target_weights(const CrossEntropyOptions& options, int64_t begin, int64_t end) {
  CrossEntropyOptions o = options;
  o.grad_logits = nullptr;  // else TypedOptions would read total_weight, which is not written yet
  const TypedOptions<T> p(o);
  for (int64_t k = begin; k < end; ++k) {
    static_cast<ChunkResult*>(o.scratch)[k] = {};
    sum_target_weights_of_chunk(p, k);
  }
}

template <typename T>
void total_weight(const CrossEntropyOptions& o) {
  write_total_weight<T>(o, sum_of_chunks(o.scratch, chunk_count(o)));
}

template <typename T>
int64_t finish(const CrossEntropyOptions& o) {
  const ChunkResult all = sum_of_chunks(o.scratch, chunk_count(o));
  write_reduced_loss<T>(o, all);
  if (sums_target_weights_in_forward(o)) write_total_weight<T>(o, all);
  return all.bad_row;
}

template <typename T>
constexpr CrossEntropyKernels kKernelsOf = {
    weight_sum<AccumulateType<T>>, sum_target_weights<T>, total_weight<T>, forward<T>, finish<T>, backward<T>};
constexpr CrossEntropyKernels kCrossEntropyKernels[] = FUSEDLOSS_FOR_EACH_DTYPE(kKernelsOf);

FUSEDLOSS_END_NAMESPACE

#endif  // include guard
