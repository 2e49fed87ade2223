// What becomes of a row's statistics, for rows and for columns: its loss, and what a block adds up over its rows.
#pragma once

#include "cuda/cross_entropy_row.cuh"

namespace fusedloss::cuda {

// What a thread adds up over its rows.
struct Partial {
  LossSum sum;
  bool bad_target;
};

// One thread of the row: statistics in, loss out. x_y: the target class's logit. AnyRow: Row, or what columns know of
// one.
template <bool kSpread, typename T, typename AnyRow, typename A>
__device__ __forceinline__ void finish_row(const AnyRow& row, RowState<A> state, A scale, T x_y, Partial& partial) {
  const Problem<T>& o = row.o;
  A loss[1] = {0};
  if (row.counts()) {
    const A logsum = math::log(state.sum);
    if (kSpread && row.y >= 0) state.mass = index_mass(A(0), o.sum_of_weights(), o.smoothing);  // not rounded C times
    if (kSpread) loss[0] = expected_negative_log_likelihood(state, logsum);
    if (row.y >= 0) loss[0] += o.smoothing.kept * row.w_y * negative_log_likelihood(widen(x_y), state.max, logsum);
    partial.sum.loss += double(loss[0]);
    partial.sum.weight += row.has_probabilities() ? 1.0 : double(row.w_y);
  } else {
    state.max = scale = 0;
    if (o.target_index[row.number] != o.ignore_index) partial.bad_target = true;
  }
  static_cast<A*>(o.row_max)[row.number] = state.max;
  static_cast<A*>(o.row_scale)[row.number] = scale;
  if (o.reduction == Reduction::kNone) store_loss<T>(o.loss, o.loss_dtype != o.dtype, row.number, loss);
}

// All threads of the block. The assert waits until here since a call that may return costs registers around it.
__device__ __forceinline__ LossSum finish_block(const Partial& of_thread) {
  assert(!of_thread.bad_target && "cross_entropy: a target is neither a class index nor ignore_index");
  return block_sum(of_thread.sum);
}

__device__ __forceinline__ void leave(const CrossEntropyOptions& o, const Partial& of_thread) {
  wait_for_launch_before();  // which may still read its own sums in scratch
  const LossSum sum = finish_block(of_thread);
  if (o.reduction != Reduction::kNone && threadIdx.x + threadIdx.y == 0)
    static_cast<LossSum*>(o.scratch)[blockIdx.x] = sum;
}

}  // namespace fusedloss::cuda
