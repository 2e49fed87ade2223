// Calls the kernels of the negative log likelihood: takes the tensors of a call and returns its loss and its gradient.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/checks.h"
#include "ops/row_layout.h"

namespace fusedloss {

// The arguments of one call except input, whose values the backward pass does not need.
struct NLLLossCall {
  const at::Tensor& target;      // class indices in input's shape without its class dimension
  const OptionalTensor& weight;  // (C)
  int64_t reduction, ignore_index;
};

// True if the kernels compute this call of plain tensors, and its gradient; see cross_entropy_covers.
bool nll_loss_covers(const at::Tensor& input, const NLLLossCall& call);

struct NLLLossResult {
  at::Tensor loss;          // of input's dtype, or of float32 under autocast (float64 stays float64)
  at::Tensor total_weight;  // for the backward pass: the mean's denominator, shape (1); shape (0) for other reductions
};

// input: log-probabilities, (C), (N, C) or (N, C, d1, …).
NLLLossResult nll_loss_forward(const at::Tensor& input, const NLLLossCall& call, bool autocast);

// The shape, layout and dtype of the gradient.
struct GradientGeometry {
  at::IntArrayRef sizes;    // input's
  at::IntArrayRef strides;  // see gradient_strides
  at::ScalarType dtype;     // input's
};

// Returns d loss/d input times grad_output.
at::Tensor nll_loss_backward(const at::Tensor& grad_output, const NLLLossCall& call, const at::Tensor& total_weight,
                             const GradientGeometry& geometry);

// Returns the strides of at::empty_like(input).
Dimensions gradient_strides(const at::Tensor& input);

}  // namespace fusedloss
