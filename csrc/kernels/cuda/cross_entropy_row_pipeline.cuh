// The software pipeline that brings a block's rows into shared memory, one after another.
//
// Each thread copies its own vectors asynchronously (cp.async) into its own slots. A block starts to copy the next row
// while it still works on the current one, so that memory stays busy while threads compute or wait for one another:
//   1. The statistics of a row are accumulated from the slots, tile by tile as the copies arrive, and merged.
//   2. The gradient of each tile is computed from the slots again. As soon as a tile's gradient is written, the copy of
//      the next row's tile into the same slots is started.
// The slots hold a whole row if there is room. Tiles without slots are read from memory in both steps.
#pragma once

#include <cuda_pipeline_primitives.h>

#include <type_traits>

#include "kernels/cuda/cross_entropy_row.cuh"
#include "kernels/cuda/cross_entropy_row_gradient.cuh"

namespace fusedloss::cuda {

template <typename T, TargetKind kTarget>
class RowPipeline {
 public:
  using A = AccumulateType<T>;
  static constexpr int kVectors = kTileVectors<kTarget>;

  __device__ __forceinline__ RowPipeline(const TypedOptions<T>& o, int thread)
      : tiles(o.plan.tiles), depth(o.plan.depth), thread(thread), threads_shift(o.plan.threads_shift), slots(o) {}

  // The vectors of a row that must be copied; none if the row does not contribute.
  struct Source {
    const T* logits = nullptr;
    const T* probability = nullptr;
    int vectors = 0;
  };
  static __device__ __forceinline__ Source source_of(const Row<T, kTarget>& row) {
    const auto elements = vectorized_range(int(row.o.classes), row.logits, row.probability);
    return {row.logits + elements.head, row.has_probabilities() ? row.probability + elements.head : nullptr,
            row.contributes() ? elements.vectors : 0};
  }

  // Starts to copy the tiles that have slots.
  __device__ __forceinline__ void start(const Source& first) {
#pragma unroll 1
    for (int number = 0; number < depth; ++number) start_copy(first, number);
  }

  // Adds the thread's vectors of a row to the statistics.
  __device__ __forceinline__ void accumulate_row(RowState<A>& state, const Row<T, kTarget>& row,
                                                 const ThreadRange<T>& range) {
    on_spread<kTarget>(row.o, [&](auto spread) {
      for_each_tile(depth, range, [&](auto is_whole, int number) {
        wait_for_copies(depth - 1 - number);
        accumulate_tile<decltype(spread)::value>(state, row, SlotTile<decltype(is_whole)::value>(range, number, slots));
      });
    });
    if (depth < tiles) accumulate_tiles<kVectorSize<T>, kVectors>(state, row, range, depth);
  }

  // Writes the gradient of a row's vectors, and starts to copy the next row into the slots that become free.
  template <bool kShifted>
  __device__ __forceinline__ void write_row_vectors(const Row<T, kTarget>& row, const GradientFactors<A>& factors,
                                                    const ThreadRange<T>& range, const Source& next) {
    if (depth < tiles) write_tiles<kShifted, kVectorSize<T>, kVectors>(row, factors, range, depth);
    on_spread<kTarget>(row.o, [&](auto spread) {
      for_each_tile(depth, range, [&](auto is_whole, int number) {
        write_tile<decltype(spread)::value, kShifted>(
            row, factors, SlotTile<decltype(is_whole)::value>(range, number, slots), number);
        start_copy(next, number);
      });
    });
  }

 private:
  template <bool kWhole>
  using SlotTile = RowTile<T, kTarget, kVectorSize<T>, kVectors, kWhole>;

  const int tiles, depth;  // tiles of a row; how many of them have slots
  const int thread, threads_shift;
  const Slots<T, kTarget> slots;

  // Calls f(std::bool_constant of whether it is whole, its number) for the first `count` tiles of a row.
  template <typename F>
  __device__ __forceinline__ void for_each_tile(int count, const ThreadRange<T>& range, F f) {
    const int whole = RowTileCount::of<kVectorSize<T>, kVectors>(range).whole;
    int number = 0;
#pragma unroll 1
    for (; number < count && number < whole; ++number) f(std::true_type(), number);
#pragma unroll 1
    for (; number < count; ++number) f(std::false_type(), number);
  }

  // Starts to copy a tile to its slots. Nothing is copied if the source has no vectors, for example because its row
  // does not exist. A group is committed even then, because wait_for_copies counts groups.
  __device__ __forceinline__ void start_copy(const Source& source, int number) {
    const int first = thread + (number * kVectors << threads_shift);
    if (first < source.vectors) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        const int unit = first + (k << threads_shift);
        if (unit >= source.vectors) continue;
        const int at = unit * kVectorSize<T>, slot = number * kVectors + k;
        __pipeline_memcpy_async(&slots.logits(slot), source.logits + at, kVectorBytes);
        if (kTarget == TargetKind::kProbabilities && source.probability)
          __pipeline_memcpy_async(&slots.probabilities(slot), source.probability + at, kVectorBytes);
      }
    }
    __pipeline_commit();
  }
};

}  // namespace fusedloss::cuda
