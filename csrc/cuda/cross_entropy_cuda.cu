// How a row of logits becomes a loss, and a gradient, on the GPU.
//
// The threads of a row sweep its classes once. Each keeps the statistics of what it has seen (online softmax, see
// formulas/cross_entropy.h), a tile of several 16-byte vectors at a time: all loads, then the tile's maximum, one exp a
// class, one rescaling. The threads merge their statistics, and one of them makes the row's loss of them. In training
// they sweep once more, and write the gradient. What they read in the first sweep they have kept in shared memory, so
// that the logits are read from memory once and the gradient is written once, and nothing else is of that size.
//
// Who shares a row is a matter of its length, and of how many there are (cross_entropy_plan.h decides):
//   a thread                    very few classes, or rows that are neighbours in memory, as in (N, C, d1, …): "columns"
//   several threads of columns  the same, where rows alone are too few
//   some lanes of a warp        up to a few thousand classes
//   a block                     more than those
//   a cluster of blocks         more than the shared memory of one block keeps
//   blocks apart                few, long rows: "split"; they meet in scratch memory, and a second kernel goes on
//
// Launches: the sum of the weights, if the mean's gradient needs it; the rows; the sum of the blocks' losses. Every sum
// is taken in a fixed order, and no launch waits for the host.
#include "cuda/cross_entropy_cuda.h"

#include "cuda/cross_entropy_stream.cuh"

namespace fusedloss::cuda {
namespace {

constexpr int64_t kMaxClasses = 1 << 30;  // within a row, indices are int

// Threads that a multiprocessor must hold at once. Said outright since the compiler, left to choose, spills registers
// to make room for a few more.
template <typename T, bool kSpread>
constexpr int kResident = sizeof(T) == 8 ? 256 : kSpread ? 512 : 768;

// What a thread adds up over its rows.
struct Partial {
  LossSum sum;
  bool bad_target;
};

// One thread of the row: statistics in, loss out. x_y: the target class's.
template <typename T, bool kSpread, typename A>
__device__ __forceinline__ void finish_row(const Row<T, kSpread>& row, RowState<A> state, A scale, T x_y,
                                           Partial& partial) {
  const Problem<T>& o = row.o;
  A loss[1] = {0};
  if (row.counts()) {
    const A logsum = math::Exponential<A>(shift(state.max)).log(state.sum, shift(state.max));
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

template <typename T, bool kSpread>
__global__ void __launch_bounds__(kRowThreads, (kResident<T, kSpread> / kRowThreads))
    forward_rows(const Problem<T> o) {
  using A = Statistic<T>;
  using Rows = Stream<T, kSpread>;
  const RowPlan& plan = o.plan;
  const int rank = int(blockIdx.x) & (plan.blocks - 1);  // among the blocks of a row
  const int thread = rank * int(blockDim.x) + int(threadIdx.x), threads = plan.blocks * int(blockDim.x);
  const bool keeps = o.grad_logits != nullptr && !plan.split;
  __shared__ Partial sums[kRowsOfBlock];  // a row's first thread has one for itself: registers are scarce
  if (threadIdx.x == 0) sums[threadIdx.y] = {};
  let_next_launch_start();
  if (plan.cluster) start_cluster_merge<A>();

  Rows stream(plan, thread, threads);
  // All lanes of a warp take part when statistics are merged, so those behind the last row come along.
  const auto row_of = [&](int64_t number, int y) {
    return Row<T, kSpread>(o, number < plan.rows ? number : plan.rows - 1, y);
  };
  int64_t number = int64_t(blockIdx.x / plan.blocks) * blockDim.y + threadIdx.y;
  int y = o.class_of(o.target_at(number)), next_y = o.class_of(o.target_at(number + plan.step));
  auto now = Rows::source_of(row_of(number, y), number < plan.rows);
  stream.start(now);
  A g = 0;
  int turn = 0;
  for (; number - threadIdx.y < plan.rows; number += plan.step, ++turn) {
    const bool is_row = number < plan.rows;
    // Asked for here and looked at after this row: nobody waits for it.
    const int64_t later_target = o.target_at(number + 2 * plan.step);
    const auto next = Rows::source_of(row_of(number + plan.step, next_y), number + plan.step < plan.rows);
    const Row<T, kSpread> row = row_of(number, y);
    const bool counts = is_row && row.counts();
    const auto share = share_of(row, thread, threads);
    const T x_y = ask_for_target_logit(row);
    auto state = empty_row_state<A>();
    if (counts && share.template units<1>() > 0) absorb<1, Rows::kPacks>(state, row, share);
    stream.absorb_row(state, row, counts, keeps, share, now, next);
    state = row_merge<kSpread>(state, turn);
    if (plan.split) {
      if (threadIdx.x == 0) static_cast<RowState<A>*>(o.scratch)[number * plan.blocks + rank] = state;
    } else {
      if (plan.cluster) state = cluster_merge<kSpread>(state, rank, plan.blocks, turn);
      const A scale = scale_of(row, state);
      if (is_row && thread == 0) finish_row(row, state, scale, x_y, sums[threadIdx.y]);
      if (keeps) {
        if (turn == 0) {
          wait_for_launch_before();  // for total_weight
          g = with_mean(o, A(1));    // nobody has sent a grad_output yet
        }
        if (counts) {
          write_gradient<false>(row, row_gradient(row, state.max, scale, g), share, x_y,
                                [&](const RowGradient<A>& of_row) { stream.write_row_vectors(row, of_row, share, next); });
        } else {
          if (is_row) write_row_of_zeros(row, share);
          stream.start(next);
        }
      }
    }
    now = next;
    y = next_y;
    next_y = o.class_of(later_target);
  }
  if (!plan.split) leave(o, thread == 0 ? sums[threadIdx.y] : Partial());
}

template <typename T, bool kSpread>
__global__ void __launch_bounds__(kColumnThreads, (kResident<T, kSpread> / kColumnThreads))
    forward_columns(const Problem<T> o) {
  const RowPlan& plan = o.plan;
  const Share<T> share = {only_single<T>(int(o.classes)), int(threadIdx.y), int(blockDim.y)};
  Partial sum = {};
  let_next_launch_start();
  for (int64_t first = int64_t(blockIdx.x) * blockDim.x; first < plan.rows; first += plan.step) {
    const bool is_row = first + threadIdx.x < plan.rows;
    const Row<T, kSpread> row(o, is_row ? first + threadIdx.x : plan.rows - 1);
    const T x_y = ask_for_target_logit(row);
    auto state = empty_row_state<Statistic<T>>();
    if (is_row && row.counts()) absorb<1, kColumnPacks<kSpread>>(state, row, share);
    state = column_merge<kSpread, kColumnThreads>(state);
    const auto scale = scale_of(row, state);
    if (is_row && threadIdx.y == 0) finish_row(row, state, scale, x_y, sum);
    wait_for_launch_before();  // for total_weight
    if (row.grad != nullptr && is_row) write_row<true>(row, state.max, scale, share);
  }
  leave(o, sum);
}

// ---- After the rows, in one block

// The loss of all rows.
template <typename T>
__device__ __forceinline__ void conclude(const CrossEntropyOptions& o, const LossSum& sum) {
  const bool mean = o.reduction == Reduction::kMean;
  const double loss[1] = {mean ? divide_by_total_weight(sum.loss, sum.weight) : sum.loss};
  store_loss<T>(o.loss, o.loss_dtype != o.dtype, 0, loss);
}

template <typename T>
__device__ __forceinline__ void store_total_weight(const CrossEntropyOptions& o, double weight_sum) {
  *static_cast<Statistic<T>*>(o.total_weight) = Statistic<T>(weight_sum);
}

// The blocks' sums, in a fixed order.
template <typename T>
__global__ void __launch_bounds__(kSumThreads) finish(const CrossEntropyOptions o, int blocks, bool weighed) {
  wait_for_launch_before();
  const LossSum sum = sum_of_blocks<LossSum>(o.scratch, blocks);
  if (threadIdx.x != 0) return;
  conclude<T>(o, sum);
  if (o.reduction == Reduction::kMean && !weighed) store_total_weight<T>(o, sum.weight);
}

// Split rows: some lanes of a warp merge what a row's blocks have left, and finish the row.
template <typename T, bool kSpread>
__global__ void __launch_bounds__(kMaxThreads) finish_split(const Problem<T> o) {
  using A = Statistic<T>;
  int lanes = 1;
  while (lanes < kWarp && lanes < o.plan.blocks) lanes *= 2;
  const int lane = threadIdx.x % lanes, rows_at_once = blockDim.x / lanes;
  wait_for_launch_before();
  Partial of_thread = {};
  for (int64_t first = 0; first < o.plan.rows; first += rows_at_once) {
    const int64_t i = first + threadIdx.x / lanes;
    const bool is_row = i < o.plan.rows;
    const Row<T, kSpread> row(o, is_row ? i : 0);
    const T x_y = ask_for_target_logit(row);
    const auto* states = static_cast<const RowState<A>*>(o.scratch) + row.number * o.plan.blocks;
    auto state = empty_row_state<A>();
    for (int block = lane; block < o.plan.blocks; block += lanes) state = merge(state, states[block]);
    state = lanes_merge<kSpread>(state, lanes);
    const A scale = scale_of(row, state);
    if (is_row && lane == 0) finish_row(row, state, scale, x_y, of_thread);
  }
  const LossSum sum = finish_block(of_thread);
  if (threadIdx.x != 0 || o.reduction == Reduction::kNone) return;
  conclude<T>(o, sum);
  if (o.reduction == Reduction::kMean) store_total_weight<T>(o, sum.weight);
}

// ---- What the mean divides by, before the rows whose gradient needs it

template <typename T>
__global__ void __launch_bounds__(kSumThreads) weigh(const Problem<T> o) {
  let_next_launch_start();
  double sum = 0;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; first < o.plan.rows;
       first += kLoadsAtOnce * step) {
    int64_t index[kLoadsAtOnce];
#pragma unroll
    for (int k = 0; k < kLoadsAtOnce; ++k)
      index[k] = first + k * step < o.plan.rows ? o.target_index[first + k * step] : o.ignore_index;
#pragma unroll
    for (int k = 0; k < kLoadsAtOnce; ++k) {
      const int y = o.class_of(index[k]);
      if (y >= 0) sum += double(o.weight_of(y));
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) store_total_weight<T>(o, sum);
  else static_cast<double*>(o.scratch)[blockIdx.x] = sum;
}

template <typename T>
__global__ void __launch_bounds__(kSumThreads) finish_weigh(const CrossEntropyOptions o, int blocks) {
  let_next_launch_start();
  wait_for_launch_before();
  const double sum = sum_of_blocks<double>(o.scratch, blocks);
  if (threadIdx.x == 0) store_total_weight<T>(o, sum);
}

// Probabilities: each row weighs 1.
template <typename T>
__global__ void count_rows(const CrossEntropyOptions o) {
  let_next_launch_start();
  store_total_weight<T>(o, double(o.outer * o.inner));
}

// ---- The gradient alone, from the statistics that the forward pass has left: no thread waits for another

template <typename T, bool kSpread>
__global__ void __launch_bounds__(kRowThreads, (kResident<T, kSpread> / kRowThreads))
    backward_rows(const Problem<T> o) {
  wait_for_launch_before();
  if (gradient_is_ready<T>(o)) return;
  using A = Statistic<T>;
  const RowPlan& plan = o.plan;
  const int rank = int(blockIdx.x) & (plan.blocks - 1);
  const int thread = rank * int(blockDim.x) + int(threadIdx.x), threads = plan.blocks * int(blockDim.x);
  for (int64_t i = int64_t(blockIdx.x / plan.blocks) * blockDim.y + threadIdx.y; i < plan.rows; i += plan.step) {
    const Row<T, kSpread> row(o, i);
    const auto share = share_of(row, thread, threads);
    write_row<false>(row, static_cast<const A*>(o.row_max)[i], static_cast<const A*>(o.row_scale)[i], share);
  }
}

template <typename T, bool kSpread>
__global__ void __launch_bounds__(kColumnThreads, (kResident<T, kSpread> / kColumnThreads))
    backward_columns(const Problem<T> o) {
  wait_for_launch_before();
  if (gradient_is_ready<T>(o)) return;
  using A = Statistic<T>;
  const Share<T> share = {only_single<T>(int(o.classes)), int(threadIdx.y), int(blockDim.y)};
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < o.plan.rows; i += o.plan.step) {
    const Row<T, kSpread> row(o, i);
    write_row<true>(row, static_cast<const A*>(o.row_max)[i], static_cast<const A*>(o.row_scale)[i], share);
  }
}

// ---- Launch

// The grid of the kernel that weighs; 0 where nothing has to be weighed.
unsigned weigh_grid(const CrossEntropyOptions& o, const RowPlan& plan) {
  if (o.reduction != Reduction::kMean || o.grad_logits == nullptr || plan.split) return 0;
  return o.target_probability ? 1 : grid_size(o, o.tuning.weigh_rows);
}

template <typename T>
cudaError_t launch_weigh(const CrossEntropyOptions& o, const RowPlan& plan, cudaStream_t stream) {
  const unsigned grid = weigh_grid(o, plan);
  if (grid == 0) return cudaSuccess;
  if (o.target_probability) return launch(count_rows<T>, {}, stream, o);
  const cudaError_t error = launch(weigh<T>, {grid, kSumThreads}, stream, Problem<T>(o, plan));
  if (error != cudaSuccess || grid == 1) return error;
  return launch(finish_weigh<T>, after_launch(o, 1, kSumThreads), stream, o, int(grid));
}

template <typename T>
cudaError_t launch_backward(CrossEntropyOptions o, cudaStream_t stream) {
  if (o.grad_ready) o.tuning.max_blocks = smaller(o.tuning.max_blocks, kHandOverBlocks);
  const RowPlan plan = plan_rows(o, /*with_exchange=*/false);
  const bool spread = o.is_spread();
  const auto kernel = plan.columns ? (spread ? backward_columns<T, true> : backward_columns<T, false>)
                                   : (spread ? backward_rows<T, true> : backward_rows<T, false>);
  return launch(kernel, plan.shape(o, /*overlaps=*/true), stream, Problem<T>(o, plan));
}

template <typename T>
auto forward_kernel(const CrossEntropyOptions& o, const RowPlan& plan) {
  const bool spread = o.is_spread();
  return plan.columns ? (spread ? forward_columns<T, true> : forward_columns<T, false>)
                      : (spread ? forward_rows<T, true> : forward_rows<T, false>);
}

// Blocks that take rows have as many of them as the device's size makes necessary.
template <typename T>
cudaError_t fit_to_device(const CrossEntropyOptions& o, RowPlan& plan) {
  if (plan.columns) return cudaSuccess;
  int64_t most = 0;
  const cudaError_t error = resident_blocks(forward_kernel<T>(o, plan), plan.shape(o, false), most);
  if (error == cudaSuccess && !plan.split) plan.limit_grid(o.tuning.waves * most);
  return error;
}

template <typename T>
cudaError_t launch_forward(const CrossEntropyOptions& o, const RowPlan& plan, cudaStream_t stream) {
  const bool spread = o.is_spread();
  const Problem<T> problem(o, plan);
  cudaError_t error = launch_weigh<T>(o, plan, stream);
  const auto kernel = forward_kernel<T>(o, plan);
  const bool overlaps = weigh_grid(o, plan) > 0;  // no more than the weights: other launches may write the logits
  if (error == cudaSuccess) error = launch(kernel, plan.shape(o, overlaps), stream, problem);
  if (error != cudaSuccess || !plan.split) return error;
  error = launch(spread ? finish_split<T, true> : finish_split<T, false>, after_launch(o, 1, kMaxThreads), stream,
                 problem);
  if (error != cudaSuccess || o.grad_logits == nullptr) return error;
  return launch_backward<T>(o, stream);
}

cudaError_t complete_tuning(CudaTuning& tuning) {
  return complete(tuning, reinterpret_cast<const void*>(&finish<float>));
}

}  // namespace

cudaError_t cross_entropy_scratch_bytes(CrossEntropyOptions& o, int64_t& bytes) {
  const cudaError_t error = complete_tuning(o.tuning);
  const RowPlan plan = plan_rows(o, /*with_exchange=*/true);
  const int64_t state = o.dtype == DType::kFloat64 ? sizeof(RowState<double>) : sizeof(RowState<float>);
  const int64_t partials = plan.grid * int64_t(sizeof(LossSum));
  const int64_t weights = weigh_grid(o, plan) * int64_t(sizeof(double));
  bytes = plan.split ? o.rows() * plan.blocks * state : partials > weights ? partials : weights;
  return error;
}

cudaError_t cross_entropy_forward(const CrossEntropyOptions& o, cudaStream_t stream) {
  if (o.classes > kMaxClasses) return cudaErrorInvalidValue;
  return on_dtype(o.dtype, [&](auto zero) {
    using T = decltype(zero);
    RowPlan plan = plan_rows(o, /*with_exchange=*/true);
    if (o.rows() > 0) {
      cudaError_t error = fit_to_device<T>(o, plan);
      if (error == cudaSuccess) error = launch_forward<T>(o, plan, stream);
      if (error != cudaSuccess || plan.split) return error;
    }
    if (o.reduction == Reduction::kNone) return cudaSuccess;
    const int blocks = o.rows() > 0 ? int(plan.grid) : 0;
    return launch(finish<T>, after_launch(o, 1, kSumThreads), stream, o, blocks, o.rows() > 0 && weigh_grid(o, plan) > 0);
  });
}

cudaError_t cross_entropy_backward(const CrossEntropyOptions& given, cudaStream_t stream) {
  if (given.classes > kMaxClasses) return cudaErrorInvalidValue;
  if (given.rows() == 0 || given.classes == 0) return cudaSuccess;
  CrossEntropyOptions o = given;
  const cudaError_t error = complete_tuning(o.tuning);
  if (error != cudaSuccess) return error;
  return on_dtype(o.dtype, [&](auto zero) { return launch_backward<decltype(zero)>(o, stream); });
}

}  // namespace fusedloss::cuda
