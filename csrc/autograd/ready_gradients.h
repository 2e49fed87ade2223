// The gradient that the forward pass computes.
//
// A loss is mostly the root of its graph: its grad_output is 1. The forward pass then computes the gradient as well,
// while the cache holds the input, and the backward pass hands it over: once, for it becomes the caller's. For any
// other grad_output (a loss scale, the weight of this loss among others) the gradient is computed anew, with the
// product in float32: a 16-bit gradient that is scaled afterwards has been rounded, or lost, before.
//
// On the CPU the host looks at grad_output. On CUDA it would have to wait, so there the kernel looks.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>

#include "ops/last_grad_output.h"

namespace fusedloss {

// Whether the forward pass computes the gradient too.
bool forward_computes_gradient(ReadyLoss loss, const at::Tensor& input, int64_t reduction);

class ReadyGradients {
 public:
  // Leaves the gradients of a forward pass for the backward pass; those that are undefined were not computed.
  static void leave(torch::autograd::AutogradContext* ctx, at::TensorList grads);

  // Takes what the forward pass has left. A second backward pass of the same graph finds nothing.
  ReadyGradients(torch::autograd::AutogradContext* ctx, ReadyLoss loss, size_t count);

  // Returns the gradients, if there are any and the host sees that grad_output is 1. It remembers what it has seen, for
  // the next forward pass to decide by.
  std::optional<torch::autograd::variable_list> hand_over(const at::Tensor& grad_output);

  // For a backward pass on CUDA, whose kernel looks at grad_output.
  torch::autograd::variable_list& grads() { return grads_; }

 private:
  ReadyLoss loss_;
  torch::autograd::variable_list grads_;
  bool is_empty_ = true;
};

}  // namespace fusedloss
