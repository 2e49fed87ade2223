// What the threads of a block exchange about their columns through shared memory: statistics, and what the gradient
// needs.
#pragma once

#include "kernels/cuda/cross_entropy_options.cuh"
#include "kernels/cuda/cross_entropy_plan_columns.h"
#include "kernels/cuda/reduce.cuh"

namespace fusedloss::cuda {

// The shared memory after the slots. Each row of the block has a place. There are several sets of arrays with one value
// for each place. A set holds the fields of a RowState, except for the last set, which holds what the gradient needs.
template <typename T, TargetKind kTarget, int kWidth>
struct ColumnSharedMemory {
  using A = AccumulateType<T>;

  const int places;
  A* const values;     // [sets][kStateArrays<is_spread(kTarget)>][places]
  int* const y;        // [places]
  T* const of_target;  // [places]  the gradient of the target class

  explicit __device__ __forceinline__ ColumnSharedMemory(const ColumnPlan& p)
      : places(column_places(int(blockDim.x), kWidth)),
        values(reinterpret_cast<A*>(dynamic_shared_memory + p.kept_vectors)),
        y(reinterpret_cast<int*>(values + p.sets * kStateArrays<is_spread(kTarget)> * places)),
        of_target(reinterpret_cast<T*>(y + places)) {}

  // The place of a thread's row: `thread` is the thread's number side by side, `row` is the row's number among its
  // rows. The padding avoids bank conflicts, both where each thread of a warp accesses its first row, and where a warp
  // accesses neighbouring rows.
  __device__ __forceinline__ int place(int thread, int row) const {
    return row * column_stride(int(blockDim.x), kWidth) + thread;
  }
  __device__ __forceinline__ A& at(int set, int array, int place) const {
    return values[(set * kStateArrays<is_spread(kTarget)> + array) * places + place];
  }
  __device__ __forceinline__ void store_state(int set, int place, const RowState<A>& state) const {
    at(set, 0, place) = state.max;
    at(set, 1, place) = state.sum;
    if constexpr (is_spread(kTarget)) {
      at(set, 2, place) = state.dot;
      at(set, 3, place) = state.mass;
    }
  }
  __device__ __forceinline__ RowState<A> load_state(int set, int place) const {
    RowState<A> state = {at(set, 0, place), at(set, 1, place), A(0), A(0)};
    if constexpr (is_spread(kTarget)) {
      state.dot = at(set, 2, place);
      state.mass = at(set, 3, place);
    }
    return state;
  }
};

// ---- The merge of the threads' statistics

// Merges statistics over the lanes of a warp that have the same rows. Where fewer threads than a warp are side by side,
// these are the lanes whose numbers differ by a multiple of blockDim.x.
template <TargetKind kTarget, int kWidth, typename A>
__device__ __forceinline__ void merge_strided_lanes(RowState<A> (&state)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    A max = state[i].max;
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
      if (distance >= int(blockDim.x)) max = math::max(max, __shfl_xor_sync(kAllLanes, max, distance));
    state[i] = rescale(state[i], max);
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      if (distance < int(blockDim.x)) continue;
      state[i].sum += __shfl_xor_sync(kAllLanes, state[i].sum, distance);
      if constexpr (is_spread(kTarget)) {
        state[i].dot += __shfl_xor_sync(kAllLanes, state[i].dot, distance);
        state[i].mass += __shfl_xor_sync(kAllLanes, state[i].mass, distance);
      }
    }
  }
}

// Stores the statistics that the block's threads have of its rows in shared memory, in 1 << sets_shift sets.
template <typename T, TargetKind kTarget, int kWidth>
__device__ __forceinline__ void store_states(const ColumnSharedMemory<T, kTarget, kWidth>& memory,
                                             RowState<AccumulateType<T>> (&state)[kWidth]) {
  // Threads of one warp that have the same rows store one set together. Each of the other threads stores a set of its
  // own.
  const int threads_of_set = blockDim.x < kWarp ? kWarp / blockDim.x : 1;
  if (blockDim.x < kWarp) merge_strided_lanes<kTarget>(state);
  __syncthreads();  // all threads have read the previous rows
  if (threadIdx.y % threads_of_set == 0) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      memory.store_state(threadIdx.y / threads_of_set, memory.place(threadIdx.x, i), state[i]);
  }
  __syncthreads();
}

// Merges the 1 << shift sets of each of the block's rows, with as many lanes. Then each of these lanes calls
// f(number of the row in the block, its place, its merged state, the lane's number among those of the row). All threads
// must take part.
template <typename T, TargetKind kTarget, int kWidth, typename F>
__device__ __forceinline__ void for_each_merged_row(const ColumnSharedMemory<T, kTarget, kWidth>& memory, int shift,
                                                    F f) {
  using A = AccumulateType<T>;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, part = thread & ((1 << shift) - 1);
  const unsigned rows = blockDim.x * kWidth, rows_at_once = blockDim.x * blockDim.y >> shift;
#pragma unroll 1
  for (unsigned first = 0; first < rows; first += rows_at_once) {
    const unsigned row = first + (thread >> shift);
    const int place = memory.place(row / kWidth, row % kWidth);
    auto state = row < rows ? memory.load_state(part, place) : empty_row_state<A>();
    if (shift > 0) state = lanes_merge<is_spread(kTarget)>(state, 1 << shift);
    if (row < rows) f(int(row), place, state, part);
  }
}

}  // namespace fusedloss::cuda
