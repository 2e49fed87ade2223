// The kernels for rows whose classes are contiguous. A block has (threads of a row, rows) threads.
#pragma once

#include "kernels/cuda/cross_entropy_launch_bounds.h"
#include "kernels/cuda/cross_entropy_row.cuh"
#include "kernels/cuda/cross_entropy_row_gradient.cuh"
#include "kernels/cuda/cross_entropy_row_loss.cuh"
#include "kernels/cuda/cross_entropy_row_pipeline.cuh"
#include "kernels/cuda/loss_values.cuh"
#include "kernels/cuda/reduce.cuh"

namespace fusedloss::cuda {
namespace {  // internal linkage lets the compiler use shared memory addresses that cost fewer instructions
constexpr int kMaxRowsOfBlock = kLaneBlockThreads;  // reached where one lane takes a row

template <typename T, TargetKind kTarget, bool kShifted>
constexpr int kRowsMinBlocks = for_target<T, kTarget>(kRowsBlocks<kShifted>);

// Loss and gradient. Some lanes of a warp, a block or a cluster of blocks takes a row, and keeps it in shared memory
// from the read to the gradient.
template <typename T, TargetKind kTarget, bool kShifted>
__global__ void __launch_bounds__(kRowThreads, (kRowsMinBlocks<T, kTarget, kShifted>))
    forward_rows(const TypedOptions<T> o) {
  using A = AccumulateType<T>;
  using Pipeline = RowPipeline<T, kTarget>;
  const RowPlan& plan = o.plan;
  const int rank = rank_of_block(plan);                          // among the blocks of a row
  const int thread = rank * int(blockDim.x) + int(threadIdx.x);  // among the threads of a row
  __shared__ LossAccumulator sums[kMaxRowsOfBlock];  // one per row, for the row's first thread: registers are scarce
  if (threadIdx.x == 0) sums[threadIdx.y] = {};
  let_next_launch_start();
  if (plan.cluster) start_cluster_merge<A>();

  Pipeline pipeline(o, thread);
  const auto source_of = [&](int64_t number, int y) {
    return number < plan.rows ? Pipeline::source_of(Row<T, kTarget>(o, number, y)) : typename Pipeline::Source{};
  };
  int64_t number = group_of_block(plan) * blockDim.y + threadIdx.y;
  int y = o.class_of(o.target_at(number)), next_y = o.class_of(o.target_at(number + plan.step));
  pipeline.start(source_of(number, y));
  for (int turn = 0; number - threadIdx.y < plan.rows; ++turn) {
    const bool is_row = number < plan.rows;
    const int64_t next_number = number + plan.step;
    // Loaded here and used after this row, so that no thread waits for the load.
    const int64_t later_target = o.target_at(next_number + plan.step);
    const auto next = source_of(next_number, next_y);
    // All lanes of a warp must take part in the merge of statistics, even those past the last row. The row of such a
    // lane does not exist: its addresses are computed but never accessed.
    const Row<T, kTarget> row(o, number, y);
    const bool contributes = is_row && row.contributes();
    const auto range = range_of_thread(row, thread);
    const T x_y = prefetch_target_logit(row);
    auto state = empty_row_state<A>();
    if (contributes) {
      if (range.template units<1>() > 0) accumulate_tiles<1, Pipeline::kVectors>(state, row, range);
      pipeline.accumulate_row(state, row, range);
    }
    state = row_merge<is_spread(kTarget)>(state, turn);
    if (plan.cluster) state = cluster_merge<is_spread(kTarget)>(state, rank, plan.blocks, turn);
    const A scale = row.scale_of(state);
    if (is_row && thread == 0) store_row_result(row, state, scale, x_y, sums[threadIdx.y]);
    wait_for_launch_before();  // scale_grad_output reads total_weight
    if (contributes) {
      const A g = o.scale_grad_output(A(1));  // the forward pass has no grad_output
      write_gradient(row, gradient_factors(o, state.max, scale, g), range, x_y, [&](const GradientFactors<A>& factors) {
        pipeline.template write_row_vectors<kShifted>(row, factors, range, next);
      });
    } else {
      if (is_row) write_row_of_zeros(row, range);
      pipeline.start(next);
    }
    number = next_number;
    y = next_y;
    next_y = o.class_of(later_target);
  }
  store_block_sum_of_rows(o, sums);
}

// Loss only. Each class is read once and nothing is kept, which leaves registers and shared memory for more threads.
// For split rows, each block takes a part of a row and stores its statistics for finish_split_rows.
template <typename T, TargetKind kTarget>
__global__ void __launch_bounds__(kRowThreads, (for_target<T, kTarget>(kLossOnlyBlocks)))
    forward_rows_loss_only(const TypedOptions<T> o) {
  using A = AccumulateType<T>;
  const RowPlan& plan = o.plan;
  const int rank = rank_of_block(plan);
  const int thread = rank * int(blockDim.x) + int(threadIdx.x);
  __shared__ LossAccumulator sums[kMaxRowsOfBlock];
  if (threadIdx.x == 0) sums[threadIdx.y] = {};
  let_next_launch_start();
  int64_t number = group_of_block(plan) * blockDim.y + threadIdx.y, target = o.target_at(number);
  for (int turn = 0; number - threadIdx.y < plan.rows; number += plan.step, ++turn) {
    const bool is_row = number < plan.rows;
    const Row<T, kTarget> row(o, number, o.class_of(target));
    target = o.target_at(number + plan.step);  // used for the next row, so that no thread waits for the load
    const auto range = range_of_thread(row, thread);
    const T x_y = prefetch_target_logit(row);
    auto state = empty_row_state<A>();
    if (is_row && row.contributes()) {
      if (range.template units<1>() > 0) accumulate_tiles<1, kTileVectors<kTarget>>(state, row, range);
      accumulate_tiles<kVectorSize<T>, kTileVectors<kTarget>>(state, row, range);
    }
    state = row_merge<is_spread(kTarget)>(state, turn);
    if (plan.kernel == RowKernel::kSplitRows) {
      if (threadIdx.x == 0) static_cast<RowState<A>*>(o.scratch)[number * plan.blocks + rank] = state;
    } else if (is_row && thread == 0) {
      store_row_result(row, state, row.scale_of(state), x_y, sums[threadIdx.y]);
    }
  }
  if (plan.kernel != RowKernel::kSplitRows) store_block_sum_of_rows(o, sums);
}

// Loss and gradient of short rows. Some lanes of a warp take a row, and each lane keeps its part in registers, so that
// the row is read once.
template <typename T, TargetKind kTarget, bool kShifted>
__global__ void __launch_bounds__(kLaneBlockThreads, (for_target<T, kTarget>(kRegisterRowsBlocks<T, kShifted>)))
    forward_rows_in_registers(const TypedOptions<T> o) {
  using A = AccumulateType<T>;
  __shared__ LossAccumulator sums[kMaxRowsOfBlock];  // one per row, for the row's first lane
  if (threadIdx.x == 0) sums[threadIdx.y] = {};
  let_next_launch_start();
  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < o.plan.rows; first += o.plan.step) {
    const int64_t number = first + threadIdx.y;
    // All lanes of a warp must take part in the merge of statistics. Lanes past the last row read the block's first row
    // again.
    const bool is_row = number < o.plan.rows;
    const Row<T, kTarget> row(o, is_row ? number : first);
    const auto range = range_of_thread(row, int(threadIdx.x));
    // Loaded whether the row contributes or not: the load would otherwise wait for the target.
    const RowTile<T, kTarget, kVectorSize<T>, kRegisterVectors, false> tile(row, range, 0);
    const T x_y = prefetch_target_logit(row);
    auto state = empty_row_state<A>();
    on_spread<kTarget>(o, [&](auto spread) { accumulate_tile<decltype(spread)::value>(state, row, tile); });
    if (range.template units<1>() > 0) accumulate_tiles<1, kTileVectors<kTarget>>(state, row, range);
    state = lanes_merge<is_spread(kTarget)>(state, int(blockDim.x));
    const A scale = row.scale_of(state);
    if (is_row && threadIdx.x == 0) store_row_result(row, state, scale, x_y, sums[threadIdx.y]);
    wait_for_launch_before();  // scale_grad_output reads total_weight
    if (!is_row) continue;
    if (!row.contributes()) {
      write_row_of_zeros(row, range);
      continue;
    }
    const A g = o.scale_grad_output(A(1));  // the forward pass has no grad_output
    write_gradient(row, gradient_factors(o, state.max, scale, g), range, x_y, [&](const GradientFactors<A>& factors) {
      on_spread<kTarget>(o, [&](auto spread) { write_tile<decltype(spread)::value, kShifted>(row, factors, tile, 0); });
    });
  }
  store_block_sum_of_rows(o, sums);
}

// The backward pass. It takes the statistics from the forward pass, so that no thread waits for another.
template <typename T, TargetKind kTarget, bool kShifted>
__global__ void __launch_bounds__(kRowThreads, (kRowsMinBlocks<T, kTarget, kShifted>))
    backward_rows(const TypedOptions<T> o) {
  wait_for_launch_before();
  if (gradient_is_ready<T>(o)) return;
  using A = AccumulateType<T>;
  const RowPlan& plan = o.plan;
  const int rank = rank_of_block(plan);
  const int thread = rank * int(blockDim.x) + int(threadIdx.x);  // among the threads of a row
  for (int64_t i = group_of_block(plan) * blockDim.y + threadIdx.y; i < plan.rows; i += plan.step) {
    const Row<T, kTarget> row(o, i);
    const auto range = range_of_thread(row, thread);
    write_row<kShifted>(row, static_cast<const A*>(o.row_max)[i], static_cast<const A*>(o.row_scale)[i], range);
  }
}

}  // namespace
}  // namespace fusedloss::cuda
