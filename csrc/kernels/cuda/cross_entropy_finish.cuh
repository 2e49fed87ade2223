// What becomes of a row's statistics, whoever takes it: its loss, and what a block adds up over its rows.
#pragma once

#include "kernels/cuda/cross_entropy_row.cuh"
#include "kernels/cuda/math.cuh"

namespace fusedloss::cuda {

// What a thread adds up over its rows.
struct Partial {
  LossSum sum;
  bool bad_target;
};

// What a row's loss is, and what the backward pass is told of it.
template <typename A>
struct FinishedRow {
  A loss, max, scale;
};

// One thread of the row: statistics in, loss out. x_y: the target class's logit.
template <typename T, TargetKind kTarget, typename A>
__device__ __forceinline__ FinishedRow<A> loss_of_row(const RowTarget<T, kTarget>& row, RowState<A> state, A scale,
                                                      T x_y, Partial& partial) {
  const Problem<T>& o = row.o;
  A loss = 0;
  if (row.counts()) {
    // At least 1, from the largest logit; 0 where all are -inf.
    const A logsum = math::log_of_1_or_more(state.sum);
    // Of a class index, not rounded C times.
    if (is_spread(kTarget) && row.y >= 0) state.mass = index_mass(A(0), o.sum_of_weights(), o.smoothing);
    if (is_spread(kTarget)) loss = expected_negative_log_likelihood(state, logsum);
    if (row.y >= 0) loss += o.smoothing.kept * row.w_y * negative_log_likelihood(widen(x_y), state.max, logsum);
    partial.sum.loss += double(loss);
    partial.sum.weight += row.has_probabilities() ? 1.0 : double(row.w_y);
  } else {
    state.max = scale = 0;
    if (o.target_index[row.number] != o.ignore_index) partial.bad_target = true;
  }
  return {loss, state.max, scale};
}

template <typename T, TargetKind kTarget, typename A>
__device__ __forceinline__ void finish_row(const RowTarget<T, kTarget>& row, const RowState<A>& state, A scale, T x_y,
                                           Partial& partial) {
  const Problem<T>& o = row.o;
  const FinishedRow<A> finished = loss_of_row(row, state, scale, x_y, partial);
  const A loss[1] = {finished.loss};
  static_cast<A*>(o.row_max)[row.number] = finished.max;
  static_cast<A*>(o.row_scale)[row.number] = finished.scale;
  if (o.reduction == Reduction::kNone) store_loss<T>(o.loss, o.loss_dtype != o.dtype, row.number, loss);
}

// The assert comes after all rows: a call that may not return costs registers around it.
__device__ __forceinline__ LossSum checked(const Partial& partial) {
  assert(!partial.bad_target && "cross_entropy: a target is neither a class index nor ignore_index");
  return partial.sum;
}

// All threads of the block.
__device__ __forceinline__ LossSum finish_block(const Partial& of_thread) { return block_sum(checked(of_thread)); }

// One thread of the block stores the block's sum; a later kernel adds up the sums of all blocks.
__device__ __forceinline__ void leave_sum(const CrossEntropyOptions& o, const LossSum& sum) {
  if (o.reduction != Reduction::kNone) static_cast<LossSum*>(o.scratch)[blockIdx.x] = sum;
}

__device__ __forceinline__ void leave(const CrossEntropyOptions& o, const Partial& of_thread) {
  wait_for_launch_before();  // which may still read its own sums in scratch
  const LossSum sum = finish_block(of_thread);
  if (threadIdx.x + threadIdx.y == 0) leave_sum(o, sum);
}

// The same where each row has left what it adds in shared memory, of_row[blockDim.y]: the first warp adds them up.
__device__ __forceinline__ void leave_rows(const CrossEntropyOptions& o, const Partial* of_row) {
  wait_for_launch_before();
  const int rows = int(blockDim.y), thread = int(threadIdx.y * blockDim.x + threadIdx.x);
  if (rows > 1) __syncthreads();
  if (thread >= kWarp) return;
  LossSum sum = {};
  for (int i = thread; i < rows; i += kWarp) sum += checked(of_row[i]);
  if (rows > 1) sum = lanes_sum(sum);
  if (thread == 0) leave_sum(o, sum);
}

}  // namespace fusedloss::cuda
