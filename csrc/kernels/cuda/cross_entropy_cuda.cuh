// Cross entropy on the GPU: how rows of logits become a loss, and a gradient. Start here.
//
// The threads that share a row read its classes, a tile of several 16-byte vectors each at a time, and keep statistics
// of what they have read: the maximum, and the sum of exponentials relative to it (online softmax,
// formulas/cross_entropy-inl.h). They merge their statistics, and one of them computes the row's loss. If the gradient
// is wanted in the forward pass, they keep what they have read in registers or in shared memory, if there is room, and
// write the gradient from there. So the logits are read from memory once, the gradient is written once, and nothing
// else is of that size. A backward pass reads the logits once more, and takes the statistics that the forward pass has
// stored. The steps of a row are in
//   cross_entropy_tile.cuh           what a thread holds of its rows, in registers and in shared memory
//   cross_entropy_row.cuh            a thread's tiles of a row, and the statistics
//   cross_entropy_row_loss.cuh       from the statistics to the loss
//   cross_entropy_row_gradient.cuh   from the statistics to the gradient; with cross_entropy_shifted_stores.cuh, where
//                                    it is aligned otherwise than the logits
//
// Which kernel takes a row is decided in make_plan, below, by its length, its layout, and how many rows there are:
//   forward_few_classes        a thread takes a row of up to 16 classes, where the rows lie one behind another
//                              (cross_entropy_few_classes.cuh)
//   forward_rows_in_registers  some lanes of a warp take a row of up to 4 KB, whose gradient is wanted
//                              (this one and the next two: cross_entropy_rows.cuh)
//   forward_rows               some lanes, a block, or a cluster of blocks takes a longer row whose gradient is wanted;
//                              the row comes by a pipeline in shared memory (cross_entropy_row_pipeline.cuh)
//   forward_rows_loss_only     some lanes or a block takes a row whose gradient is not wanted; or several blocks share
//                              one of few, long rows ("split rows"), and a second kernel merges their statistics
//   forward_columns_of_thread  a thread takes all classes of some rows that are neighbours in memory, as in
//                              (N, C, d1, …): "columns" (this one and the next two: cross_entropy_columns.cuh)
//   forward_columns            the threads of a block share columns, where one thread could not keep all their classes
//   forward_columns_split      several blocks share columns, where one block could not keep all their classes
// The backward pass has backward_few_classes, backward_rows and backward_columns. After split rows, the forward pass
// launches it for the gradient.
//
// Launches: before the rows, the sum of their target classes' weights, if the mean's gradient needs it; the rows, and
// of split rows their statistics and their gradient; the sum of the blocks' losses (cross_entropy_sums.cuh). Every sum
// is taken in a fixed order, and no launch waits for the host.
//
// Each type of the logits has a .cu file that includes this one, so that the types compile side by side.
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

// `o` has at least one row.
RowPlan make_plan(const CrossEntropyOptions& o, Pass pass) {
  if (have_few_classes(o)) return plan_few_classes(o, pass);
  const bool classes_are_neighbours = o.logits_strides.classes == 1 &&
                                      (o.grad_logits == nullptr || o.grad_strides.classes == 1) &&
                                      (o.target_probability == nullptr || o.target_strides.classes == 1);
  return classes_are_neighbours && o.classes > o.tuning.thread_classes ? plan_rows(o, pass) : plan_columns(o, pass);
}

// ---- The kernel that a plan names

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

// Launches the kernel that the plan names. It is prepared for its shared memory before, and its grid is limited.
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

// The grid of the kernel that adds up the weights of target classes; 0 where the mean's gradient does not need them.
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

// What the blocks of split rows store in scratch, before the sums of finish_split_rows' blocks.
int64_t split_states_bytes(const CrossEntropyOptions& o, const RowPlan& plan) {
  return o.rows() * plan.blocks * (o.dtype == DType::kFloat64 ? sizeof(RowState<double>) : sizeof(RowState<float>));
}
unsigned split_grid(const RowPlan& plan) {
  const int64_t blocks = divide_up(plan.rows * lanes_of_split(plan.blocks), kSplitThreads);
  return unsigned(smaller(larger(blocks, 1), kMaxSplitBlocks));
}

// Of split rows, after their statistics: the losses, and the gradient.
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
  // The rows overlap no launch but that of the weights: others may write the logits.
  if (error == cudaSuccess) error = launch_rows<T>(o, plan, /*overlaps=*/has_total_weight, stream);
  if (error != cudaSuccess) return error;
  return plan.is_split() ? launch_split_rest<T>(o, plan, stream)
                         : launch_finish_loss<T>(o, int(plan.grid), has_total_weight, stream);
}

// ---- What the device has

// Fills in what is not given as the device has it; and no more than the kernels were compiled for.
template <typename T>
cudaError_t complete_tuning(CudaTuning& tuning) {
  const cudaError_t error = complete(tuning, reinterpret_cast<const void*>(&finish_loss<T>));
  tuning.cluster_blocks = smaller(tuning.cluster_blocks, kMaxCluster);
  tuning.block_threads = smaller(tuning.block_threads, kRowThreads);
  tuning.other_threads = smaller(tuning.other_threads, kRowThreads);
  return error;
}

// Without clusters where the device can hold none of the size that the plan asks for, as on a part of a GPU.
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
