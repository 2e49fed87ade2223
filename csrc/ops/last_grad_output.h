// Records whether the last backward pass of a loss got a grad_output of 1. If so, the next forward pass computes the
// gradient as well: see autograd/ready_gradients.h. The record affects the time of a call. On CUDA it can also affect
// the last place of a cross entropy, whose sums are taken in another order if the forward pass computes the gradient,
// and of float64 binary_cross_entropy_with_logits with weights (ARCHITECTURE.md, "Reproducibility").
//
// There is one record per ReadyLoss and type of device for the whole process: all models and threads share it. On CUDA
// the device writes it and the host reads it without waiting, so a forward pass may still read an older value.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "kernels/options.h"
#include "ops/run.h"

namespace fusedloss {

// The losses whose forward pass may compute the gradient. Each has its own record: in a weighted sum of losses, one
// loss may always get a grad_output of 1 and another never.
enum class ReadyLoss { kCrossEntropy, kPointwise };

bool last_grad_output_was_one(ReadyLoss loss, const at::Tensor& input);

// Records the grad_output of a backward pass on the CPU.
void remember_grad_output(ReadyLoss loss, bool was_one);

#ifdef FUSEDLOSS_WITH_CUDA
// The flag that a backward pass on CUDA sets. It lies in memory that the device can write and the host can read, so
// that the host need not wait for the device. Null if such memory cannot be allocated.
int32_t* last_grad_output_flag(ReadyLoss loss, const at::Tensor& tensor);
#endif

// Sets the options that tell a backward pass on CUDA whether the gradient for a grad_output of 1 is ready, and where to
// record whether grad_output was 1. Does nothing on the CPU.
template <typename Options>
void take_ready_gradient(Options& o, ReadyLoss loss, const at::Tensor& input, bool is_ready) {
#ifdef FUSEDLOSS_WITH_CUDA
  if (!on_cuda(input) || o.reduction == Reduction::kNone) return;
  o.grad_ready = is_ready;
  o.grad_output_was_one = last_grad_output_flag(loss, input);
#endif
}

}  // namespace fusedloss
