// The reduced loss, and the factor of a loss in the backward pass, for the options of any loss.
#pragma once

#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vec.cuh"
#include "kernels/formulas/cross_entropy-inl.h"

namespace fusedloss::cuda {

// Stores the mean or the sum of all rows' losses.
template <typename T, typename Options>
__device__ __forceinline__ void store_reduced_loss(const Options& o, const LossSum& sum) {
  const bool mean = o.reduction == Reduction::kMean;
  const double loss[1] = {mean ? divide_by_total_weight(sum.loss, sum.total_weight) : sum.loss};
  store_loss<T>(o.loss, o.loss_dtype != o.dtype, 0, loss);
}

template <typename T, typename Options>
__device__ __forceinline__ void store_total_weight(const Options& o, double sum) {
  *static_cast<AccumulateType<T>*>(o.total_weight) = AccumulateType<T>(sum);
}

// Stores the reduced loss and, for the mean, the total weight by which it was divided.
template <typename T, typename Options>
__device__ __forceinline__ void store_result(const Options& o, const LossSum& sum) {
  store_reduced_loss<T>(o, sum);
  if (o.reduction == Reduction::kMean) store_total_weight<T>(o, sum.total_weight);
}

template <typename T, typename Options>
__device__ __forceinline__ AccumulateType<T> grad_output_at(const Options& o, int64_t i) {
  AccumulateType<T> g[1] = {1};
  if (o.grad_output != nullptr) load_loss<T>(o.grad_output, o.loss_dtype != o.dtype, i * o.grad_output_stride, g);
  return g[0];
}

// True if the forward pass has already written the gradient that this backward pass is to compute. All threads of the
// grid call this; the first one also reports whether grad_output is 1.
template <typename T, typename Options>
__device__ __forceinline__ bool gradient_is_ready(const Options& o) {
  if (o.grad_output_stride != 0) return false;
  const bool is_one = grad_output_at<T>(o, 0) == 1;
  const bool first = blockIdx.x == 0 && threadIdx.x == 0 && threadIdx.y == 0;
  if (first && o.grad_output_was_one != nullptr) *o.grad_output_was_one = is_one;
  return o.grad_ready && is_one;
}

}  // namespace fusedloss::cuda
