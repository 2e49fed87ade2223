// Cross entropy on the GPU: how a row of logits becomes a loss and a gradient. Start here.
//
// How a row becomes a loss. A row is the logits of one sample, one per class; several threads share it.
//   1. Each thread reads its part of the row in tiles of several 16-byte vectors. It keeps running statistics of what
//      it has read: the maximum, and the sum of exponentials relative to that maximum. Where a tile has a larger
//      maximum, the sum is rescaled to it (online softmax, formulas/cross_entropy-inl.h). So one read of the row
//      suffices.
//   2. The threads merge their statistics: with shuffles in a warp, through shared memory in a block, and by
//      asynchronous stores between the blocks of a cluster.
//   3. One thread computes the row's loss. It stores two numbers for the backward pass: the row's maximum, and
//      sum(q) / sum(exp(x - max)), where q is the target distribution with weights and smoothing.
//   4. If the forward pass also writes the gradient, each thread computes it from the logits that it has read.
// The code of these steps is in
//   cross_entropy_tile.cuh           what a thread holds of its rows: a tile in registers, slots in shared memory
//   cross_entropy_row.cuh            step 1: a thread's tiles of a row, and its statistics
//   reduce.cuh                       step 2: the merge of statistics
//   cross_entropy_row_loss.cuh       step 3: from the statistics to the loss
//   cross_entropy_row_gradient.cuh   step 4: from the statistics to the gradient; cross_entropy_shifted_stores.cuh
//                                    helps where the gradient's rows are aligned differently from the logits' rows
//
// Why this is fast. What a pass must move through memory bounds its time from below, so the kernels move little else,
// and keep the memory busy:
//   - The logits are read once and the gradient is written once; nothing else is of that size. For this, the threads
//     keep what they have read in registers or in shared memory until they write the gradient. There are exceptions
//     that are read twice: what does not fit there, split rows and columns (below), and columns whose alignment does
//     not allow 16-byte accesses. A separate backward pass reads the logits once more, and takes the statistics from
//     the forward pass.
//   - A load moves 16 bytes where alignment allows, and each thread has several loads in flight.
//   - Long rows whose gradient is written are copied to shared memory asynchronously, with all copies under way
//     at once. Where a block takes several rows, the next row arrives while the threads still work on this one
//     (cross_entropy_row_pipeline.cuh).
//   - Work for a row that does not depend on its length (the target, the merge, the loss) costs each thread of the row.
//     So few threads share a short row, and many share a long one.
//
// Which kernel takes a row is decided in make_plan, below, by the row's length, its layout, and the number of rows.
//   In cross_entropy_few_classes.cuh:
//     forward_few_classes        one thread takes a row of up to 16 classes, where rows follow one another directly
//   In cross_entropy_rows.cuh, where the classes of a row are contiguous:
//     forward_rows_in_registers  some lanes of a warp take a row of up to 4 KB and write its gradient
//     forward_rows               some lanes, a block, or a cluster of blocks takes a longer row, keeps it in shared
//                                memory, and writes its gradient
//     forward_rows_loss_only     some lanes or a block takes a row and writes no gradient; or, where rows are few and
//                                long, several blocks share a row ("split rows")
//   In cross_entropy_columns.cuh, where neighbours in memory belong to different rows, as in (N, C, d1, …) ("columns"):
//     forward_columns_of_thread  one thread takes all classes of a few neighbouring rows
//     forward_columns            the threads of a block share columns with too many classes for one thread
//     forward_columns_split      several blocks share columns with too many classes for one block
// The backward pass has backward_few_classes, backward_rows and backward_columns. After split rows or columns, a second
// kernel merges the blocks' statistics (finish_split_rows). If the forward pass is to write their gradient, it then
// launches the kernel of the backward pass.
//
// The launches of a forward pass, in order (the sums are in cross_entropy_sums.cuh):
//   1. the sum of the target classes' weights, if the gradient of a mean needs it
//   2. the rows
//   3. the merge of the statistics, for split rows and columns
//   4. the sum of the blocks' losses, if there is a reduction
//   5. the gradient, if it is to be written, for split rows and columns
// Every sum is taken in a fixed order, which follows from the plan. So with the same plan, results are bitwise
// identical from run to run. The plan also depends on whether the forward pass writes the gradient (ARCHITECTURE.md,
// "Reproducibility"). No launch waits for the host.
//
// Each logits dtype has its own .cu file that includes this one, so that the dtypes compile in parallel.
#pragma once

#include "kernels/cuda/cross_entropy_columns.cuh"
#include "kernels/cuda/cross_entropy_cuda.h"
#include "kernels/cuda/cross_entropy_few_classes.cuh"
#include "kernels/cuda/cross_entropy_plan_columns.h"
#include "kernels/cuda/cross_entropy_plan_rows.h"
#include "kernels/cuda/cross_entropy_rows.cuh"
#include "kernels/cuda/cross_entropy_sums.cuh"
#include "kernels/cuda/launch.cuh"

namespace fusedloss::cuda {
namespace {

// The options must have at least one row.
RowPlan make_plan(const CrossEntropyOptions& o, Pass pass) {
  if (have_few_classes(o)) return plan_few_classes(o, pass);
  const bool classes_are_neighbours = o.logits_strides.classes == 1 &&
                                      (o.grad_logits == nullptr || o.grad_strides.classes == 1) &&
                                      (o.target_probability == nullptr || o.target_strides.classes == 1);
  return classes_are_neighbours && o.classes > o.tuning.thread_classes ? plan_rows(o, pass) : plan_columns(o, pass);
}

// ---- The kernel that a plan selects

template <typename T>
using Kernel = void (*)(TypedOptions<T>);

template <typename T, TargetKind kTarget, bool kShifted>
Kernel<T> row_kernel(RowKernel kernel) {
  switch (kernel) {
    case RowKernel::kRowsInRegisters: return forward_rows_in_registers<T, kTarget, kShifted>;
    case RowKernel::kRowsInSharedMemory: return forward_rows<T, kTarget, kShifted>;
    default: return backward_rows<T, kTarget, kShifted>;
  }
}

template <typename T, TargetKind kTarget, int kWidth>
Kernel<T> column_kernel(RowKernel kernel, bool with_gradient) {
  switch (kernel) {
    case RowKernel::kColumnsOfThread:
      return with_gradient ? forward_columns_of_thread<T, kTarget, kWidth, true>
                           : forward_columns_of_thread<T, kTarget, kWidth, false>;
    case RowKernel::kColumnsOfBlock: return forward_columns<T, kTarget, kWidth>;
    case RowKernel::kSplitColumns: return forward_columns_split<T, kTarget, kWidth>;
    default: return backward_columns<T, kTarget, kWidth>;
  }
}

template <typename T>
Kernel<T> kernel_of(const CrossEntropyOptions& o, const RowPlan& plan) {
  return on_target(o, [&](auto target) -> Kernel<T> {
    constexpr TargetKind kTarget = decltype(target)::value;
    switch (plan.kernel) {
      case RowKernel::kFewClasses: return forward_few_classes<T, kTarget>;
      case RowKernel::kBackwardFewClasses: return backward_few_classes<T, kTarget>;
      case RowKernel::kRowsLossOnly:
      case RowKernel::kSplitRows: return forward_rows_loss_only<T, kTarget>;
      case RowKernel::kRowsInRegisters:
      case RowKernel::kRowsInSharedMemory:
      case RowKernel::kBackwardRows:
        return plan.shifted ? row_kernel<T, kTarget, true>(plan.kernel) : row_kernel<T, kTarget, false>(plan.kernel);
      default:
        return plan.columns.width > 1 ? column_kernel<T, kTarget, kVectorSize<T>>(plan.kernel, o.grad_logits != nullptr)
                                      : column_kernel<T, kTarget, 1>(plan.kernel, o.grad_logits != nullptr);
    }
  });
}

// Launches the kernel that the plan selects. Before that, it sets the kernel's limit of shared memory, and limits the
// grid.
template <typename T>
cudaError_t launch_rows(const CrossEntropyOptions& o, RowPlan& plan, bool overlaps, cudaStream_t stream) {
  const Kernel<T> kernel = kernel_of<T>(o, plan);
  if (plan.shared_bytes > 0 || plan.has_limited_grid()) {
    int64_t resident = 0;
    const cudaError_t error = resident_blocks(kernel, plan.shape(o, false), resident);
    if (error != cudaSuccess) return error;
    if (plan.has_limited_grid()) plan.limit_grid(o, resident);
  }
  return launch(kernel, plan.shape(o, overlaps), stream, TypedOptions<T>(o, plan));
}

// ---- The launches of a pass

// The grid of the kernel that sums the weights of the target classes; 0 where the gradient of a mean does not need it.
unsigned target_weights_grid(const CrossEntropyOptions& o, const RowPlan& plan) {
  if (o.reduction != Reduction::kMean || o.grad_logits == nullptr || plan.is_split() || o.target_probability) return 0;
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

template <typename T>
cudaError_t launch_finish_loss(const CrossEntropyOptions& o, int blocks, bool has_total_weight, cudaStream_t stream) {
  if (o.reduction == Reduction::kNone) return cudaSuccess;
  return launch(finish_loss<T>, after_launch(o, 1, kSumThreads), stream, o, blocks, has_total_weight);
}

template <typename T>
cudaError_t launch_backward(CrossEntropyOptions o, cudaStream_t stream) {
  if (o.grad_ready) o.tuning.max_blocks = smaller(o.tuning.max_blocks, kReadyGradientBlocks);
  RowPlan plan = make_plan(o, Pass::kBackward);
  return launch_rows<T>(o, plan, /*overlaps=*/true, stream);
}

// Bytes of scratch for the statistics that the blocks of split rows store. The sums of finish_split_rows' blocks follow
// them.
int64_t split_states_bytes(const CrossEntropyOptions& o, const RowPlan& plan) {
  return o.rows() * plan.blocks * (o.dtype == DType::kFloat64 ? sizeof(RowState<double>) : sizeof(RowState<float>));
}
unsigned split_grid(const RowPlan& plan) {
  const int64_t blocks = divide_up(plan.rows * lanes_of_split(plan.blocks), kSplitThreads);
  return unsigned(smaller(larger(blocks, 1), kMaxSplitBlocks));
}

// What follows the statistics of split rows: the losses, and the gradient.
template <typename T>
cudaError_t launch_split_rest(const CrossEntropyOptions& o, const RowPlan& plan, cudaStream_t stream) {
  const unsigned blocks = split_grid(plan);
  const auto sums = reinterpret_cast<LossSum*>(static_cast<char*>(o.scratch) + split_states_bytes(o, plan));
  const auto finish = on_target(o, [](auto target) { return finish_split_rows<T, decltype(target)::value>; });
  cudaError_t error = launch(finish, after_launch(o, blocks, kSplitThreads), stream, TypedOptions<T>(o, plan), sums);
  if (error == cudaSuccess && blocks > 1) {
    CrossEntropyOptions of_sums = o;
    of_sums.scratch = sums;
    error = launch_finish_loss<T>(of_sums, int(blocks), /*has_total_weight=*/false, stream);
  }
  return error != cudaSuccess || o.grad_logits == nullptr ? error : launch_backward<T>(o, stream);
}

template <typename T>
cudaError_t launch_forward(const CrossEntropyOptions& o, cudaStream_t stream) {
  RowPlan plan = make_plan(o, Pass::kForward);
  const bool has_total_weight = target_weights_grid(o, plan) > 0;
  cudaError_t error = launch_target_weights<T>(o, plan, stream);
  // This launch may overlap the sum of the weights, but no kernel before that: an earlier kernel may write the logits.
  if (error == cudaSuccess) error = launch_rows<T>(o, plan, /*overlaps=*/has_total_weight, stream);
  if (error != cudaSuccess) return error;
  return plan.is_split() ? launch_split_rest<T>(o, plan, stream)
                         : launch_finish_loss<T>(o, int(plan.grid), has_total_weight, stream);
}

// ---- The properties of the device

// Fills in what the caller has left to the device, and lowers what exceeds the limits of the compiled kernels.
template <typename T>
cudaError_t complete_tuning(CudaTuning& tuning) {
  const cudaError_t error = complete(tuning, reinterpret_cast<const void*>(&finish_loss<T>));
  tuning.cluster_blocks = smaller(tuning.cluster_blocks, kMaxCluster);
  tuning.block_threads = smaller(tuning.block_threads, kRowThreads);
  tuning.other_threads = smaller(tuning.other_threads, kRowThreads);
  return error;
}

// Turns clusters off where the device cannot hold one of the planned size, as may happen on a partition of a GPU.
template <typename T>
cudaError_t limit_clusters(CrossEntropyOptions& o) {
  const RowPlan plan = make_plan(o, Pass::kForward);
  if (!plan.cluster) return cudaSuccess;
  int64_t resident = 0;
  const cudaError_t error = resident_blocks(kernel_of<T>(o, plan), plan.shape(o, false), resident);
  if (resident == 0) o.tuning.cluster_blocks = 1;
  return error;
}

// ---- The launchers

template <typename T>
cudaError_t prepare_forward(CrossEntropyOptions& o) {
  const cudaError_t error = complete_tuning<T>(o.tuning);
  return error != cudaSuccess || o.rows() == 0 ? error : limit_clusters<T>(o);
}

int64_t scratch_bytes(const CrossEntropyOptions& o) {
  if (o.rows() == 0) return 0;
  const RowPlan plan = make_plan(o, Pass::kForward);
  if (plan.is_split()) return split_states_bytes(o, plan) + split_grid(plan) * int64_t(sizeof(LossSum));
  return larger(plan.grid * int64_t(sizeof(LossSum)), target_weights_grid(o, plan) * int64_t(sizeof(double)));
}

template <typename T>
cudaError_t forward(const CrossEntropyOptions& o, cudaStream_t stream) {
  if (o.classes > kMaxClasses) return cudaErrorInvalidValue;
  return o.rows() == 0 ? launch_finish_loss<T>(o, 0, /*has_total_weight=*/false, stream) : launch_forward<T>(o, stream);
}

template <typename T>
cudaError_t backward(const CrossEntropyOptions& options, cudaStream_t stream) {
  CrossEntropyOptions o = options;
  if (o.classes > kMaxClasses) return cudaErrorInvalidValue;
  if (o.rows() == 0 || o.classes == 0) return cudaSuccess;
  const cudaError_t error = complete_tuning<T>(o.tuning);
  return error != cudaSuccess ? error : launch_backward<T>(o, stream);
}

template <typename T>
constexpr CrossEntropyLaunchers kLaunchers = {prepare_forward<T>, scratch_bytes, forward<T>, backward<T>};

}  // namespace
}  // namespace fusedloss::cuda
