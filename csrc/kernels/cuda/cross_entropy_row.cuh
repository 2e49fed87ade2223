// A row of logits, which several threads share: where it lies, the tiles that each thread takes of it, and its
// statistics, which are accumulated tile by tile (online softmax).
#pragma once

#include <cstdint>

#include "kernels/cuda/cross_entropy_tile.cuh"
#include "kernels/cuda/vec.cuh"

namespace fusedloss::cuda {

template <typename T, TargetKind kTarget>
struct Row : RowTarget<T, kTarget> {
  using RowTarget<T, kTarget>::o;

  const int64_t outer;         // the row's index in the outer dimension
  const T* const logits;       // [classes]
  const T* const probability;  // [classes]; null for a class index
  T* const grad;               // [classes]; null if no gradient is written

  __device__ __forceinline__ Row(const TypedOptions<T>& options, int64_t row)
      : Row(options, row, options.class_of(options.target_at(row))) {}
  __device__ __forceinline__ Row(const TypedOptions<T>& options, int64_t row, int target)
      : RowTarget<T, kTarget>(options, row, target),
        outer(o.inner == 1 ? row : row / o.inner),
        logits(at(o.logits, o.logits_strides)),
        probability(kTarget == TargetKind::kProbabilities ? at(o.target_probability, o.target_strides) : nullptr),
        grad(o.grad_logits ? const_cast<T*>(at(o.grad_logits, o.grad_strides)) : nullptr) {}

  // The row's first element in a tensor of the logits' shape.
  __device__ __forceinline__ const T* at(const void* tensor, const Strides& strides) const {
    const int64_t offset = outer * strides.outer;
    return static_cast<const T*>(tensor) +
           (o.inner == 1 ? offset : offset + (this->number - outer * o.inner) * strides.inner);
  }
};

// Loads the logit of the target class. This comes before the row's tiles, so that no thread waits for the load after
// them. The logit is not widened here, because the conversion would make the thread wait for the load before the tiles.
template <typename T, TargetKind kTarget>
__device__ __forceinline__ T prefetch_target_logit(const Row<T, kTarget>& row) {
  return row.y < 0 ? T() : row.logits[row.y * row.o.logits_strides.classes];
}

// A thread's part of a row that several threads share. `thread` is its number among them. The vectors are aligned in
// the logits. Where the gradient is aligned differently, as for a slice of a padded vocabulary, only the stores differ:
// see cross_entropy_shifted_stores.cuh.
template <typename T, TargetKind kTarget>
__device__ __forceinline__ ThreadRange<T> range_of_thread(const Row<T, kTarget>& row, int thread) {
  const auto elements = vectorized_range(int(row.o.classes), row.logits, row.probability);
  return {elements, thread, row.o.plan.threads_shift};
}

// The block's number among the blocks that share its rows, and the number of groups of such blocks before it.
__device__ __forceinline__ int rank_of_block(const RowPlan& plan) {
  return int(blockIdx.x & ((1u << plan.blocks_shift) - 1));
}
__device__ __forceinline__ int64_t group_of_block(const RowPlan& plan) { return blockIdx.x >> plan.blocks_shift; }

// A tile of neighbouring classes of a row. With kWidth = 1, the classes may lie apart.
template <typename T, TargetKind kTarget, int kWidth, int kVectors, bool kWhole>
struct RowTile : VectorTile<T, kTarget, kWidth, kVectors, kWhole> {
  using Base = VectorTile<T, kTarget, kWidth, kVectors, kWhole>;
  using Base::count, Base::is_there;

  int begin;  // the first vector's unit in the range
  const ThreadRange<T>& range;

  // Loads a tile of the range from memory.
  __device__ __forceinline__ RowTile(const Row<T, kTarget>& row, const ThreadRange<T>& range, int number)
      : range(range) {
    find(number);
    load_all(row.logits, row.o.logits_strides, this->x);
    if constexpr (kTarget == TargetKind::kProbabilities) load_all(row.probability, row.o.target_strides, this->t);
  }

  // Loads the tile from the thread's slots, to which a RowPipeline has copied it.
  __device__ __forceinline__ RowTile(const ThreadRange<T>& range, int number, const Slots<T, kTarget>& slots)
      : range(range) {
    find(number);
    this->load_from_slots(slots, number);
  }

  // The class of a vector's first element.
  __device__ __forceinline__ int first(int k) const {
    return range.template first<kWidth>(begin + (k << range.step_shift));
  }
  static __device__ __forceinline__ int64_t offset(int c, const Strides& strides) {
    return kWidth == 1 ? c * strides.classes : c;
  }

  // q of element j of vector k.
  template <SpreadKind kKind>
  __device__ __forceinline__ AccumulateType<T> coefficient(const TypedOptions<T>& o, int k, int j) const {
    const AccumulateType<T> w = is_weighted(kKind) ? o.weight_of(first(k) + j) : 1;
    return Base::template coefficient<kKind>(o, k, j, w);
  }

 private:
  __device__ __forceinline__ void find(int number) {
    begin = range.thread + (number * kVectors << range.step_shift);
    count = (range.template units<kWidth>() - begin + (1 << range.step_shift) - 1) >> range.step_shift;
  }
  // Zero-fills what does not exist, as load_from_slots does.
  __device__ __forceinline__ void load_all(const T* p, const Strides& strides, Vector<T, kWidth> (&vectors)[kVectors]) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k)
      vectors[k] = is_there(k) ? load<kWidth>(p + offset(first(k), strides)) : Vector<T, kWidth>();
  }
};

// The tiles of a thread. The first `whole` ones are whole, and their number is the same for all threads of the row. If
// any thread of the warp has classes left after them, all threads of the warp have one more tile, which extends past
// the end of the row. Its stores may use shuffles, so all of them must take part. The number of threads that share a
// row is a power of two.
struct RowTileCount {
  int whole, all;

  template <int kWidth, int kVectors, typename T>
  static __device__ __forceinline__ RowTileCount of(const ThreadRange<T>& range) {
    const int units = range.template units<kWidth>(), whole = (units >> range.step_shift) / kVectors;
    return {whole, whole + ((range.thread & -kWarp) < units - (whole * kVectors << range.step_shift))};
  }
};

// ---- Statistics

// Adds in pairs. Compared with adding one after the other, each term is rounded fewer times, and fewer additions wait
// for one another.
template <typename A, int kCount>
__device__ __forceinline__ A sum_of(A (&values)[kCount]) {
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) values[i] += values[i + half];
  return values[0];
}

template <SpreadKind kKind, typename T, TargetKind kTarget, int kWidth, int kVectors, bool kWhole, typename A>
__device__ __forceinline__ void accumulate_tile(RowState<A>& state, const Row<T, kTarget>& row,
                                                const RowTile<T, kTarget, kWidth, kVectors, kWhole>& tile) {
  A max = state.max;
  tile.for_each_vector([&](int k) { max = math::max(max, tile.x[k].max()); });
  state = rescale(state, max);
  const A reference = shift(max);
  tile.for_each_vector([&](int k) {
    A e[kWidth], dot[kWidth], mass[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const A distance = tile.x[k][j] - reference;
      e[j] = math::exp_nonpositive(distance);
      if constexpr (is_spread(kTarget)) {
        mass[j] = tile.template coefficient<kKind>(row.o, k, j);
        dot[j] = mass[j] * distance;
      }
    }
    state.sum += sum_of(e);
    if constexpr (is_spread(kTarget)) {
      state.dot += sum_of(dot);
      state.mass += kKind == SpreadKind::kUniform ? row.o.smoothing.uniform * kWidth : sum_of(mass);
    }
  });
}

// Loads the tiles of a thread's range from memory, starting with number `first`, and adds each to the statistics.
template <int kWidth, int kVectors, typename T, TargetKind kTarget, typename A>
__device__ __forceinline__ void accumulate_tiles(RowState<A>& state, const Row<T, kTarget>& row,
                                                 const ThreadRange<T>& range, int first = 0) {
  const auto tiles = RowTileCount::of<kWidth, kVectors>(range);
  on_spread<kTarget>(row.o, [&](auto spread) {
    constexpr SpreadKind kKind = decltype(spread)::value;
    int number = first;
#pragma unroll 1
    for (; number < tiles.whole; ++number)
      accumulate_tile<kKind>(state, row, RowTile<T, kTarget, kWidth, kVectors, true>(row, range, number));
#pragma unroll 1
    for (; number < tiles.all; ++number)
      accumulate_tile<kKind>(state, row, RowTile<T, kTarget, kWidth, kVectors, false>(row, range, number));
  });
}

}  // namespace fusedloss::cuda
