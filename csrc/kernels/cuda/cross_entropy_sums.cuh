// The kernels that add up what blocks have stored in scratch memory: the losses, the weights that the mean divides by,
// and the statistics of split rows. Every sum is taken in a fixed order.
#pragma once

#include "kernels/cuda/cross_entropy_options.cuh"
#include "kernels/cuda/cross_entropy_row.cuh"
#include "kernels/cuda/cross_entropy_row_loss.cuh"
#include "kernels/cuda/loss_values.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vec.cuh"

namespace fusedloss::cuda {
// ---- The loss, after the rows

// One block adds up the sums of the rows' blocks. has_total_weight: another kernel has stored total_weight.
template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    finish_loss(const CrossEntropyOptions o, int blocks, bool has_total_weight) {
  wait_for_launch_before();
  const LossSum sum = sum_of_blocks<LossSum>(o.scratch, blocks);
  if (threadIdx.x != 0) return;
  store_reduced_loss<T>(o, sum);
  if (o.reduction == Reduction::kMean && !has_total_weight) store_total_weight<T>(o, sum.total_weight);
}

// ---- Split rows

constexpr int kSplitThreads = 256;
constexpr int64_t kMaxSplitBlocks = 1024;

// The number of lanes that merge the statistics of one row.
FUSEDLOSS_ANYWHERE int lanes_of_split(int blocks) {
  int lanes = 1;
  while (lanes < kWarp && lanes < blocks) lanes *= 2;
  return lanes;
}

// Some lanes of a warp merge the statistics that a row's blocks have stored, and one of them stores the row's loss. If
// this kernel has only one block, it also stores the reduced loss. Otherwise each block stores its sum for finish_loss.
template <typename T, TargetKind kTarget>
__global__ void __launch_bounds__(kSplitThreads) finish_split_rows(const TypedOptions<T> o, LossSum* sums) {
  using A = AccumulateType<T>;
  const int lanes = lanes_of_split(o.plan.blocks);
  const int lane = threadIdx.x % lanes, rows_at_once = blockDim.x / lanes;
  wait_for_launch_before();
  LossAccumulator of_thread = {};
  for (int64_t first = int64_t(blockIdx.x) * rows_at_once; first < o.plan.rows;
       first += int64_t(gridDim.x) * rows_at_once) {
    const int64_t i = first + threadIdx.x / lanes;
    const bool is_row = i < o.plan.rows;
    const Row<T, kTarget> row(o, is_row ? i : 0);
    const T x_y = prefetch_target_logit(row);
    const auto* states = static_cast<const RowState<A>*>(o.scratch) + row.number * o.plan.blocks;
    auto state = empty_row_state<A>();
    for (int block = lane; block < o.plan.blocks; block += lanes) state = merge(state, states[block]);
    state = lanes_merge<is_spread(kTarget)>(state, lanes);
    const A scale = row.scale_of(state);
    if (is_row && lane == 0) store_row_result(row, state, scale, x_y, of_thread);
  }
  const LossSum sum = block_sum_of_threads(of_thread);
  if (threadIdx.x != 0 || o.reduction == Reduction::kNone) return;
  if (gridDim.x > 1) {
    sums[blockIdx.x] = sum;
    return;
  }
  store_result<T>(o, sum);
}

// ---- The sum of the target classes' weights, which the mean divides by: before the rows, if their gradient needs it

template <typename T>
__global__ void __launch_bounds__(kSumThreads) sum_target_weights(const TypedOptions<T> o) {
  double sum = 0;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; first < o.plan.rows;
       first += kLoadsAtOnce * step) {
    int64_t index[kLoadsAtOnce];
#pragma unroll
    for (int k = 0; k < kLoadsAtOnce; ++k)
      index[k] = first + k * step < o.plan.rows ? o.target_index[first + k * step] : o.ignore_index;
    AccumulateType<T> weight[kLoadsAtOnce];
#pragma unroll
    for (int k = 0; k < kLoadsAtOnce; ++k) {
      const int y = o.class_of(index[k]);
      weight[k] = y < 0 ? AccumulateType<T>(0) : o.weight_of(y);
    }
#pragma unroll
    for (int k = 0; k < kLoadsAtOnce; ++k) sum += double(weight[k]);
  }
  let_next_launch_start();  // not earlier: the rows' loads would delay this kernel's, and the rows wait for this sum
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) store_total_weight<T>(o, sum);
  else static_cast<double*>(o.scratch)[blockIdx.x] = sum;
}

// One block adds up the sums of sum_target_weights' blocks.
template <typename T>
__global__ void __launch_bounds__(kSumThreads) finish_target_weights(const CrossEntropyOptions o, int blocks) {
  let_next_launch_start();
  wait_for_launch_before();
  const double sum = sum_of_blocks<double>(o.scratch, blocks);
  if (threadIdx.x == 0) store_total_weight<T>(o, sum);
}

}  // namespace fusedloss::cuda
