// Pointwise losses between torch and the kernels: from the tensors of a call to its loss and its gradients.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "ops/pointwise_registry.h"

namespace fusedloss {

// The arguments of one call.
struct PointwiseCall {
  const PointwiseLoss& loss;
  at::TensorList operands;  // of one shape, that of input, which is the first; broadcasting is the caller's
  c10::ArrayRef<double> parameters;
  int64_t reduction;               // torch's number for it
  std::optional<int64_t> divisor;  // what the mean divides by; the number of elements if it is not given
};

// Do the kernels compute this call, and its gradients? As cross_entropy_covers, but that the tensors need not be plain.
bool pointwise_covers(const PointwiseCall& call);

// Gradients are counted as the operands are, and sets of them are numbers with a bit for each operand, the lowest for
// the first.
struct PointwiseResult {
  at::Tensor loss;                // of input's dtype, under autocast float32
  std::vector<at::Tensor> grads;  // for a grad_output of 1, of the operands of with_grads; the others are undefined
};

// with_grads: as of cross_entropy_forward.
PointwiseResult pointwise_forward(const PointwiseCall& call, bool autocast, unsigned with_grads = 0);

// Returns the gradients of the operands of `wanted`, times grad_output; the others are undefined. ready: as of
// cross_entropy_backward, where it is wanted.
std::vector<at::Tensor> pointwise_backward(const at::Tensor& grad_output, const PointwiseCall& call, unsigned wanted,
                                           std::vector<at::Tensor> ready = {});

}  // namespace fusedloss
