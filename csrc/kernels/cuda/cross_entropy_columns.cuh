// The kernels for columns: rows that are neighbours in memory, as in (N, C, d1, …), and rows of a few classes that
// cross_entropy_few_classes.cuh cannot take.
//
// A thread takes kWidth neighbouring rows side by side: one 16-byte load brings one class of all of them. Where
// alignment does not allow this, kWidth is 1. A block has (threads side by side, threads along the classes) threads,
// and keeps all classes of its rows in shared memory. If they do not fit, several blocks share the same rows ("split"),
// and the logits are read twice (cross_entropy_plan_columns.h decides).
//
// A block goes through four steps. Shared memory carries the data from one to the next:
//   1. Each thread reads its classes, and computes the statistics of kWidth rows (cross_entropy_column_tiles.cuh).
//   2. The statistics are merged: with shuffles in a warp, then in shared memory (cross_entropy_column_exchange.cuh).
//   3. For each row, one thread computes the row's loss, and stores what the gradient needs of the row.
//   4. Each thread loads this for its kWidth rows, and reads its classes again to write the gradient
//      (cross_entropy_column_gradient.cuh).
// Blocks that share rows do steps 1 and 2, and finish_split_rows merges their statistics. The backward pass has the
// statistics already, so it starts in step 3 by storing what the gradient needs.
#pragma once

#include "kernels/cuda/cross_entropy_column_exchange.cuh"
#include "kernels/cuda/cross_entropy_column_gradient.cuh"
#include "kernels/cuda/cross_entropy_column_tiles.cuh"
#include "kernels/cuda/cross_entropy_launch_bounds.h"
#include "kernels/cuda/cross_entropy_row_loss.cuh"
#include "kernels/cuda/loss_values.cuh"

namespace fusedloss::cuda {

// A block's number among the blocks that share its rows, and its range of classes. Neighbouring blocks have the same
// classes of neighbouring rows, so that together they read contiguous memory. The backward pass takes the blocks in
// reverse order, because the cache may still hold what was read last.
struct ColumnBlock {
  int rank;
  unsigned group;
  int begin, end;  // range of classes

  __device__ __forceinline__ ColumnBlock(const CrossEntropyOptions& o, const RowPlan& plan, bool reverse) {
    const unsigned index = reverse ? plan.grid - 1 - blockIdx.x : blockIdx.x, groups = plan.columns.groups;
    rank = int(index / groups);
    group = index - rank * groups;
    begin = rank * plan.columns.classes_of_block;
    end = int(smaller(begin + plan.columns.classes_of_block, o.classes));
  }
};

// Loss and gradient, or loss only. A block takes all classes of its rows.
template <typename T, TargetKind kTarget, int kWidth>
__global__ void __launch_bounds__((for_target<T, kTarget>(kColumnThreads)), (for_target<T, kTarget>(kColumnsBlocks)))
    forward_columns(const TypedOptions<T> o) {
  using A = AccumulateType<T>;
  constexpr bool kStages = kWidth > 1;  // slots keep the classes for the gradient; otherwise they are read again
  const RowPlan& plan = o.plan;
  const ColumnPlan& columns = plan.columns;
  const ColumnSharedMemory<T, kTarget, kWidth> memory(columns);
  const bool wants_gradient = o.grad_logits != nullptr;
  let_next_launch_start();
  LossAccumulator sum = {};
  for (int64_t first = int64_t(blockIdx.x) * blockDim.x; first < columns.units; first += plan.step) {
    RowState<A> state[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) state[i] = empty_row_state<A>();
    const bool is_there = first + threadIdx.x < columns.units;
    if (threadIdx.y == 0 && is_there && o.target_index != nullptr)
      prefetch_to_l2(o.target_index + (first + threadIdx.x) * kWidth);
    if (is_there)
      accumulate_columns<kStages ? Staging::kIfSlots : Staging::kNever>(
          state, ThreadColumns<T, kTarget, kWidth>(o, first + threadIdx.x, int(threadIdx.y)));
    const int threads = int(blockDim.x * blockDim.y), in_block = threadIdx.y * blockDim.x + threadIdx.x;
    // The target of this thread's next row in step 3, loaded ahead.
    int64_t next_target = o.target_at(first * kWidth + (in_block >> columns.sets_shift));
    store_states(memory, state);
    wait_for_launch_before();  // scale_grad_output reads total_weight
    const A grad_output = wants_gradient ? o.scale_grad_output(A(1)) : A(0);
    for_each_merged_row(memory, columns.sets_shift, [&](int of_block, int place, const RowState<A>& merged, int part) {
      const int64_t number = first * kWidth + of_block, target = next_target;
      next_target = o.target_at(number + (threads >> columns.sets_shift));
      if (part != 0 || number >= plan.rows) return;
      const RowTarget<T, kTarget> row(o, number, o.class_of(target));
      const A scale = row.scale_of(merged);
      const T x_y = row.y >= 0 ? logit_of_target<kWidth, kStages>(row, of_block) : T();
      store_row_result(row, merged, scale, x_y, sum);
      if (wants_gradient)
        store_gradient_factors(memory, columns.last_set, place, row, merged.max, scale, grad_output, true, x_y);
    });
    if (!wants_gradient) continue;
    __syncthreads();
    if (is_there)
      write_columns<kStages>(ThreadColumns<T, kTarget, kWidth>(o, first + threadIdx.x, int(threadIdx.y)),
                             FactorsInSharedMemory<T, kTarget, kWidth>{memory, columns.last_set});
  }
  store_block_sum_of_threads(o, sum);
}

// A thread takes all classes of its rows. Nothing is exchanged, and the work for a row besides its classes is done for
// all of the thread's rows side by side. Without a gradient, there are registers for more threads if targets do not
// occupy any while the classes are read; so they are only prefetched to the cache before that.
template <typename T, TargetKind kTarget, int kWidth, bool kWithGradient>
__global__ void __launch_bounds__(kColumnThreadsAcross, (for_target<T, kTarget>(kThreadColumnsBlocks<kWithGradient>)))
    forward_columns_of_thread(const TypedOptions<T> o) {
  using A = AccumulateType<T>;
  constexpr bool kStages = kWithGradient && kWidth > 1;
  const RowPlan& plan = o.plan;
  let_next_launch_start();
  LossAccumulator sum = {};
  for (int64_t unit = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; unit < plan.columns.units; unit += plan.step) {
    const ThreadColumns<T, kTarget, kWidth> rows(o, unit, 0);
    const int64_t first = unit * kWidth;
    int64_t target[kWidth];
    RowState<A> state[kWidth];
    const auto load_targets = [&] {
      if constexpr (kWidth % 2 == 0) {
        if (o.target_index && reinterpret_cast<uintptr_t>(o.target_index) % sizeof(longlong2) == 0) {
#pragma unroll
          for (int i = 0; i < kWidth; i += 2) {
            const auto pair = *reinterpret_cast<const longlong2*>(o.target_index + first + i);
            target[i] = pair.x;
            target[i + 1] = pair.y;
          }
          return;
        }
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) target[i] = o.target_index ? o.target_index[first + i] : -1;
    };
    if constexpr (kWithGradient) load_targets();
    else if (o.target_index) prefetch_to_l2(o.target_index + first);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) state[i] = empty_row_state<A>();
    accumulate_columns<kStages ? Staging::kAlways : Staging::kNever>(state, rows);
    if constexpr (!kWithGradient) load_targets();
    wait_for_launch_before();  // scale_grad_output reads total_weight
    FactorsInRegisters<T, kTarget, kWidth> gradient;
    gradient.common_grad_output = kWithGradient ? o.scale_grad_output(A(1)) : A(0);
    A loss[kWidth], scale[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const RowTarget<T, kTarget> row(o, first + i, o.class_of(target[i]));
      const T x_y = row.y < 0 ? T() : rows.template logit<kStages>(row.y, i);
      const auto finished = loss_of_row(row, state[i], row.scale_of(state[i]), x_y, sum);
      loss[i] = finished.loss;
      scale[i] = finished.scale;
      gradient.prepare(i, row, finished, x_y);
    }
    store_values(static_cast<A*>(o.row_max) + first, gradient.maxima);
    store_values(static_cast<A*>(o.row_scale) + first, scale);
    if (o.reduction == Reduction::kNone) store_loss<T>(o.loss, o.loss_dtype != o.dtype, first, loss);
    if constexpr (kWithGradient) write_columns<kStages>(rows, gradient);
  }
  store_block_sum_of_threads(o, sum);
}

// A block takes a range of the classes of its rows, and stores each row's statistics for finish_split_rows.
template <typename T, TargetKind kTarget, int kWidth>
__global__ void __launch_bounds__(kSplitColumnThreads, (for_target<T, kTarget>(kSplitColumnsBlocks)))
    forward_columns_split(const TypedOptions<T> o) {
  using A = AccumulateType<T>;
  const RowPlan& plan = o.plan;
  const ColumnPlan& columns = plan.columns;
  const ColumnSharedMemory<T, kTarget, kWidth> memory(columns);
  const ColumnBlock block(o, plan, /*reverse=*/false);
  let_next_launch_start();
  for (int64_t first = int64_t(block.group) * blockDim.x; first < columns.units; first += plan.step) {
    RowState<A> state[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) state[i] = empty_row_state<A>();
    if (first + threadIdx.x < columns.units)
      accumulate_columns<Staging::kNever>(
          state, ThreadColumns<T, kTarget, kWidth>(o, first + threadIdx.x, int(threadIdx.y), block.begin, block.end));
    store_states(memory, state);
    for_each_merged_row(memory, columns.sets_shift, [&](int of_block, int, const RowState<A>& merged, int part) {
      const int64_t number = first * kWidth + of_block;
      if (part == 0 && number < plan.rows)
        static_cast<RowState<A>*>(o.scratch)[number * plan.blocks + block.rank] = merged;
    });
  }
}

// The backward pass. The rows' statistics are known, so no thread waits for another block.
template <typename T, TargetKind kTarget, int kWidth>
__global__ void __launch_bounds__(kSplitColumnThreads, (for_target<T, kTarget>(kSplitColumnsBlocks)))
    backward_columns(const TypedOptions<T> o) {
  wait_for_launch_before();
  if (gradient_is_ready<T>(o)) return;
  using A = AccumulateType<T>;
  const RowPlan& plan = o.plan;
  const ColumnPlan& columns = plan.columns;
  const ColumnSharedMemory<T, kTarget, kWidth> memory(columns);
  const ColumnBlock block(o, plan, /*reverse=*/true);
  const int threads = int(blockDim.x * blockDim.y);
  A grad_output = o.scale_grad_output(grad_output_at<T>(o, 0));
  for (int64_t first = int64_t(block.group) * blockDim.x; first < columns.units; first += plan.step) {
    __syncthreads();  // all threads have read the factors of the previous rows
#pragma unroll 2
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < int(blockDim.x) * kWidth; i += threads) {
      const int64_t number = first * kWidth + i;
      if (number >= plan.rows) continue;
      const RowTarget<T, kTarget> row(o, number, o.class_of(o.target_at(number)));
      if (o.grad_output_stride != 0) grad_output = o.scale_grad_output(grad_output_at<T>(o, number));
      const bool is_here = row.y >= block.begin && row.y < block.end;
      const T x_y = is_here ? logit_of_target<kWidth, false>(row, i) : T();
      store_gradient_factors(memory, columns.last_set, memory.place(i / kWidth, i % kWidth), row,
                             static_cast<const A*>(o.row_max)[number], static_cast<const A*>(o.row_scale)[number],
                             grad_output, is_here, x_y);
    }
    __syncthreads();
    if (first + threadIdx.x < columns.units)
      write_columns<false>(
          ThreadColumns<T, kTarget, kWidth>(o, first + threadIdx.x, int(threadIdx.y), block.begin, block.end),
          FactorsInSharedMemory<T, kTarget, kWidth>{memory, columns.last_set});
  }
}

}  // namespace fusedloss::cuda
