// The negative log likelihood of class indices, on the GPU.
//
// The forward pass reads one scattered element of the input per row, so its speed depends on how many loads are in
// flight. The backward pass is as fast as memory can be filled with zeros: a block fills a tile with zeros, 16 bytes at
// a time, and then writes the rows' elements into it while the tile is in the cache.
#include "kernels/cuda/loss_values.cuh"
#include "kernels/cuda/nll_loss_cuda.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vec.cuh"
#include "kernels/formulas/nll_loss-inl.h"
#include "kernels/tiles.h"

namespace fusedloss::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsAtOnce = 4;           // per thread; their loads are in flight together
constexpr int64_t kTileElements = 8192;  // per block

template <typename T>
struct TypedNLLLossOptions : NLLLossOptions {
  using A = AccumulateType<T>;

  // The target class of a row, or -1 if the row is ignored or its target is out of range.
  __device__ __forceinline__ int64_t class_of(int64_t row) const {
    const int64_t y = target_index[row];
    return y == ignore_index || y < 0 || y >= classes ? -1 : y;
  }
  __device__ __forceinline__ A weight_of(int64_t y) const { return weight ? static_cast<const A*>(weight)[y] : A(1); }
};

// A minimum of one block per multiprocessor: without it, ptxas spills a register on sm_100 to make room for a few more.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1) gather(const TypedNLLLossOptions<T> o) {
  const int64_t rows = o.outer * o.inner, step = int64_t(gridDim.x) * blockDim.x;
  double loss_sum = 0, total_weight = 0;
  let_next_launch_start();
  bool bad_target = false;
  for (int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; first < rows; first += kRowsAtOnce * step) {
    int64_t y[kRowsAtOnce];
    T x[kRowsAtOnce];
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      const int64_t row = first + k * step;
      y[k] = row < rows ? o.class_of(row) : -1;
    }
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      if (y[k] < 0) continue;
      const int64_t row = first + k * step, outer = row / o.inner, inner = row % o.inner;
      const T* input = static_cast<const T*>(o.input);
      const Strides& strides = o.input_strides;
      x[k] = input[outer * strides.outer + y[k] * strides.classes + inner * strides.inner];
    }
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      const int64_t row = first + k * step;
      if (row >= rows) continue;
      double loss[1] = {0};
      if (y[k] >= 0) {
        const double w = o.weight_of(y[k]);
        loss[0] = nll_loss_value(double(widen(x[k])), w);
        loss_sum += loss[0];
        total_weight += w;
      } else if (o.target_index[row] != o.ignore_index) {
        bad_target = true;
      }
      if (o.reduction == Reduction::kNone) store_loss<T>(o.loss, o.loss_dtype != o.dtype, row, loss);
    }
  }
  assert(!bad_target && "nll_loss: a target is neither a class index nor ignore_index");
  if (o.reduction == Reduction::kNone) return;
  const LossSum sum = block_sum(LossSum{loss_sum, total_weight});
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) store_result<T>(o, sum);
  else static_cast<LossSum*>(o.scratch)[blockIdx.x] = sum;
}

// A single block adds up the blocks' sums in a fixed order.
template <typename T>
__global__ void __launch_bounds__(kSumThreads) finish_loss(const TypedNLLLossOptions<T> o, int blocks) {
  wait_for_launch_before();
  const LossSum sum = sum_of_blocks<LossSum>(o.scratch, blocks);
  if (threadIdx.x == 0) store_result<T>(o, sum);
}

template <int kWidth, typename T>
__device__ __forceinline__ void fill_zeros(T* p, const VectorizedRange<T, int>& elements) {
  const AccumulateType<T> zeros[kWidth] = {};
  for (int unit = threadIdx.x; unit < elements.template units<kWidth>(); unit += blockDim.x)
    store_values(p + elements.template first<kWidth>(unit), zeros);
}

// threadIdx.x: the position within a run of neighbouring elements; threadIdx.y: the run.
template <typename T>
__global__ void __launch_bounds__(kThreads) scatter(const TypedNLLLossOptions<T> o, const Tiling tiling) {
  using A = AccumulateType<T>;
  T* const grad = static_cast<T*>(o.grad_input);
  const A total_weight = o.reduction == Reduction::kMean ? *static_cast<const A*>(o.total_weight) : A(1);
  for (int64_t number = blockIdx.x; number < tiling.count; number += gridDim.x) {
    const Tile tile = tiling.at(number);
    const Runs runs = tiling.runs_of(tile);
    for (int run = threadIdx.y; run < int(runs.count[0] * runs.count[1]); run += blockDim.y) {
      const int64_t i = run % int(runs.count[0]), j = run / int(runs.count[0]);
      T* const p = grad + runs.start + i * runs.step[0] + j * runs.step[1];
      const auto elements = vectorized_range(int(runs.length), p);
      fill_zeros<kVectorSize<T>>(p, elements);
      fill_zeros<1>(p, elements);
    }
    __syncthreads();
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < int(tile.outer * tile.inner); i += kThreads) {
      const int64_t outer = tile.first_outer + i / int(tile.inner), inner = tile.first_inner + i % int(tile.inner);
      const int64_t row = outer * o.inner + inner, y = o.class_of(row);
      if (y < tile.first_class || y >= tile.first_class + tile.classes) continue;
      A g = grad_output_at<T>(o, row);
      if (o.reduction == Reduction::kMean) g = divide_by_total_weight(g, total_weight);
      const int64_t at = outer * o.grad_strides.outer + y * o.grad_strides.classes + inner * o.grad_strides.inner;
      grad[at] = narrow<T>(nll_loss_gradient(o.weight_of(y), g));
    }
  }
}

unsigned grid_of(const NLLLossOptions& o) {
  const int64_t blocks = divide_up(o.rows(), kThreads * kRowsAtOnce);
  return unsigned(larger(1, smaller(blocks, o.tuning.max_blocks)));
}

}  // namespace

int64_t nll_loss_scratch_bytes(const NLLLossOptions& o) {
  return o.reduction == Reduction::kNone || grid_of(o) == 1 ? 0 : int64_t(grid_of(o)) * int64_t(sizeof(LossSum));
}

cudaError_t nll_loss_forward(const NLLLossOptions& given, cudaStream_t stream) {
  NLLLossOptions o = given;
  const bool per_row = o.reduction == Reduction::kNone;
  if (per_row && o.rows() == 0) return cudaSuccess;
  cudaError_t error = complete(o.tuning, reinterpret_cast<const void*>(&gather<float>));
  if (error != cudaSuccess) return error;
  const unsigned grid = grid_of(o);
  return on_dtype(o.dtype, [&](auto zero) {
    using T = decltype(zero);
    error = launch(gather<T>, {grid, kThreads}, stream, TypedNLLLossOptions<T>{o});
    if (error != cudaSuccess || per_row || grid == 1) return error;
    return launch(finish_loss<T>, after_launch(o, 1, kSumThreads), stream, TypedNLLLossOptions<T>{o}, int(grid));
  });
}

cudaError_t nll_loss_backward(const NLLLossOptions& o, cudaStream_t stream) {
  if (o.rows() == 0 || o.classes == 0) return cudaSuccess;
  const Tiling tiling = make_tiling(o.outer, o.classes, o.inner, o.grad_strides, kTileElements);
  unsigned along = 1;  // threads per run
  const int64_t vector_size = kVectorBytes / bytes_of(o.dtype);
  while (along < kThreads && along * vector_size < tiling.runs_of(tiling.tile).length) along *= 2;
  const dim3 block(along, kThreads / along);
  const unsigned grid = unsigned(smaller(tiling.count, o.tuning.max_blocks));
  return on_dtype(o.dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch(scatter<T>, {grid, block}, stream, TypedNLLLossOptions<T>{o}, tiling);
  });
}

}  // namespace fusedloss::cuda
