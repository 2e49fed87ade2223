// The losses as autograd knows them: what bindings.cpp exposes to Python.
//
// A loss that needs a gradient is a torch::autograd::Function, in <loss>_autograd.cpp. It is written in C++ because at
// small sizes a Function in Python costs as much as a whole loss.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <typeinfo>
#include <utility>

#include "ops/cross_entropy_op.h"
#include "ops/nll_loss_op.h"

namespace fusedloss {

// Each returns nothing where the tensors are not plain (ops/plain.h), or where this build has no kernels for their
// device. A call of plain tensors that the kernels do not cover is computed by torch's own function.
//
// inplace_backward: the backward pass writes the gradient over input.
OptionalTensor cross_entropy(const CrossEntropyCall& call, bool inplace_backward);
OptionalTensor nll_loss(const at::Tensor& input, const NLLLossCall& call);

// The pointwise loss of this number (ops/pointwise_registry.h). It returns nothing also where the kernels do not cover
// the call: torch's own function is then called by Python, which may have to broadcast the operands first.
OptionalTensor pointwise(int64_t loss, at::TensorList operands, c10::ArrayRef<double> parameters, int64_t reduction,
                         std::optional<int64_t> divisor);

// The type of a loss's grad_fn, and what Python calls it.
using NodeType = std::pair<const std::type_info*, const char*>;
NodeType cross_entropy_node();
NodeType nll_loss_node();
NodeType pointwise_node();

}  // namespace fusedloss
