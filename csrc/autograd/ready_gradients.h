// The gradient that the forward pass computes.
//
// A loss is usually the root of its graph, so that its grad_output is 1. The forward pass then computes the gradient as
// well, while the cache holds the input, and the backward pass returns it. It does so only once, because the gradient
// then belongs to the caller. For any other grad_output (a loss scale, or the weight of this loss in a sum) the
// backward pass computes the gradient again, with the product in float32: a 16-bit gradient that is scaled afterwards
// has been rounded before, possibly to 0.
//
// On the CPU the host checks whether grad_output is 1. On CUDA the host would have to wait for the value, so the kernel
// checks it.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>

#include "ops/last_grad_output.h"

namespace fusedloss {

// True if the forward pass should compute the gradient too.
bool forward_computes_gradient(ReadyLoss loss, const at::Tensor& input, int64_t reduction);

class ReadyGradients {
 public:
  // Stores the gradients that the forward pass computed, for the backward pass. Undefined tensors are skipped.
  static void leave(torch::autograd::AutogradContext* ctx, at::TensorList grads);

  // Takes the gradients that `leave` stored. A second backward pass of the same graph finds none.
  ReadyGradients(torch::autograd::AutogradContext* ctx, ReadyLoss loss, size_t count);

  // Returns the gradients if there are any and grad_output is 1. Returns std::nullopt on CUDA, where the kernel checks
  // grad_output, and for a grad_output with dimensions. Records whether grad_output was 1 (ops/last_grad_output.h).
  std::optional<torch::autograd::variable_list> hand_over(const at::Tensor& grad_output);

  // The gradients for the kernel, which keeps or overwrites them. Undefined if there are none.
  torch::autograd::variable_list& grads() { return grads_; }

 private:
  ReadyLoss loss_;
  torch::autograd::variable_list grads_;
  bool is_empty_ = true;
};

}  // namespace fusedloss
