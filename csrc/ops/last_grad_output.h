// Whether the last backward pass of a loss was given a grad_output of 1. If so, the next forward pass computes the
// gradient as well: see autograd/ready_gradients.h. What is remembered decides time, and never a result.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "kernels/options.h"
#include "ops/run.h"

namespace fusedloss {

// The losses whose forward pass may compute the gradient. Each remembers its own last grad_output: in a sum of losses
// with weights, one of them may always be given 1, and another never.
enum class ReadyLoss { kCrossEntropy, kPointwise };

bool last_grad_output_was_one(ReadyLoss loss, const at::Tensor& input);

// For tensors on the CPU.
void remember_grad_output(ReadyLoss loss, bool was_one);

#ifdef FUSEDLOSS_WITH_CUDA
// Where the backward pass on a device tells it: in memory that the device can write and the host can read, so that the
// host need not wait. Null if there is none.
int32_t* last_grad_output_flag(ReadyLoss loss, const at::Tensor& tensor);
#endif

// Sets what CUDA's backward pass is told of a ready gradient: whether there is one, for a grad_output of 1, and where
// the kernel reports whether grad_output was 1.
template <typename Options>
void take_ready_gradient(Options& o, ReadyLoss loss, const at::Tensor& input, bool is_ready) {
#ifdef FUSEDLOSS_WITH_CUDA
  if (!on_cuda(input) || o.reduction == Reduction::kNone) return;
  o.grad_ready = is_ready;
  o.grad_output_was_one = last_grad_output_flag(loss, input);
#endif
}

}  // namespace fusedloss
