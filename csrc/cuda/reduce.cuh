// Sums, and merged row statistics, over a warp, a row's threads or a block. Every thread receives the result, and
// its bits depend on nothing but the inputs: values meet in a fixed order.
#pragma once

#include "cuda/formulas.cuh"

namespace fusedloss::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

template <typename A>
__device__ __forceinline__ A warp_max(A value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value = math::max(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}

// Moving each lane to the warp's maximum first takes one exp a lane; merging lanes in pairs would take ten.
template <bool kSpread, typename A>
__device__ __forceinline__ RowState<A> warp_merge(RowState<A> state) {
  state = rescale(state, warp_max(state.max));
  state.sum = warp_sum(state.sum);
  if constexpr (kSpread) {
    state.dot = warp_sum(state.dot);
    state.mass = warp_sum(state.mass);
  }
  return state;
}

// Lane i of every warp receives the value of the block's warp i, or `none` where there are fewer warps. All threads of
// the block take part.
template <typename V>
__device__ __forceinline__ V exchange_between_warps(const V& value, const V& none) {
  __shared__ V of_warp[kWarp];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int lane = thread % kWarp;
  __syncthreads();  // the previous exchange has been read
  if (lane == 0) of_warp[thread / kWarp] = value;
  __syncthreads();
  return lane * kWarp < int(blockDim.x * blockDim.y) ? of_warp[lane] : none;
}

__device__ __forceinline__ double block_sum(double value) {
  return warp_sum(exchange_between_warps(warp_sum(value), 0.0));
}

// A row has blockDim.x threads: one warp of a block that holds several rows, or a whole block.
template <typename A>
__device__ __forceinline__ A row_sum(A value) {
  value = warp_sum(value);
  return blockDim.x == kWarp ? value : warp_sum(exchange_between_warps(value, A(0)));
}

template <bool kSpread, typename A>
__device__ __forceinline__ RowState<A> row_merge(RowState<A> state) {
  state = warp_merge<kSpread>(state);
  if (blockDim.x == kWarp) return state;
  return warp_merge<kSpread>(exchange_between_warps(state, empty_row_state<A>()));
}

}  // namespace fusedloss::cuda
