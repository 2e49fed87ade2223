// One thread's part of the columns: kWidth neighbouring rows side by side, the tiles that the thread takes of their
// classes, and the rows' statistics, which are accumulated tile by tile.
#pragma once

#include <cfloat>
#include <cstring>
#include <type_traits>

#include "kernels/cuda/cross_entropy_tile.cuh"
#include "kernels/cuda/vec.cuh"

namespace fusedloss::cuda {

// The lowest finite number.
template <typename A>
constexpr A kLowest = sizeof(A) == 8 ? A(-DBL_MAX) : A(-FLT_MAX);

// The offset of a row's first class in a tensor with given strides.
template <typename T>
struct ColumnPosition {
  int64_t outer, inner;

  __device__ __forceinline__ ColumnPosition(const TypedOptions<T>& o, int64_t row)
      : outer(o.inner == 1 ? row : quotient(row, o.inner)), inner(row - outer * o.inner) {}
  __device__ __forceinline__ int64_t in(const Strides& strides) const {
    return outer * strides.outer + inner * strides.inner;
  }
};

// The larger of both elements in each position; if one of them is NaN, the other.
template <typename T, int kWidth>
__device__ __forceinline__ Vector<T, kWidth> elementwise_max(const Vector<T, kWidth>& a, const Vector<T, kWidth>& b) {
  Vector<T, kWidth> larger;
  if constexpr (kWidth == 1) {
    larger.element = narrow<T>(math::max(widen(a.element), widen(b.element)));
  } else if constexpr (sizeof(T) == 2) {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Pair of_a, of_b;
      memcpy(static_cast<void*>(&of_a), &a.words[i], 4);
      memcpy(static_cast<void*>(&of_b), &b.words[i], 4);
      const Pair max = __hmax2(of_a, of_b);
      memcpy(&larger.words[i], static_cast<const void*>(&max), 4);
    }
  } else {
    alignas(16) T values[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = math::max(a[i], b[i]);
    larger.from_uint4(*reinterpret_cast<const uint4*>(values));
  }
  return larger;
}

// The classes first, first + step, … of kWidth neighbouring rows, up to the end of the block's classes.
template <typename T, TargetKind kTarget, int kWidth>
struct ThreadColumns {
  using A = AccumulateType<T>;

  const TypedOptions<T>& o;
  const T* logits;       // class 0 of the first row
  const T* probability;  // null for class indices
  T* grad;               // null if no gradient is written
  int first, end;
  int classes;  // number of classes of the block
  int shift;    // log2 of step

  __device__ __forceinline__ ThreadColumns(const TypedOptions<T>& options, int64_t unit, int thread)
      : ThreadColumns(options, unit, thread, 0, int(options.classes)) {}
  __device__ __forceinline__ ThreadColumns(const TypedOptions<T>& options, int64_t unit, int thread, int begin, int end)
      : o(options), first(begin + thread), end(end), classes(end - begin), shift(options.plan.threads_shift) {
    const ColumnPosition<T> position(o, unit * kWidth);
    logits = static_cast<const T*>(o.logits) + position.in(o.logits_strides);
    probability = kTarget == TargetKind::kProbabilities
                      ? static_cast<const T*>(o.target_probability) + position.in(o.target_strides)
                      : nullptr;
    grad = o.grad_logits ? static_cast<T*>(o.grad_logits) + position.in(o.grad_strides) : nullptr;
  }
  __device__ __forceinline__ bool has_probabilities() const { return kTarget == TargetKind::kProbabilities; }
  // The number of the thread's classes; 0 or less if it has none.
  __device__ __forceinline__ int count() const { return (end - first + (1 << shift) - 1) >> shift; }

  // The logit of class c in row i, if the thread has all classes. Read from the thread's slots if it has any.
  template <bool kMayBeStaged>
  __device__ __forceinline__ T logit(int c, int i) const {
    if constexpr (kMayBeStaged) {
      if (o.plan.slots > 0) return reinterpret_cast<const T*>(&Slots<T, kTarget>(o).logits(c))[i];
    }
    return logits[c * o.logits_strides.classes + i];
  }
};

// kVectors classes of a thread. Each is a vector of kWidth rows, from memory or, if kFromSlots, from the thread's
// slots.
template <typename T, TargetKind kTarget, int kWidth, int kVectors, bool kFromSlots, bool kWhole>
struct ColumnTile : VectorTile<T, kTarget, kWidth, kVectors, kWhole> {
  using Rows = ThreadColumns<T, kTarget, kWidth>;

  int first;  // the first class

  __device__ __forceinline__ ColumnTile(const Rows& rows, int number) {
    first = rows.first + (number * kVectors << rows.shift);
    this->count = kWhole ? kVectors : (rows.end - first + (1 << rows.shift) - 1) >> rows.shift;
    if constexpr (kFromSlots) {
      this->load_from_slots(Slots<T, kTarget>(rows.o), number);
    } else {
      load_all(rows.logits, rows.o.logits_strides.classes, rows, this->x);
      if constexpr (kTarget == TargetKind::kProbabilities)
        load_all(rows.probability, rows.o.target_strides.classes, rows, this->t);
    }
  }

  __device__ __forceinline__ int class_of(const Rows& rows, int k) const { return first + (k << rows.shift); }

 private:
  // Zero-fills what does not exist, as load_from_slots does.
  __device__ __forceinline__ void load_all(const T* p, int64_t stride, const Rows& rows,
                                           Vector<T, kWidth> (&vectors)[kVectors]) {
    p += first * stride;
    const int64_t step = stride << rows.shift;
#pragma unroll
    for (int k = 0; k < kVectors; ++k, p += step)
      vectors[k] = this->is_there(k) ? load<kWidth>(p) : Vector<T, kWidth>();
  }
};

// Calls wait(number), then f(tile) for each of a thread's tiles. If kReverse, the order is from the last to the first:
// classes without slots are then read again while the cache may still hold them. The `whole` tiles are whole for every
// thread of the rows.
template <int kVectors, bool kReverse, bool kFromSlots, typename T, TargetKind kTarget, int kWidth, typename Wait,
          typename F>
__device__ __forceinline__ void for_each_tile(const ThreadColumns<T, kTarget, kWidth>& rows, Wait wait, F f) {
  const int whole = (rows.classes >> rows.shift) / kVectors;
  const int all = whole + (rows.first + (whole * kVectors << rows.shift) < rows.end);
  const auto last = [&] {
    if (whole >= all) return;
    wait(whole);
    f(ColumnTile<T, kTarget, kWidth, kVectors, kFromSlots, false>(rows, whole));
  };
  if (kReverse) last();
#pragma unroll 1
  for (int i = 0; i < whole; ++i) {
    const int number = kReverse ? whole - 1 - i : i;
    wait(number);
    f(ColumnTile<T, kTarget, kWidth, kVectors, kFromSlots, true>(rows, number));
  }
  if (!kReverse) last();
}

// Starts to copy a thread's classes to its slots, all of them at once. The copies of a tile are one group, because they
// are waited for together.
template <int kGroup, typename T, TargetKind kTarget, int kWidth>
__device__ __forceinline__ void start_copies(const ThreadColumns<T, kTarget, kWidth>& rows) {
  const Slots<T, kTarget> slots(rows.o);
  const int64_t step = rows.o.logits_strides.classes << rows.shift;
  const int64_t t_step = rows.o.target_strides.classes << rows.shift;
  const T* p = rows.logits + rows.first * rows.o.logits_strides.classes;
  const T* t = rows.has_probabilities() ? rows.probability + rows.first * rows.o.target_strides.classes : nullptr;
  const int count = rows.count();
#pragma unroll 1
  for (int first = 0; first < count; first += kGroup) {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (first + k >= count) break;
      __pipeline_memcpy_async(&slots.logits(first + k), p, kVectorBytes);
      p += step;
      if (!rows.has_probabilities()) continue;
      __pipeline_memcpy_async(&slots.probabilities(first + k), t, kVectorBytes);
      t += t_step;
    }
    __pipeline_commit();
  }
}

// ---- The statistics

// Does what rescale does. Without dot and mass fewer comparisons suffice, because the sum is 0 or NaN as long as the
// maximum is -inf.
template <bool kSpread, typename A>
__device__ __forceinline__ void raise_maximum(RowState<A>& state, A max) {
  if constexpr (kSpread) {
    state = rescale(state, max);
  } else {
    state.sum *= state.max == max ? A(1) : math::exp_nonpositive(state.max - max);
    state.max = max;
  }
}

template <SpreadKind kKind, typename T, TargetKind kTarget, int kWidth, int kVectors, bool kFromSlots, bool kWhole,
          typename A>
__device__ __forceinline__ void accumulate_column_tile(
    RowState<A> (&state)[kWidth], const ThreadColumns<T, kTarget, kWidth>& rows,
    const ColumnTile<T, kTarget, kWidth, kVectors, kFromSlots, kWhole>& tile) {
  auto largest = splat<kWidth>(narrow<T>(A(-INFINITY)));
  tile.for_each_vector([&](int k) { largest = elementwise_max(largest, tile.x[k]); });
  // All rows are rescaled, not only those whose maximum grows. This avoids a branch, and a warp has so many rows that
  // in most cases one of them needs it.
#pragma unroll
  for (int i = 0; i < kWidth; ++i) raise_maximum<is_spread(kTarget)>(state[i], math::max(state[i].max, largest[i]));
  tile.for_each_vector([&](int k) {
    const A w = is_weighted(kKind) ? rows.o.weight_of(tile.class_of(rows, k)) : A(1);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      // Like shift(max), but one instruction: -inf minus the lowest finite number is -inf, as is -inf minus 0.
      const A reference = is_spread(kTarget) ? shift(state[i].max) : math::max(state[i].max, kLowest<A>);
      const A distance = tile.x[k][i] - reference;
      add_class<is_spread(kTarget)>(state[i], distance, math::exp_nonpositive(distance),
                                    tile.template coefficient<kKind>(rows.o, k, i, w));
    }
  });
}

// Whether a thread copies its classes to slots, from which the gradient is computed later.
enum class Staging { kNever, kIfSlots, kAlways };

template <Staging kStaging, typename T, TargetKind kTarget, int kWidth, typename A>
__device__ __forceinline__ void accumulate_columns(RowState<A> (&state)[kWidth],
                                                   const ThreadColumns<T, kTarget, kWidth>& rows) {
  constexpr int kVectors = kColumnTileVectors<is_spread(kTarget)>;
  if constexpr (kStaging != Staging::kNever) {
    if (kStaging == Staging::kAlways || rows.o.plan.slots > 0) {
      start_copies<kVectors>(rows);
      const int groups = (rows.count() + kVectors - 1) / kVectors;
      on_spread<kTarget>(rows.o, [&](auto spread) {
        for_each_tile<kVectors, /*kReverse=*/false, /*kFromSlots=*/true>(
            rows, [&](int number) { wait_for_copies(groups - 1 - number); },
            [&](const auto& tile) { accumulate_column_tile<decltype(spread)::value>(state, rows, tile); });
      });
      return;
    }
  }
  if constexpr (kStaging != Staging::kAlways) {
    on_spread<kTarget>(rows.o, [&](auto spread) {
      for_each_tile<kVectors, /*kReverse=*/false, /*kFromSlots=*/false>(
          rows, [](int) {},
          [&](const auto& tile) { accumulate_column_tile<decltype(spread)::value>(state, rows, tile); });
    });
  }
}

}  // namespace fusedloss::cuda
