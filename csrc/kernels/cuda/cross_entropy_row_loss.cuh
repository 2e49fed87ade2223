// From a row's statistics to its loss, and to the sums over a block's rows. All kernels use this.
#pragma once

#include "kernels/cuda/cross_entropy_options.cuh"
#include "kernels/cuda/math.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vec.cuh"

namespace fusedloss::cuda {

// What a thread sums over its rows.
struct LossAccumulator {
  LossSum sum;
  bool bad_target;
};

// A row's loss, and the values that the backward pass reads.
template <typename A>
struct RowResult {
  A loss, max, scale;
};

// Called by one thread of the row. x_y is the logit of the target class.
template <typename T, TargetKind kTarget, typename A>
__device__ __forceinline__ RowResult<A> loss_of_row(const RowTarget<T, kTarget>& row, RowState<A> state, A scale, T x_y,
                                                    LossAccumulator& accumulator) {
  const TypedOptions<T>& o = row.o;
  A loss = 0;
  if (row.contributes()) {
    // The sum is at least 1, because the largest logit adds 1. It is 0 if all logits are -inf.
    const A logsum = math::log_of_1_or_more(state.sum);
    // For a class index the mass has a closed form, which avoids C roundings.
    if (is_spread(kTarget) && row.y >= 0) state.mass = index_mass(A(0), o.weight_sum(), o.smoothing);
    if (is_spread(kTarget)) loss = expected_negative_log_likelihood(state, logsum);
    if (row.y >= 0) loss += o.smoothing.kept * row.w_y * negative_log_likelihood(widen(x_y), state.max, logsum);
    accumulator.sum.loss += double(loss);
    accumulator.sum.total_weight += row.has_probabilities() ? 1.0 : double(row.w_y);
  } else {
    state.max = scale = 0;
    if (o.target_index[row.number] != o.ignore_index) accumulator.bad_target = true;
  }
  return {loss, state.max, scale};
}

// Stores what the backward pass reads of the row and, without a reduction, the row's loss. Called by one thread.
template <typename T, TargetKind kTarget, typename A>
__device__ __forceinline__ void store_row_result(const RowTarget<T, kTarget>& row, const RowState<A>& state, A scale,
                                                 T x_y, LossAccumulator& accumulator) {
  const TypedOptions<T>& o = row.o;
  const RowResult<A> result = loss_of_row(row, state, scale, x_y, accumulator);
  const A loss[1] = {result.loss};
  static_cast<A*>(o.row_max)[row.number] = result.max;
  static_cast<A*>(o.row_scale)[row.number] = result.scale;
  if (o.reduction == Reduction::kNone) store_loss<T>(o.loss, o.loss_dtype != o.dtype, row.number, loss);
}

// The assert comes after all rows, because a call that may not return costs registers around it.
__device__ __forceinline__ LossSum checked(const LossAccumulator& accumulator) {
  assert(!accumulator.bad_target && "cross_entropy: a target is neither a class index nor ignore_index");
  return accumulator.sum;
}

// Called by all threads of the block.
__device__ __forceinline__ LossSum block_sum_of_threads(const LossAccumulator& of_thread) {
  return block_sum(checked(of_thread));
}

// One thread of the block stores the block's sum. A later kernel adds up the sums of all blocks.
__device__ __forceinline__ void store_block_sum(const CrossEntropyOptions& o, const LossSum& sum) {
  if (o.reduction != Reduction::kNone) static_cast<LossSum*>(o.scratch)[blockIdx.x] = sum;
}

// Called by all threads of the block, at the end of the kernel.
__device__ __forceinline__ void store_block_sum_of_threads(const CrossEntropyOptions& o,
                                                           const LossAccumulator& of_thread) {
  wait_for_launch_before();  // the launch before may still read its own sums in scratch
  const LossSum sum = block_sum_of_threads(of_thread);
  if (threadIdx.x + threadIdx.y == 0) store_block_sum(o, sum);
}

// The same where the sums are in shared memory, one for each row of the block: of_rows[blockDim.y]. The first warp adds
// them up.
__device__ __forceinline__ void store_block_sum_of_rows(const CrossEntropyOptions& o, const LossAccumulator* of_rows) {
  wait_for_launch_before();
  const int rows = int(blockDim.y), thread = int(threadIdx.y * blockDim.x + threadIdx.x);
  if (rows > 1) __syncthreads();
  if (thread >= kWarp) return;
  LossSum sum = {};
  for (int i = thread; i < rows; i += kWarp) sum += checked(of_rows[i]);
  if (rows > 1) sum = lanes_sum(sum);
  if (thread == 0) store_block_sum(o, sum);
}

}  // namespace fusedloss::cuda
