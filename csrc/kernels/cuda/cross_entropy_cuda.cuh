// How a row of logits becomes a loss, and a gradient, on the GPU.
//
// The threads of a row sweep its classes once. Each keeps the statistics of what it has seen (online softmax, see
// formulas/cross_entropy.h), a tile of several 16-byte vectors at a time: all loads, then the tile's maximum, one exp a
// class, one rescaling. The threads merge their statistics, and one of them makes the row's loss of them. In training
// they sweep once more, and write the gradient. What they read in the first sweep they have kept in shared memory, if
// there is room: the logits are then read from memory once and the gradient is written once, and nothing else is of that
// size. cross_entropy_stream.cuh says how a row comes into shared memory. Where no gradient is wanted, nothing is kept
// (forward_rows_loss_only), which leaves registers and shared memory for more threads.
//
// Who shares a row is a matter of its length, and of how many there are (cross_entropy_plan.h decides):
//   a thread, in registers      up to 16 classes, rows one behind another from a 16-byte boundary (cross_entropy_few.cuh)
//   a thread, or several        other rows of up to 16 classes, and rows that are neighbours in memory, as in
//                               (N, C, d1, …): "columns", of which a thread takes as many side by side as 16 bytes hold
//                               (cross_entropy_columns.cuh)
//   some lanes of a warp        up to a few thousand classes; in registers up to 4 KB (cross_entropy_lanes.cuh)
//   a block                     more than those
//   a cluster of blocks         more than the shared memory of one block keeps
//   blocks apart                few, long rows, and columns that a block cannot keep: "split"; they meet in scratch
//                               memory, and a second kernel goes on
//
// Launches: the sum of the weights, if the mean's gradient needs it, in one or two; the rows, and of split rows their end
// and their gradient; the sum of the blocks' losses. Every sum is taken in a fixed order, and no launch waits for the
// host.
//
// Each type of the logits has a .cu file that includes this one, so that the types compile side by side.
#pragma once

#include "kernels/cuda/cross_entropy_cuda.h"

#include "kernels/cuda/cross_entropy_columns.cuh"
#include "kernels/cuda/cross_entropy_few.cuh"
#include "kernels/cuda/cross_entropy_lanes.cuh"
#include "kernels/cuda/cross_entropy_stream.cuh"

namespace fusedloss::cuda {
namespace {

constexpr int kSplitThreads = 256;
constexpr int64_t kMostSplitBlocks = 1024;
// Of a warp, for each row.
FUSEDLOSS_ANYWHERE int lanes_of_split(int blocks) {
  int lanes = 1;
  while (lanes < kWarp && lanes < blocks) lanes *= 2;
  return lanes;
}

// Threads that a multiprocessor must hold at once. Said outright since the compiler, left to choose, spills registers
// to make room for a few more.
template <typename T, TargetKind kTarget, bool kShifted>
constexpr int kResident = sizeof(T) == 8                              ? 256
                          : kTarget == TargetKind::kProbabilities     ? 512
                          : kShifted && kTarget != TargetKind::kIndex ? 512
                                                                      : 768;
template <typename T, TargetKind kTarget>
constexpr int kAloneResident = sizeof(T) == 8 ? 256 : is_spread(kTarget) ? 768 : 1024;

// A row's loss and its gradient: for rows that a block, or a cluster of blocks, keeps.
template <typename T, TargetKind kTarget, bool kShifted>
__global__ void __launch_bounds__(kRowThreads, (kResident<T, kTarget, kShifted> / kRowThreads))
    forward_rows(const TypedOptions<T> o) {
  using A = AccumulateType<T>;
  using Rows = RowPipeline<T, kTarget>;
  const RowPlan& plan = o.plan;
  const int rank = rank_of_block(plan);  // among the blocks of a row
  const int thread = rank * int(blockDim.x) + int(threadIdx.x);  // among those of a row
  __shared__ LossAccumulator sums[kLaneBlockThreads];  // a row's first thread has one for itself: registers are scarce
  if (threadIdx.x == 0) sums[threadIdx.y] = {};
  let_next_launch_start();
  if (plan.cluster) start_cluster_merge<A>();

  Rows stream(o, thread);
  const auto source_of = [&](int64_t number, int y) {
    return number < plan.rows ? Rows::source_of(Row<T, kTarget>(o, number, y)) : typename Rows::Source{};
  };
  int64_t number = group_of_block(plan) * blockDim.y + threadIdx.y;
  int y = o.class_of(o.target_at(number)), next_y = o.class_of(o.target_at(number + plan.step));
  stream.start(source_of(number, y));
  for (int turn = 0; number - threadIdx.y < plan.rows; ++turn) {
    const bool is_row = number < plan.rows;
    const int64_t next_number = number + plan.step;
    // Asked for here and looked at after this row: nobody waits for it.
    const int64_t later_target = o.target_at(next_number + plan.step);
    const auto next = source_of(next_number, next_y);
    // All lanes of a warp take part when statistics are merged, so those behind the last row come along. Their row is
    // one that does not exist: its addresses are computed, and never accessed.
    const Row<T, kTarget> row(o, number, y);
    const bool contributes = is_row && row.contributes();
    const auto range = range_of_thread(row, thread);
    const T x_y = prefetch_target_logit(row);
    auto state = empty_row_state<A>();
    if (contributes) {
      if (range.template units<1>() > 0) accumulate_tiles<1, Rows::kVectors>(state, row, range);
      stream.accumulate_row(state, row, range);
    }
    state = row_merge<is_spread(kTarget)>(state, turn);
    if (plan.cluster) state = cluster_merge<is_spread(kTarget)>(state, rank, plan.blocks, turn);
    const A scale = scale_of(row, state);
    if (is_row && thread == 0) store_row_result(row, state, scale, x_y, sums[threadIdx.y]);
    wait_for_launch_before();  // for total_weight
    if (contributes) {
      const A g = scaled_grad_output(o, A(1));  // nobody has sent a grad_output yet
      write_gradient(row, gradient_factors(o, state.max, scale, g), range, x_y, [&](const GradientFactors<A>& factors) {
        stream.template write_row_vectors<kShifted>(row, factors, range, next);
      });
    } else {
      if (is_row) write_row_of_zeros(row, range);
      stream.start(next);
    }
    number = next_number;
    y = next_y;
    next_y = o.class_of(later_target);
  }
  store_block_sum_of_rows(o, sums);
}

// The same where no gradient is written: every class is read once, and nothing is kept. Of split rows each block has a part,
// and leaves its statistics.
template <typename T, TargetKind kTarget>
__global__ void __launch_bounds__(kRowThreads, (kAloneResident<T, kTarget> / kRowThreads))
    forward_rows_loss_only(const TypedOptions<T> o) {
  using A = AccumulateType<T>;
  const RowPlan& plan = o.plan;
  const int rank = rank_of_block(plan);
  const int thread = rank * int(blockDim.x) + int(threadIdx.x);
  __shared__ LossAccumulator sums[kLaneBlockThreads];
  if (threadIdx.x == 0) sums[threadIdx.y] = {};
  let_next_launch_start();
  int64_t number = group_of_block(plan) * blockDim.y + threadIdx.y, target = o.target_at(number);
  for (int turn = 0; number - threadIdx.y < plan.rows; number += plan.step, ++turn) {
    const bool is_row = number < plan.rows;
    const Row<T, kTarget> row(o, number, o.class_of(target));
    target = o.target_at(number + plan.step);  // nobody waits for it before the next row
    const auto range = range_of_thread(row, thread);
    const T x_y = prefetch_target_logit(row);
    auto state = empty_row_state<A>();
    if (is_row && row.contributes()) {
      if (range.template units<1>() > 0) accumulate_tiles<1, kTileVectors<kTarget>>(state, row, range);
      accumulate_tiles<kVectorSize<T>, kTileVectors<kTarget>>(state, row, range);
    }
    state = row_merge<is_spread(kTarget)>(state, turn);
    if (plan.split) {
      if (threadIdx.x == 0) static_cast<RowState<A>*>(o.scratch)[number * plan.blocks + rank] = state;
    } else if (is_row && thread == 0) {
      store_row_result(row, state, scale_of(row, state), x_y, sums[threadIdx.y]);
    }
  }
  if (!plan.split) store_block_sum_of_rows(o, sums);
}

// ---- After the rows, in one block

// The loss of all rows.
template <typename T>
__device__ __forceinline__ void store_reduced_loss(const CrossEntropyOptions& o, const LossSum& sum) {
  const bool mean = o.reduction == Reduction::kMean;
  const double loss[1] = {mean ? divide_by_total_weight(sum.loss, sum.weight) : sum.loss};
  store_loss<T>(o.loss, o.loss_dtype != o.dtype, 0, loss);
}

template <typename T>
__device__ __forceinline__ void store_total_weight(const CrossEntropyOptions& o, double weight_sum) {
  *static_cast<AccumulateType<T>*>(o.total_weight) = AccumulateType<T>(weight_sum);
}

// The blocks' sums, in a fixed order.
template <typename T>
__global__ void __launch_bounds__(kSumThreads) finish_loss(const CrossEntropyOptions o, int blocks, bool weighed) {
  wait_for_launch_before();
  const LossSum sum = sum_of_blocks<LossSum>(o.scratch, blocks);
  if (threadIdx.x != 0) return;
  store_reduced_loss<T>(o, sum);
  if (o.reduction == Reduction::kMean && !weighed) store_total_weight<T>(o, sum.weight);
}

// Split rows: some lanes of a warp merge what a row's blocks have left, and finish the row. If a block is alone it
// finishes the loss, too; else it leaves its sum for `finish_loss`.
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
    const A scale = scale_of(row, state);
    if (is_row && lane == 0) store_row_result(row, state, scale, x_y, of_thread);
  }
  const LossSum sum = block_sum_of_threads(of_thread);
  if (threadIdx.x != 0 || o.reduction == Reduction::kNone) return;
  if (gridDim.x > 1) {
    sums[blockIdx.x] = sum;
    return;
  }
  store_reduced_loss<T>(o, sum);
  if (o.reduction == Reduction::kMean) store_total_weight<T>(o, sum.weight);
}

// ---- What the mean divides by, before the rows whose gradient needs it

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
  let_next_launch_start();  // not sooner: the rows' loads would delay these, whose sum the rows wait for
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) store_total_weight<T>(o, sum);
  else static_cast<double*>(o.scratch)[blockIdx.x] = sum;
}

template <typename T>
__global__ void __launch_bounds__(kSumThreads) finish_target_weights(const CrossEntropyOptions o, int blocks) {
  let_next_launch_start();
  wait_for_launch_before();
  const double sum = sum_of_blocks<double>(o.scratch, blocks);
  if (threadIdx.x == 0) store_total_weight<T>(o, sum);
}

// ---- The gradient alone, from the statistics that the forward pass has left: no thread waits for another

template <typename T, TargetKind kTarget, bool kShifted>
__global__ void __launch_bounds__(kRowThreads, (kResident<T, kTarget, kShifted> / kRowThreads))
    backward_rows(const TypedOptions<T> o) {
  wait_for_launch_before();
  if (gradient_is_ready<T>(o)) return;
  using A = AccumulateType<T>;
  const RowPlan& plan = o.plan;
  const int rank = rank_of_block(plan);
  const int thread = rank * int(blockDim.x) + int(threadIdx.x);  // among those of a row
  for (int64_t i = group_of_block(plan) * blockDim.y + threadIdx.y; i < plan.rows; i += plan.step) {
    const Row<T, kTarget> row(o, i);
    const auto range = range_of_thread(row, thread);
    write_row<kShifted>(row, static_cast<const A*>(o.row_max)[i], static_cast<const A*>(o.row_scale)[i], range);
  }
}

// ---- Launch

// What the blocks of split rows leave in scratch, before the sums of finish_split_rows's blocks.
int64_t split_states_bytes(const CrossEntropyOptions& o, const RowPlan& plan) {
  return o.rows() * plan.blocks * (o.dtype == DType::kFloat64 ? sizeof(RowState<double>) : sizeof(RowState<float>));
}
unsigned split_grid(const RowPlan& plan) {
  const int64_t blocks = divide_up(plan.rows * lanes_of_split(plan.blocks), kSplitThreads);
  return unsigned(smaller(larger(blocks, 1), kMostSplitBlocks));
}

// The grid of the kernel that weighs; 0 where nothing has to be weighed.
unsigned target_weights_grid(const CrossEntropyOptions& o, const RowPlan& plan) {
  if (o.reduction != Reduction::kMean || o.grad_logits == nullptr || plan.split || o.target_probability) return 0;
  return grid_size(o, o.tuning.target_weight_rows);
}

template <typename T>
cudaError_t launch_target_weights(const CrossEntropyOptions& o, const RowPlan& plan, cudaStream_t stream) {
  const unsigned grid = target_weights_grid(o, plan);
  if (grid == 0) return cudaSuccess;
  const cudaError_t error = launch(sum_target_weights<T>, {grid, kSumThreads}, stream, TypedOptions<T>(o, plan));
  if (error != cudaSuccess || grid == 1) return error;
  return launch(finish_target_weights<T>, after_launch(o, 1, kSumThreads), stream, o, int(grid));
}

// For a kernel without a limit on its grid: resident_blocks is called because it prepares the kernel for its shared memory.
template <typename T>
cudaError_t prepare_and_launch(void (*kernel)(TypedOptions<T>), const CrossEntropyOptions& o, const RowPlan& plan,
                               bool overlaps, cudaStream_t stream) {
  int64_t resident = 0;  // the answer is not used
  const cudaError_t error = resident_blocks(kernel, plan.shape(o, false), resident);
  return error != cudaSuccess ? error : launch(kernel, plan.shape(o, overlaps), stream, TypedOptions<T>(o, plan));
}

template <typename T>
cudaError_t launch_columns(const CrossEntropyOptions& o, const RowPlan& plan, bool forward, bool overlaps,
                           cudaStream_t stream) {
  const auto launch_of_width = [&](auto width, auto target) {
    constexpr TargetKind kTarget = decltype(target)::value;
    constexpr int kWidth = decltype(width)::value;
    const auto kernel = !forward            ? backward_columns<T, kTarget, kWidth>
                        : plan.split        ? forward_columns_split<T, kTarget, kWidth>
                        : plan.block.y > 1  ? forward_columns<T, kTarget, kWidth>
                        : o.grad_logits     ? forward_columns_of_thread<T, kTarget, kWidth, true>
                                            : forward_columns_of_thread<T, kTarget, kWidth, false>;
    return prepare_and_launch(kernel, o, plan, overlaps, stream);
  };
  const auto launch_of = [&](auto width) {
    return on_target(o, [&](auto target) { return launch_of_width(width, target); });
  };
  return plan.of_columns.width > 1 ? launch_of(std::integral_constant<int, kVectorSize<T>>())
                                   : launch_of(std::integral_constant<int, 1>());
}

template <typename T>
cudaError_t launch_few_classes(const CrossEntropyOptions& o, const RowPlan& plan, bool forward, bool overlaps,
                       cudaStream_t stream) {
  const auto kernel = on_target(o, [&](auto target) {
    constexpr TargetKind kTarget = decltype(target)::value;
    return forward ? forward_few_classes<T, kTarget> : backward_few_classes<T, kTarget>;
  });
  return prepare_and_launch(kernel, o, plan, overlaps, stream);
}

template <typename T>
cudaError_t launch_backward(CrossEntropyOptions o, cudaStream_t stream) {
  if (o.grad_ready) o.tuning.max_blocks = smaller(o.tuning.max_blocks, kHandOverBlocks);
  const RowPlan plan = plan_rows(o, /*with_exchange=*/false);
  if (plan.row_pitch > 0) return launch_few_classes<T>(o, plan, /*forward=*/false, /*overlaps=*/true, stream);
  if (plan.columns) return launch_columns<T>(o, plan, /*forward=*/false, /*overlaps=*/true, stream);
  const auto kernel = on_target(o, [&](auto target) {
    constexpr TargetKind kTarget = decltype(target)::value;
    return plan.shifted ? backward_rows<T, kTarget, true> : backward_rows<T, kTarget, false>;
  });
  return launch(kernel, plan.shape(o, /*overlaps=*/true), stream, TypedOptions<T>(o, plan));
}

// Of rows that are neither columns nor of a few classes.
template <typename T>
auto rows_kernel(const CrossEntropyOptions& o, const RowPlan& plan) {
  return on_target(o, [&](auto target) {
    constexpr TargetKind kTarget = decltype(target)::value;
    if (plan.in_lanes) return plan.shifted ? forward_rows_in_registers<T, kTarget, true> : forward_rows_in_registers<T, kTarget, false>;
    if (!plan.keeps) return forward_rows_loss_only<T, kTarget>;
    return plan.shifted ? forward_rows<T, kTarget, true> : forward_rows<T, kTarget, false>;
  });
}

// Prepares the launch of the rows' kernel. There are no more blocks than the device holds at once, and each takes several
// rows in turn; but not where a gradient of class indices or of float32 is written, which was up to 8 % slower so on an
// H200, as if blocks that never end stayed in step with one another, and read and wrote at the same times. Only of rows so
// long that a multiprocessor holds no more than two blocks, a block takes two, and copies the second while it still works
// on the first: 2 to 3 % faster with 16-bit elements.
template <typename T>
cudaError_t fit_to_device(const CrossEntropyOptions& o, RowPlan& plan) {
  if (plan.columns || plan.row_pitch > 0 || plan.in_lanes) return cudaSuccess;
  int64_t most = 0;
  const cudaError_t error = resident_blocks(rows_kernel<T>(o, plan), plan.shape(o, false), most);
  if (error != cudaSuccess || plan.split) return error;
  const int64_t bytes = bytes_of(o.dtype);
  const bool one_row_each = o.grad_logits != nullptr && (o.target_probability == nullptr || bytes >= 4);
  if (!one_row_each) plan.limit_grid(o.tuning.waves * most);
  else if (!plan.cluster && bytes == 2 && most <= 2 * o.tuning.multiprocessors) plan.limit_grid(divide_up(plan.grid, 2));
  return error;
}

template <typename T>
cudaError_t launch_forward(const CrossEntropyOptions& o, const RowPlan& plan, cudaStream_t stream) {
  const TypedOptions<T> options(o, plan);
  cudaError_t error = launch_target_weights<T>(o, plan, stream);
  const auto kernel = rows_kernel<T>(o, plan);
  const bool overlaps = target_weights_grid(o, plan) > 0;  // no more than the weights: other launches may write the logits
  if (error == cudaSuccess)
    error = plan.row_pitch > 0 ? launch_few_classes<T>(o, plan, /*forward=*/true, overlaps, stream)
            : plan.columns     ? launch_columns<T>(o, plan, /*forward=*/true, overlaps, stream)
                               : launch(kernel, plan.shape(o, overlaps), stream, options);
  if (error != cudaSuccess || !plan.split) return error;
  const unsigned blocks = split_grid(plan);
  const auto sums = reinterpret_cast<LossSum*>(static_cast<char*>(o.scratch) + split_states_bytes(o, plan));
  const auto finish_rows = on_target(o, [](auto target) { return finish_split_rows<T, decltype(target)::value>; });
  error = launch(finish_rows, after_launch(o, blocks, kSplitThreads), stream, options, sums);
  if (error == cudaSuccess && blocks > 1 && o.reduction != Reduction::kNone) {
    CrossEntropyOptions of_sums = o;
    of_sums.scratch = sums;
    error = launch(finish_loss<T>, after_launch(o, 1, kSumThreads), stream, of_sums, int(blocks), false);
  }
  if (error != cudaSuccess || o.grad_logits == nullptr) return error;
  return launch_backward<T>(o, stream);
}

// In place of what is not given, what the device has; and no more than the kernels were compiled for.
template <typename T>
cudaError_t complete_tuning(CudaTuning& tuning) {
  const cudaError_t error = complete(tuning, reinterpret_cast<const void*>(&finish_loss<T>));
  tuning.cluster_blocks = smaller(tuning.cluster_blocks, kMaxCluster);
  tuning.block_threads = smaller(tuning.block_threads, kRowThreads);
  tuning.other_threads = smaller(tuning.other_threads, kRowThreads);
  return error;
}

}  // namespace

template <DType kDType>
cudaError_t CrossEntropyOf<kDType>::scratch_bytes(CrossEntropyOptions& o, int64_t& bytes) {
  const cudaError_t error = complete_tuning<TypeOf<kDType>>(o.tuning);
  bytes = 0;
  if (o.rows() == 0) return error;
  const RowPlan plan = plan_rows(o, /*with_exchange=*/true);
  const int64_t partials = plan.grid * int64_t(sizeof(LossSum));
  const int64_t weights = target_weights_grid(o, plan) * int64_t(sizeof(double));
  bytes = plan.split ? split_states_bytes(o, plan) + split_grid(plan) * int64_t(sizeof(LossSum))
                     : larger(partials, weights);
  return error;
}

template <DType kDType>
cudaError_t CrossEntropyOf<kDType>::forward(const CrossEntropyOptions& o, cudaStream_t stream) {
  using T = TypeOf<kDType>;
  if (o.classes > kMaxClasses) return cudaErrorInvalidValue;
  const auto launch_finish = [&](int blocks, bool is_weighed) {
    if (o.reduction == Reduction::kNone) return cudaSuccess;
    return launch(finish_loss<T>, after_launch(o, 1, kSumThreads), stream, o, blocks, is_weighed);
  };
  if (o.rows() == 0) return launch_finish(0, false);
  RowPlan plan = plan_rows(o, /*with_exchange=*/true);
  cudaError_t error = fit_to_device<T>(o, plan);
  if (error == cudaSuccess) error = launch_forward<T>(o, plan, stream);
  if (error != cudaSuccess || plan.split) return error;
  return launch_finish(int(plan.grid), target_weights_grid(o, plan) > 0);
}

template <DType kDType>
cudaError_t CrossEntropyOf<kDType>::backward(CrossEntropyOptions o, cudaStream_t stream) {
  using T = TypeOf<kDType>;
  if (o.classes > kMaxClasses) return cudaErrorInvalidValue;
  if (o.rows() == 0 || o.classes == 0) return cudaSuccess;
  const cudaError_t error = complete_tuning<T>(o.tuning);
  return error != cudaSuccess ? error : launch_backward<T>(o, stream);
}

}  // namespace fusedloss::cuda
