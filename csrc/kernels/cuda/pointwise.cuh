// The kernels of pointwise losses on the GPU, as templates on the formula, which computes the loss of one element of
// each operand. A source includes this file and its formulas, such as formulas/pointwise-inl.h, and uses
// kPointwise<Formula>.
//
// Most formulas do so little arithmetic that memory bandwidth is the limit. Accesses are therefore 16 bytes wide, each
// thread has several in flight, and every tensor is read or written once.
#pragma once

#include "kernels/cuda/loss_values.cuh"
#include "kernels/cuda/math.cuh"
#include "kernels/cuda/pointwise_formula.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vec.cuh"
#include "kernels/formulas/dual-inl.h"

namespace fusedloss::cuda {
namespace {  // internal linkage: libraries of different formulas must not use each other's kernels

constexpr int kThreads = 256;

// How many vectors of each operand a thread loads before it computes: at least four in total and two of each operand,
// unless there are many operands. More would take registers that other threads need, and would have to move further:
// each vector moves up through the places of those before it.
FUSEDLOSS_INLINE constexpr int vectors_in_flight(int operands) { return operands == 1 ? 4 : operands <= 4 ? 2 : 1; }

template <typename F>
using OperandsOf = std::make_integer_sequence<int, F::kOperands>;

// The loss of one element, with its derivatives with respect to the operands in the mask kWrt.
template <typename F, unsigned kWrt, typename A, int... kOperand, int... kParameter>
__device__ __forceinline__ auto loss_of(const A (&values)[F::kOperands], const A (&parameter)[F::kParameters + 1],
                                        std::integer_sequence<int, kOperand...>,
                                        std::integer_sequence<int, kParameter...>) {
  return F::template loss<A>(operand<kOperand, kWrt>(values[kOperand])..., Dual<A, 0>{parameter[kParameter]}...);
}

// Does one value serve all elements? Never for operand 0, which has a value for each.
__device__ __forceinline__ bool is_one_value(const PointwiseOptions& o, int k) {
  return k > 0 && o.operand_period[k] == 1;
}

// Does a row of values repeat itself, such as a weight for each class? Formulas of few operands are not compiled for
// this.
template <typename F>
__device__ __forceinline__ bool is_repeated(const PointwiseOptions& o, int k) {
  return F::kOperands >= kFewestOfRepeated && k > 0 && o.operand_period[k] > 1;
}

template <typename T>
__device__ __forceinline__ const T* elements_of(const PointwiseOptions& o, int k) {
  return static_cast<const T*>(o.operand[k]);
}

// Which elements to access 16 bytes at a time. `losses` is loss or grad_output, or null if it has only one value.
template <typename F, typename T, int... kOperand>
__device__ __forceinline__ VectorizedRange<T, int64_t> vectorized_elements(const PointwiseOptions& o,
                                                                           const void* losses,
                                                                           std::integer_sequence<int, kOperand...>) {
  const bool wide = o.loss_dtype != o.dtype;
  const auto has_all = [&](int k) { return !is_one_value(o, k) && !is_repeated<F>(o, k); };
  return vectorized_range(o.numel, elements_of<T>(o, 0), (has_all(kOperand) ? elements_of<T>(o, kOperand) : nullptr)...,
                          static_cast<const T*>(o.grad[kOperand])..., static_cast<const T*>(wide ? nullptr : losses),
                          static_cast<const AccumulateType<T>*>(wide ? losses : nullptr));
}

// kWidth elements from number i on of a `row` that repeats itself after `period` elements. They are loaded as one
// vector where it is aligned and does not wrap around, otherwise one by one.
template <int kWidth, typename T>
__device__ __forceinline__ Vector<T, kWidth> load_repeated(const T* row, int64_t period, int64_t i) {
  int64_t place = cuda::remainder(i, period);
  if constexpr (kWidth == 1) {
    return load<1>(row + place);
  } else {
    if (reinterpret_cast<uintptr_t>(row) % 16 == 0 && (place | period) % kWidth == 0) return load<kWidth>(row + place);
    alignas(16) T values[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      values[j] = row[place];
      place = place + 1 == period ? 0 : place + 1;
    }
    return load<kWidth>(values);
  }
}

// grad_output where one value serves all elements, divided by the mean's divisor.
template <typename T>
__device__ __forceinline__ AccumulateType<T> common_grad_output(const PointwiseOptions& o) {
  const AccumulateType<T> g = grad_output_at<T>(o, 0);
  return o.reduction == Reduction::kMean ? g / AccumulateType<T>(o.divisor) : g;
}

// What all elements of a thread have in common.
template <typename F, typename T>
struct Common {
  AccumulateType<T> parameter[F::kParameters + 1];
  AccumulateType<T> grad_output;
};

// kWidth elements of each operand.
template <typename F, typename A, int kWidth>
struct Values {
  A of[kWidth][F::kOperands];
};

// The losses of these elements, with the derivatives with respect to the operands in the mask kWrt.
template <typename F, unsigned kWrt, typename A, int kWidth>
__device__ __forceinline__ auto losses_of(const Values<F, A, kWidth>& values,
                                          const A (&parameter)[F::kParameters + 1]) {
  using Parameters = std::make_integer_sequence<int, F::kParameters>;
  using Loss = decltype(loss_of<F, kWrt>(values.of[0], parameter, OperandsOf<F>{}, Parameters{}));
  struct {
    Loss of[kWidth];
  } losses;
#pragma unroll
  for (int j = 0; j < kWidth; ++j)
    losses.of[j] = loss_of<F, kWrt>(values.of[j], parameter, OperandsOf<F>{}, Parameters{});
  return losses;
}

// Adds the losses to sum, or stores them. The additions are not fused with the formula's last operation, so that the
// sum is bitwise identical with and without gradients. This cannot prevent nvcc from fusing operations within a formula
// differently in the two kernels, which an H200 showed for WeightedBCEWithLogitsLoss in float64.
template <typename T, int kWidth, typename Loss>
__device__ __forceinline__ void take_losses(const PointwiseOptions& o, int64_t i, const Loss (&losses)[kWidth],
                                            AccumulateType<T>& sum) {
  if (o.reduction == Reduction::kNone) {
    AccumulateType<T> plain[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) plain[j] = losses[j].value;
    store_loss<T>(o.loss, o.loss_dtype != o.dtype, i, plain);
  } else {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum = math::rounded_sum(sum, losses[j].value);
  }
}

template <typename F, int kOperand, typename T, int kWidth, typename Loss>
__device__ __forceinline__ void write_gradient(const PointwiseOptions& o, int64_t i, const Loss (&loss)[kWidth],
                                               const AccumulateType<T> (&g)[kWidth]) {
  if (o.grad[kOperand] == nullptr) return;
  AccumulateType<T> grad[kWidth];
#pragma unroll
  for (int j = 0; j < kWidth; ++j) grad[j] = gradient<F>(g[j], partial_by<kOperand>(loss[j]));
  store_values(static_cast<T*>(o.grad[kOperand]) + i, grad);
}

// Evaluates one vector of each operand. With gradients, the loss is computed only if it is needed, and so are the
// gradients with respect to the operands after the first, which are rarely needed.
template <typename F, bool kGradients, typename T, int kWidth, int... kOperand>
__device__ __forceinline__ void evaluate(const PointwiseOptions& o, const Common<F, T>& common, int64_t i,
                                         const Vector<T, kWidth> (&vectors)[F::kOperands], AccumulateType<T>& sum,
                                         std::integer_sequence<int, kOperand...>) {
  using A = AccumulateType<T>;
  Values<F, A, kWidth> values;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) ((values.of[j][kOperand] = vectors[kOperand][j]), ...);
  if constexpr (kGradients) {
    constexpr unsigned kFirst = 1, kOthers = (1u << F::kOperands) - 2;
    const auto by_first = losses_of<F, kFirst>(values, common.parameter);
    if (o.loss != nullptr) take_losses<T>(o, i, by_first.of, sum);
    A g[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) g[j] = common.grad_output;
    if (o.grad_output_stride != 0) load_loss<T>(o.grad_output, o.loss_dtype != o.dtype, i, g);
    write_gradient<F, 0, T>(o, i, by_first.of, g);
    if (((kOperand > 0 && o.grad[kOperand] != nullptr) || ...)) {
      const auto by_others = losses_of<F, kOthers>(values, common.parameter);
      (
          [&] {
            if constexpr (kOperand > 0) write_gradient<F, kOperand, T>(o, i, by_others.of, g);
          }(),
          ...);
    }
  } else {
    take_losses<T>(o, i, losses_of<F, 0>(values, common.parameter).of, sum);
  }
}

// Evaluates a thread's units of kWidth elements, and returns the sum of their losses, or 0 if no sum is needed.
template <int kWidth, typename F, bool kGradients, typename T>
__device__ __forceinline__ AccumulateType<T> evaluate_units(const PointwiseOptions& o,
                                                            const VectorizedRange<T, int64_t>& elements) {
  constexpr int kVectors = vectors_in_flight(F::kOperands);
  Common<F, T> common = {};
#pragma unroll
  for (int k = 0; k < F::kParameters; ++k) common.parameter[k] = AccumulateType<T>(o.parameter[k]);
  if constexpr (kGradients) common.grad_output = common_grad_output<T>(o);

  // An operand of one value is put into all vectors once. The loop below does not load it, and it stays in place as
  // vectors move up.
  Vector<T, kWidth> vectors[kVectors][F::kOperands] = {};
#pragma unroll
  for (int k = 0; k < F::kOperands; ++k)
    if (is_one_value(o, k)) {
      const auto one = splat<kWidth>(*elements_of<T>(o, k));
#pragma unroll
      for (int p = 0; p < kVectors; ++p) vectors[p][k] = one;
    }

  AccumulateType<T> sum = 0;
  const int64_t units = elements.template units<kWidth>(), step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t unit = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; unit < units; unit += kVectors * step) {
#pragma unroll
    for (int p = 0; p < kVectors; ++p) {
      if (unit + p * step >= units) continue;
      const int64_t first = elements.template first<kWidth>(unit + p * step);
#pragma unroll
      for (int k = 0; k < F::kOperands; ++k)
        if (is_repeated<F>(o, k))
          vectors[p][k] = load_repeated<kWidth>(elements_of<T>(o, k), o.operand_period[k], first);
        else if (!is_one_value(o, k)) vectors[p][k] = load<kWidth>(elements_of<T>(o, k) + first);
    }
    // Not unrolled, so that a formula is compiled once, however long it is: the next vector moves to the first place.
#pragma unroll 1
    for (int64_t now = unit; now < units && now < unit + kVectors * step; now += step) {
      evaluate<F, kGradients>(o, common, elements.template first<kWidth>(now), vectors[0], sum, OperandsOf<F>{});
#pragma unroll
      for (int p = 1; p < kVectors; ++p)
#pragma unroll
        for (int k = 0; k < F::kOperands; ++k) vectors[p - 1][k] = vectors[p][k];
    }
  }
  return sum;
}

template <typename F, bool kGradients, typename T>
__device__ __forceinline__ void evaluate_all(const PointwiseOptions& o) {
  let_next_launch_start();
  const void* losses = o.loss == nullptr ? o.grad_output : o.loss;
  const bool one = o.loss == nullptr ? o.grad_output_stride == 0 : o.reduction != Reduction::kNone;
  const auto elements = vectorized_elements<F, T>(o, one ? nullptr : losses, OperandsOf<F>{});
  AccumulateType<T> sum = evaluate_units<kVectorSize<T>, F, kGradients>(o, elements);
  sum += evaluate_units<1, F, kGradients>(o, elements);
  if (o.loss == nullptr || o.reduction == Reduction::kNone) return;
  const double of_block = block_sum(double(sum));
  if (threadIdx.x == 0) static_cast<double*>(o.scratch)[blockIdx.x] = of_block;
}

// At least two blocks per multiprocessor, so that one loads while the other computes. To fit a third one, ptxas would
// spill registers.
#define FUSEDLOSS_BOUNDS __launch_bounds__(kThreads, 2)

template <typename F, typename T>
__global__ void FUSEDLOSS_BOUNDS losses(const PointwiseOptions o) {
  evaluate_all<F, false, T>(o);
}

// Both passes use the same kernel, so that the gradient is bitwise identical in both. In the forward pass the kernel
// also computes the losses.
template <typename F, typename T>
__global__ void FUSEDLOSS_BOUNDS gradients(const PointwiseOptions o) {
  if (o.loss == nullptr) wait_for_launch_before();
  if (o.loss == nullptr && gradient_is_ready<T>(o)) return;
  evaluate_all<F, true, T>(o);
}

#undef FUSEDLOSS_BOUNDS

// A single block adds up the blocks' sums in a fixed order, and divides them for the mean.
template <typename T>
__global__ void __launch_bounds__(kSumThreads) finish_loss(const PointwiseOptions o, int blocks) {
  wait_for_launch_before();
  const double sum = sum_of_blocks<double>(o.scratch, blocks);
  if (threadIdx.x != 0) return;
  const double loss[1] = {o.reduction == Reduction::kMean ? sum / o.divisor : sum};
  store_loss<T>(o.loss, o.loss_dtype != o.dtype, 0, loss);
}

inline unsigned grid_of(const PointwiseOptions& o) {
  const int64_t of_thread = vectors_in_flight(o.operands) * (kVectorBytes / bytes_of(o.dtype));
  const int64_t blocks = divide_up(o.numel, kThreads * of_thread);
  return unsigned(smaller(blocks, o.tuning.max_blocks));
}

template <typename F>
cudaError_t launch_forward(const PointwiseOptions& given, cudaStream_t stream) {
  PointwiseOptions o = given;
  cudaError_t error = complete(o.tuning, reinterpret_cast<const void*>(&finish_loss<float>));
  if (error != cudaSuccess) return error;
  bool with_gradients = false;
  for (int k = 0; k < F::kOperands; ++k) with_gradients = with_gradients || o.grad[k] != nullptr;
  return on_dtype(o.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (o.numel > 0) {
      const auto kernel = with_gradients ? gradients<F, T> : losses<F, T>;
      error = launch(kernel, {grid_of(o), kThreads}, stream, o);
      if (error != cudaSuccess) return error;
    }
    if (o.reduction == Reduction::kNone) return cudaSuccess;
    return launch(finish_loss<T>, after_launch(o, 1, kSumThreads), stream, o, int(grid_of(o)));
  });
}

template <typename F>
cudaError_t launch_backward(const PointwiseOptions& given, cudaStream_t stream) {
  PointwiseOptions o = given;
  if (o.numel == 0) return cudaSuccess;
  const cudaError_t error = complete(o.tuning, reinterpret_cast<const void*>(&finish_loss<float>));
  if (error != cudaSuccess) return error;
  if (o.grad_ready) o.tuning.max_blocks = smaller(o.tuning.max_blocks, kReadyGradientBlocks);
  return on_dtype(o.dtype, [&](auto zero) {
    return launch(gradients<F, decltype(zero)>, after_launch(o, grid_of(o), kThreads), stream, o);
  });
}

template <typename F>
constexpr PointwiseFormula kPointwise = {launch_forward<F>, launch_backward<F>};

}  // namespace
}  // namespace fusedloss::cuda
