// Sums and merged row statistics over the threads that share a row or a block. Every thread receives the result, which
// is bitwise identical from run to run: values are combined in a fixed order.
#pragma once

#include <cstring>

#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/math.cuh"
#include "kernels/formulas/cross_entropy-inl.h"

namespace fusedloss::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMaxRowWarps = 8;  // of a block that takes one row

// The sum over each group of `lanes` neighbouring lanes, a power of two. All lanes of the warp take part.
template <typename A>
__device__ __forceinline__ A lanes_sum(A value, int lanes = kWarp) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    if (distance < lanes) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

template <typename A>
__device__ __forceinline__ A lanes_max(A value, int lanes) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    if (distance < lanes) value = math::max(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}

// Rescaling each lane to the common maximum first takes one exp per lane; merging lanes in pairs would take ten.
template <bool kSpread, typename A>
__device__ __forceinline__ RowState<A> lanes_merge(RowState<A> state, int lanes) {
  state = rescale(state, lanes_max(state.max, lanes));
  state.sum = lanes_sum(state.sum, lanes);
  if constexpr (kSpread) {
    state.dot = lanes_sum(state.dot, lanes);
    state.mass = lanes_sum(state.mass, lanes);
  }
  return state;
}

// Lane i of every warp receives the value of the block's warp i, or `none` if there are fewer warps. All threads of the
// block take part, once in a kernel: a second exchange would overwrite what other threads still read.
template <typename V>
__device__ __forceinline__ V exchange_between_warps(const V& value, const V& none) {
  __shared__ V of_warp[kWarp];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int lane = thread % kWarp;
  if (lane == 0) of_warp[thread / kWarp] = value;
  __syncthreads();
  return lane * kWarp < int(blockDim.x * blockDim.y) ? of_warp[lane] : none;
}

__device__ __forceinline__ double block_sum(double value) {
  return lanes_sum(exchange_between_warps(lanes_sum(value), 0.0));
}

// Two sums over rows: their losses, and the weights of their target classes. Each block stores one LossSum in scratch
// memory.
struct alignas(16) LossSum {
  double loss, total_weight;

  __device__ __forceinline__ LossSum& operator+=(const LossSum& other) {
    loss += other.loss;
    total_weight += other.total_weight;
    return *this;
  }
};

__device__ __forceinline__ LossSum lanes_sum(const LossSum& of_lane) {
  return {lanes_sum(of_lane.loss), lanes_sum(of_lane.total_weight)};
}

// Both sums share the same barriers.
__device__ __forceinline__ LossSum block_sum(const LossSum& of_thread) {
  return lanes_sum(exchange_between_warps(lanes_sum(of_thread), LossSum{}));
}

constexpr int kSumThreads = 1024;  // threads of a block that adds up what other blocks have stored
constexpr int kLoadsAtOnce = 8;    // loads of a thread of such a block that are in flight together

// Adds up what the blocks of an earlier launch have stored, V[blocks], with the threads of one block.
template <typename V>
__device__ __forceinline__ V sum_of_blocks(const void* stored, int blocks) {
  V sum = {};
  for (int first = int(threadIdx.x); first < blocks; first += kLoadsAtOnce * int(blockDim.x)) {
    V values[kLoadsAtOnce];
#pragma unroll
    for (int k = 0; k < kLoadsAtOnce; ++k) {
      const int i = first + k * int(blockDim.x);
      values[k] = i < blocks ? static_cast<const V*>(stored)[i] : V{};
    }
#pragma unroll
    for (int k = 0; k < kLoadsAtOnce; ++k) sum += values[k];
  }
  return block_sum(sum);
}

// Merges over the threads of a row within a block: threadIdx.x in [0, blockDim.x), which are some lanes of a warp or
// the whole block. `turn` counts the calls: the warps write to one of two places in turn, so that one barrier per call
// is enough. When a warp writes to a place again, all threads have read its old contents, because they have passed the
// barrier of the call in between.
template <bool kSpread, typename A>
__device__ __forceinline__ RowState<A> row_merge(RowState<A> state, int turn) {
  state = lanes_merge<kSpread>(state, int(blockDim.x));
  if (blockDim.x <= kWarp) return state;
  __shared__ RowState<A> of_warp[2][kMaxRowWarps];
  if (threadIdx.x % kWarp == 0) of_warp[turn % 2][threadIdx.x / kWarp] = state;
  __syncthreads();
  const int from = int(threadIdx.x) % kMaxRowWarps;
  return lanes_merge<kSpread>(from * kWarp < int(blockDim.x) ? of_warp[turn % 2][from] : empty_row_state<A>(),
                              kMaxRowWarps);
}

// ---- Over the blocks of a cluster
//
// Each block sends its state of a row to all blocks. The states of successive rows go to two places in turn, selected
// by `turn`, and each place has its own arrival barrier. A place is never overwritten too early: a block sends its
// state of row r + 2 only after it has received every block's state of row r + 1. Each block sends that state only
// after all of its threads have read the states of row r and passed the barrier in row_merge. No block ends before it
// has received everything that is sent to it.

template <typename A>
struct ClusterStates {
  alignas(16) RowState<A> of_block[2][kMaxCluster];
  uint64_t arrived[2];
};
template <typename A>
__device__ __forceinline__ ClusterStates<A>& cluster_states() {
  __shared__ ClusterStates<A> states;
  return states;
}

// All threads of all blocks of the cluster call this once, since a block must have started before others send to it.
template <typename A>
__device__ __forceinline__ void start_cluster_merge() {
  if (threadIdx.x == 0) start_arrivals(cluster_states<A>().arrived);
  cluster_sync();
}

// Merges over the blocks of a cluster. All threads of a block already have the block's state.
template <bool kSpread, typename A>
__device__ __forceinline__ RowState<A> cluster_merge(const RowState<A>& state, int rank, int blocks, int turn) {
  ClusterStates<A>& states = cluster_states<A>();
  RowState<A>(&of_block)[kMaxCluster] = states.of_block[turn % 2];
  const auto arrived = shared_address(&states.arrived[turn % 2]);
  const unsigned parity = turn / 2 % 2;
  if (threadIdx.x == 0) expect_arrivals(arrived, unsigned(blocks * sizeof(RowState<A>)));
  if (int(threadIdx.x) < blocks) {
    constexpr int kPieces = sizeof(RowState<A>) / sizeof(uint4);
    static_assert(kPieces * sizeof(uint4) == sizeof(RowState<A>));
    uint4 pieces[kPieces];
    memcpy(pieces, &state, sizeof state);
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      send_to_block(int(threadIdx.x), reinterpret_cast<uint4*>(&of_block[rank]) + i, pieces[i], arrived);
  }
  wait_for_arrivals(arrived, parity);
  const int from = threadIdx.x % kMaxCluster;
  return lanes_merge<kSpread>(from < blocks ? of_block[from] : empty_row_state<A>(), kMaxCluster);
}

}  // namespace fusedloss::cuda
