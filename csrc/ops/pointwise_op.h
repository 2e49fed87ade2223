// Calls the kernels of the pointwise losses: takes the tensors of a call and returns its loss and its gradients.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "ops/pointwise_registry.h"

namespace fusedloss {

// The arguments of one call.
struct PointwiseCall {
  const PointwiseLoss& loss;
  at::TensorList operands;  // input first; all have input's shape, because the caller broadcasts
  c10::ArrayRef<double> parameters;
  int64_t reduction;               // torch's number for it
  std::optional<int64_t> divisor;  // what the mean divides by; by default the number of elements
};

// True if the kernels compute this call, and its gradients. Unlike cross_entropy_covers, it may be called with tensors
// that are not plain, for which it returns false.
bool pointwise_covers(const PointwiseCall& call);

// Gradients are listed in the order of the operands. A set of gradients is a bit mask: the lowest bit is the first
// operand.
struct PointwiseResult {
  at::Tensor loss;                // of input's dtype, or of float32 under autocast (float64 stays float64)
  std::vector<at::Tensor> grads;  // of the operands in with_grads, for a grad_output of 1; the others are undefined
};

// with_grads: a set of the operands whose gradients are computed too; see with_grad of cross_entropy_forward.
PointwiseResult pointwise_forward(const PointwiseCall& call, bool autocast, unsigned with_grads = 0);

// Returns the gradients of the operands in `wanted`, times grad_output; the others are undefined. ready: for each
// wanted operand, as `ready` of cross_entropy_backward.
std::vector<at::Tensor> pointwise_backward(const at::Tensor& grad_output, const PointwiseCall& call, unsigned wanted,
                                           std::vector<at::Tensor> ready = {});

}  // namespace fusedloss
