// The losses with autograd, which bindings.cpp exposes to Python.
//
// A loss that needs a gradient is computed by a torch::autograd::Function in <loss>_autograd.cpp. The Functions are in
// C++ because, at small sizes, a Function in Python costs as much as a whole loss.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <typeinfo>
#include <utility>

#include "ops/cross_entropy_op.h"
#include "ops/nll_loss_op.h"

namespace fusedloss {

// Each returns std::nullopt if the tensors are not plain (ops/plain.h), or if this build has no kernels for their
// device. If the tensors are plain, but the kernels do not cover the call, torch's own function computes the loss.
//
// inplace_backward: the backward pass writes the gradient over input.
OptionalTensor cross_entropy(const CrossEntropyCall& call, bool inplace_backward);
OptionalTensor nll_loss(const at::Tensor& input, const NLLLossCall& call);

// Computes the pointwise loss of this number (ops/pointwise_registry.h). Returns std::nullopt also if the kernels do
// not cover the call: the Python caller may have to broadcast the operands first, and calls torch's own function
// otherwise.
OptionalTensor pointwise(int64_t loss, at::TensorList operands, c10::ArrayRef<double> parameters, int64_t reduction,
                         std::optional<int64_t> divisor);

// The C++ type of a loss's grad_fn, and its name in Python.
using NodeType = std::pair<const std::type_info*, const char*>;
NodeType cross_entropy_node();
NodeType nll_loss_node();
NodeType pointwise_node();

}  // namespace fusedloss
