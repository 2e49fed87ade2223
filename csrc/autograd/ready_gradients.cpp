#include "autograd/ready_gradients.h"

#include <ATen/SavedTensorHooks.h>

#include <utility>

#include "kernels/options.h"
#include "ops/run.h"

namespace fusedloss {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The keys of the gradients in saved_data. Each gradient has its own entry, because compiled autograd does not trace
// tensors in lists.
constexpr const char* kNames[kMaxOperands] = {"grad of tensor 0", "grad of tensor 1", "grad of tensor 2",
                                              "grad of tensor 3", "grad of tensor 4", "grad of tensor 5",
                                              "grad of tensor 6", "grad of tensor 7"};

template <typename T>
bool is_one_as(const at::Tensor& value) {
  return *value.const_data_ptr<T>() == 1;
}

bool is_one(const at::Tensor& value) {
  switch (value.scalar_type()) {
    case at::kFloat: return is_one_as<float>(value);
    case at::kDouble: return is_one_as<double>(value);
    case at::kBFloat16: return is_one_as<at::BFloat16>(value);
    default: return is_one_as<at::Half>(value);
  }
}

}  // namespace

bool forward_computes_gradient(ReadyLoss loss, const at::Tensor& input, int64_t reduction) {
  // Saved-tensor hooks mean that memory is short, or that this forward pass will be run again.
  return Reduction(reduction) != Reduction::kNone && last_grad_output_was_one(loss, input) &&
         at::SavedTensorDefaultHooks::get_tls_state().stack.empty();
}

void ReadyGradients::leave(AutogradContext* ctx, at::TensorList grads) {
  for (size_t k = 0; k < grads.size(); ++k)
    if (grads[k].defined()) ctx->saved_data[kNames[k]] = grads[k];
}

ReadyGradients::ReadyGradients(AutogradContext* ctx, ReadyLoss loss, size_t count) : loss_(loss), grads_(count) {
  for (size_t k = 0; k < count; ++k) {
    const auto found = ctx->saved_data.find(kNames[k]);
    if (found == ctx->saved_data.end()) continue;
    grads_[k] = std::move(found->second).toTensor();
    ctx->saved_data.erase(found);
    is_empty_ = false;
  }
}

std::optional<variable_list> ReadyGradients::hand_over(const at::Tensor& grad_output) {
  if (on_cuda(grad_output) || grad_output.dim() != 0) return std::nullopt;
  const bool one = is_one(grad_output);
  remember_grad_output(loss_, one);
  return one && !is_empty_ ? std::optional(std::move(grads_)) : std::nullopt;
}

}  // namespace fusedloss
