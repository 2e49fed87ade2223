// The negative log likelihood between torch and the kernels: from the tensors of a call to its loss and its gradient.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/checks.h"
#include "ops/row_layout.h"

namespace fusedloss {

// The arguments of one call but for input, whose values the backward pass does not need.
struct NLLLossCall {
  const at::Tensor& target;      // class indices, input's shape without its class dimension
  const OptionalTensor& weight;  // (C)
  int64_t reduction, ignore_index;
};

// Do the kernels compute this call of plain tensors, and its gradient? As cross_entropy_covers.
bool nll_loss_covers(const at::Tensor& input, const NLLLossCall& call);

struct NLLLossResult {
  at::Tensor loss;          // of input's dtype, under autocast float32
  at::Tensor total_weight;  // for the backward pass: what the mean divides by, (1); (0) for the other reductions
};

// input: log-probabilities, (C), (N, C) or (N, C, d1, …).
NLLLossResult nll_loss_forward(const at::Tensor& input, const NLLLossCall& call, bool autocast);

// What the gradient is like.
struct GradientGeometry {
  at::IntArrayRef sizes;    // input's
  at::IntArrayRef strides;  // see gradient_strides
  at::ScalarType dtype;     // input's
};

// Returns d loss/d input, times grad_output.
at::Tensor nll_loss_backward(const at::Tensor& grad_output, const NLLLossCall& call, const at::Tensor& total_weight,
                             const GradientGeometry& geometry);

// The strides that at::empty_like(input) has.
Dimensions gradient_strides(const at::Tensor& input);

}  // namespace fusedloss
