// Losses of one element each of input and target, on the GPU; a loss is a formula, such as SquaredError.
//
// Both passes do so little arithmetic that memory bandwidth decides: 16-byte accesses, several in flight in each
// thread, and every tensor is read or written once.
#include "cuda/pointwise_cuda.h"

#include "cuda/grad_output.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace fusedloss::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPacks = 4;  // of input and of target, that a thread loads before it computes

// Loads kPacks units of input and target, `step` apart, and gives f the first element of each and its values.
template <int kWidth, typename T, typename F>
__device__ __forceinline__ void for_each_pair(const PointwiseOptions& o, const Split<T, int64_t>& elements, F f) {
  const int64_t units = elements.template units<kWidth>(), step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t unit = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; unit < units; unit += kPacks * step) {
    Pack<T, kWidth> x[kPacks], t[kPacks];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (unit + k * step >= units) continue;
      const int64_t first = elements.template first<kWidth>(unit + k * step);
      x[k] = load<kWidth>(static_cast<const T*>(o.input) + first);
      t[k] = load<kWidth>(static_cast<const T*>(o.target) + first);
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (unit + k * step < units) f(elements.template first<kWidth>(unit + k * step), x[k], t[k]);
  }
}

// Which elements to take 16 bytes at a time: `losses` (loss or grad_output) matters where it has an element for each.
template <typename T>
__device__ __forceinline__ Split<T, int64_t> split_elements(const PointwiseOptions& o, const void* losses) {
  const T* input = static_cast<const T*>(o.input);
  const T* target = static_cast<const T*>(o.target);
  const T* grad_input = static_cast<const T*>(o.grad_input);
  const T* grad_target = static_cast<const T*>(o.grad_target);
  return o.loss_dtype == o.dtype
             ? split(o.numel, input, target, grad_input, grad_target, static_cast<const T*>(losses))
             : split(o.numel, input, target, grad_input, grad_target, static_cast<const Statistic<T>*>(losses));
}

// d loss/d input = derivative(x, t) and d loss/d target = -derivative(x, t), times g; those that are wanted.
template <int kWidth, typename Formula, typename T>
__device__ __forceinline__ void write_gradients(const PointwiseOptions& o, int64_t i, const Pack<T, kWidth>& x,
                                                const Pack<T, kWidth>& t, const Statistic<T> (&g)[kWidth]) {
  if (o.grad_input == nullptr && o.grad_target == nullptr) return;
  Statistic<T> grad[kWidth];
#pragma unroll
  for (int j = 0; j < kWidth; ++j) grad[j] = g[j] * Formula::derivative(x[j], t[j]);
  if (o.grad_input != nullptr) store_values(static_cast<T*>(o.grad_input) + i, grad);
  if (o.grad_target == nullptr) return;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) grad[j] = -grad[j];
  store_values(static_cast<T*>(o.grad_target) + i, grad);
}

// Where one value serves all elements: it, which the mean divides by their number.
template <int kWidth, typename T>
__device__ __forceinline__ void common_grad_output(const PointwiseOptions& o, Statistic<T> (&g)[kWidth]) {
  Statistic<T> one = grad_output_at<T>(o, 0);
  if (o.reduction == Reduction::kMean) one /= Statistic<T>(o.numel);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) g[j] = one;
}

// A thread's sum where there is a reduction; else writes the losses. Gradients too, where they are wanted already.
template <int kWidth, typename Formula, typename T>
__device__ __forceinline__ Statistic<T> forward_share(const PointwiseOptions& o, const Split<T, int64_t>& elements) {
  Statistic<T> sum = 0, g[kWidth];
  common_grad_output<kWidth, T>(o, g);
  for_each_pair<kWidth>(o, elements, [&](int64_t i, const Pack<T, kWidth>& x, const Pack<T, kWidth>& t) {
    Statistic<T> losses[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) losses[j] = Formula::value(x[j], t[j]);
    if (o.reduction == Reduction::kNone) {
      store_loss<T>(o.loss, o.loss_dtype != o.dtype, i, losses);
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum += losses[j];
    }
    write_gradients<kWidth, Formula>(o, i, x, t, g);
  });
  return sum;
}

template <typename Formula, typename T>
__global__ void __launch_bounds__(kThreads) forward(const PointwiseOptions o) {
  const auto elements = split_elements<T>(o, o.reduction == Reduction::kNone ? o.loss : nullptr);
  Statistic<T> sum = forward_share<kVector<T>, Formula>(o, elements);
  sum += forward_share<1, Formula>(o, elements);
  if (o.reduction == Reduction::kNone) return;
  const double of_block = block_sum(double(sum));
  if (threadIdx.x == 0) static_cast<double*>(o.scratch)[blockIdx.x] = of_block;
}

// One block: the blocks' sums in a fixed order, and the mean's division.
template <typename T>
__global__ void __launch_bounds__(kThreads) finish(const PointwiseOptions o, int blocks) {
  const double sum = sum_of_blocks(o.scratch, blocks);
  if (threadIdx.x != 0) return;
  const double loss[1] = {o.reduction == Reduction::kMean ? sum / double(o.numel) : sum};
  store_loss<T>(o.loss, o.loss_dtype != o.dtype, 0, loss);
}

template <int kWidth, typename Formula, typename T>
__device__ __forceinline__ void backward_share(const PointwiseOptions& o, const Split<T, int64_t>& elements) {
  Statistic<T> g[kWidth];
  common_grad_output<kWidth, T>(o, g);
  for_each_pair<kWidth>(o, elements, [&](int64_t i, const Pack<T, kWidth>& x, const Pack<T, kWidth>& t) {
    if (o.grad_output_stride != 0) load_loss<T>(o.grad_output, o.loss_dtype != o.dtype, i, g);
    write_gradients<kWidth, Formula>(o, i, x, t, g);
  });
}

template <typename Formula, typename T>
__global__ void __launch_bounds__(kThreads) backward(const PointwiseOptions o) {
  if (gradient_is_ready<T>(o)) return;
  const auto elements = split_elements<T>(o, o.grad_output_stride != 0 ? o.grad_output : nullptr);
  backward_share<kVector<T>, Formula>(o, elements);
  backward_share<1, Formula>(o, elements);
}

unsigned grid_of(const PointwiseOptions& o) {
  const int64_t blocks = divide_up(o.numel, kThreads * kPacks * (16 / bytes_of(o.dtype)));
  return unsigned(blocks < o.tuning.max_blocks ? blocks : o.tuning.max_blocks);
}

template <typename Formula>
cudaError_t launch_forward(const PointwiseOptions& o, cudaStream_t stream) {
  return on_dtype(o.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (o.numel > 0) {
      const cudaError_t error = launch(forward<Formula, T>, {grid_of(o), kThreads}, stream, o);
      if (error != cudaSuccess) return error;
    }
    if (o.reduction == Reduction::kNone) return cudaSuccess;
    return launch(finish<T>, {1, kThreads}, stream, o, int(grid_of(o)));
  });
}

template <typename Formula>
cudaError_t launch_backward(PointwiseOptions o, cudaStream_t stream) {
  if (o.numel == 0) return cudaSuccess;
  if (o.grad_ready && o.tuning.max_blocks > kHandOverBlocks) o.tuning.max_blocks = kHandOverBlocks;
  return on_dtype(o.dtype, [&](auto zero) {
    return launch(backward<Formula, decltype(zero)>, {grid_of(o), kThreads}, stream, o);
  });
}

}  // namespace

int64_t pointwise_scratch_bytes(const PointwiseOptions& o) {
  return o.reduction == Reduction::kNone ? 0 : int64_t(grid_of(o)) * int64_t(sizeof(double));
}

cudaError_t pointwise_forward(const PointwiseOptions& o, cudaStream_t stream) {
  return launch_forward<SquaredError>(o, stream);
}

cudaError_t pointwise_backward(const PointwiseOptions& o, cudaStream_t stream) {
  return launch_backward<SquaredError>(o, stream);
}

}  // namespace fusedloss::cuda
