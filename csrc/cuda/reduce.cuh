// Sums, and merged row statistics, over the threads that share a row or a block. Every thread receives the result, and
// its bits depend on nothing but the inputs: values meet in a fixed order.
#pragma once

#include "cuda/formulas.cuh"

namespace fusedloss::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMaxCluster = 8;  // blocks; what every GPU that has clusters can do

// Over each group of `lanes` neighbouring lanes, a power of two. All lanes of the warp take part.
template <typename A>
__device__ __forceinline__ A lanes_sum(A value, int lanes = kWarp) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    if (distance < lanes) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

template <typename A>
__device__ __forceinline__ A lanes_max(A value, int lanes = kWarp) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    if (distance < lanes) value = math::max(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}

// Moving each lane to the common maximum first takes one exp a lane; merging lanes in pairs would take ten.
template <bool kSpread, typename A>
__device__ __forceinline__ RowState<A> lanes_merge(RowState<A> state, int lanes = kWarp) {
  state = rescale(state, lanes_max(state.max, lanes));
  state.sum = lanes_sum(state.sum, lanes);
  if constexpr (kSpread) {
    state.dot = lanes_sum(state.dot, lanes);
    state.mass = lanes_sum(state.mass, lanes);
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
  return lanes_sum(exchange_between_warps(lanes_sum(value), 0.0));
}

// Sums over rows. A block leaves one in scratch memory.
struct alignas(16) LossSum {
  double loss, weight;

  __device__ __forceinline__ LossSum& operator+=(const LossSum& other) {
    loss += other.loss;
    weight += other.weight;
    return *this;
  }
};

__device__ __forceinline__ LossSum block_sum(const LossSum& of_thread) {
  return {block_sum(of_thread.loss), block_sum(of_thread.weight)};
}

constexpr int kSumThreads = 1024;  // of a block that adds up what other blocks have left
constexpr int kLoadsAtOnce = 8;    // of a thread of such a block: it waits for memory once for all of them

// The sum of what the blocks of an earlier launch have left, V[blocks], by the threads of one block.
template <typename V>
__device__ __forceinline__ V sum_of_blocks(const void* left, int blocks) {
  V sum = {};
  for (int first = int(threadIdx.x); first < blocks; first += kLoadsAtOnce * int(blockDim.x)) {
    V values[kLoadsAtOnce];
#pragma unroll
    for (int k = 0; k < kLoadsAtOnce; ++k) {
      const int i = first + k * int(blockDim.x);
      values[k] = i < blocks ? static_cast<const V*>(left)[i] : V{};
    }
#pragma unroll
    for (int k = 0; k < kLoadsAtOnce; ++k) sum += values[k];
  }
  return block_sum(sum);
}

// Over the threads of a row within a block: threadIdx.x in [0, blockDim.x), some lanes of a warp or the whole block.
template <bool kSpread, typename A>
__device__ __forceinline__ RowState<A> row_merge(RowState<A> state) {
  state = lanes_merge<kSpread>(state, int(blockDim.x));
  if (blockDim.x <= kWarp) return state;
  return lanes_merge<kSpread>(exchange_between_warps(state, empty_row_state<A>()));
}

// ---- Clusters: blocks that run at the same time, and reach into each other's shared memory

#if FUSEDLOSS_HAS_CLUSTERS

// Waits for all threads of the cluster, and orders what they did before.
__device__ __forceinline__ void cluster_sync() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}

// What p, in shared memory, is in another block of the cluster.
template <typename V>
__device__ __forceinline__ V* in_block_of_cluster(V* p, int rank) {
  return static_cast<V*>(__cluster_map_shared_rank(p, unsigned(rank)));
}

// Over the blocks of a cluster, where all threads of a block have its state already. `turn` counts the calls; each block
// tells all others its state, in one of two places in turn, so that one barrier is enough: no block is more than one
// barrier ahead of another, so what it writes for the next turn is not what a slow one still reads of this.
template <bool kSpread, typename A>
__device__ __forceinline__ RowState<A> cluster_merge(const RowState<A>& state, int rank, int blocks, int turn) {
  __shared__ RowState<A> of_block[2][kMaxCluster];
  const int from = threadIdx.x % kMaxCluster;
  if (int(threadIdx.x) < blocks)
    *in_block_of_cluster(&of_block[turn % 2][rank], int(threadIdx.x)) = state;
  cluster_sync();
  return lanes_merge<kSpread>(from < blocks ? of_block[turn % 2][from] : empty_row_state<A>(), kMaxCluster);
}

#else

// Never launched in clusters: the host asks whether these were compiled.
__device__ __forceinline__ void cluster_sync() { __trap(); }
template <typename V>
__device__ __forceinline__ V* in_block_of_cluster(V* p, int) {
  return p;
}
template <bool kSpread, typename A>
__device__ __forceinline__ RowState<A> cluster_merge(const RowState<A>& state, int, int, int) {
  return state;
}

#endif

}  // namespace fusedloss::cuda
