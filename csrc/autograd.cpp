// What autograd is told: the ops as torch::autograd::Functions. In C++ because at small sizes a Python Function costs as
// much as a whole loss.
//
// A Function is entered only where a gradient is wanted. Where a backward pass is itself to be differentiated
// (create_graph), or its gradient is no plain tensor (is_grads_batched, a backward under a dispatch mode), the gradient
// is composed of torch's own operations: it is exact, and autograd knows its derivative.

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/mse_loss.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops.h"
#include "plain.h"

namespace fusedloss {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

bool must_compose(const at::Tensor& grad_output) {
  return at::GradMode::is_enabled() || !is_plain(grad_output);
}

// The gradients of torch's loss, themselves differentiable where this backward pass has to be.
template <typename Loss>
variable_list composed_gradients(const variable_list& of, const at::Tensor& grad_output, Loss loss) {
  const bool create_graph = at::GradMode::is_enabled();
  const at::AutoGradMode enable(true);
  return torch::autograd::grad({loss()}, of, {grad_output}, /*retain_graph=*/create_graph, create_graph);
}

class CrossEntropy : public Function<CrossEntropy> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& target,
                            const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                            double label_smoothing) {
    auto [loss, statistics] =
        cross_entropy_forward(input, target, weight, reduction, ignore_index, label_smoothing);
    ctx->save_for_backward({input, target, weight.value_or(at::Tensor()), statistics});
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["label_smoothing"] = label_smoothing;
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &input = saved[0], &target = saved[1], &statistics = saved[3];
    const OptionalTensor weight = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
    const int64_t reduction = ctx->saved_data["reduction"].toInt();
    const int64_t ignore_index = ctx->saved_data["ignore_index"].toInt();
    const double label_smoothing = ctx->saved_data["label_smoothing"].toDouble();
    const at::Tensor& grad_output = grad_outputs[0];

    at::Tensor grad;
    if (must_compose(grad_output)) {
      const auto dtype = grad_output.scalar_type();  // float32 where the forward pass ran under autocast
      grad = composed_gradients({input}, grad_output, [&] {
        return at::cross_entropy_loss(input.to(dtype), target.to(target.is_floating_point() ? dtype : at::kLong),
                                      weight ? OptionalTensor(weight->to(dtype)) : std::nullopt, reduction,
                                      ignore_index, label_smoothing);
      })[0];
    } else {
      grad = cross_entropy_backward(grad_output, input, target, weight, statistics, reduction, ignore_index,
                                    label_smoothing);
    }
    return {grad, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

class MSELoss : public Function<MSELoss> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& target,
                            int64_t reduction) {
    ctx->save_for_backward({input, target});
    ctx->saved_data["reduction"] = reduction;
    return mse_loss_forward(input, target, reduction);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &input = saved[0], &target = saved[1], &grad_output = grad_outputs[0];
    const int64_t reduction = ctx->saved_data["reduction"].toInt();
    const bool wants_input = ctx->needs_input_grad(0), wants_target = ctx->needs_input_grad(1);

    at::Tensor grad_input, grad_target;
    if (must_compose(grad_output)) {
      variable_list of;
      if (wants_input) of.push_back(input);
      if (wants_target) of.push_back(target);
      const auto dtype = grad_output.scalar_type();
      const variable_list grads = composed_gradients(
          of, grad_output, [&] { return at::mse_loss(input.to(dtype), target.to(dtype), reduction); });
      if (wants_input) grad_input = grads.front();
      if (wants_target) grad_target = grads.back();
    } else {
      std::tie(grad_input, grad_target) =
          mse_loss_backward(grad_output, input, target, reduction, wants_input, wants_target);
    }
    return {grad_input, grad_target, at::Tensor()};
  }
};

}  // namespace

OptionalTensor cross_entropy(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                             int64_t reduction, int64_t ignore_index, double label_smoothing) {
  if (!cross_entropy_covers(input, target, weight)) return std::nullopt;
  if (at::GradMode::is_enabled() && input.requires_grad())
    return CrossEntropy::apply(input, target, weight, reduction, ignore_index, label_smoothing);
  return std::get<0>(cross_entropy_forward(input, target, weight, reduction, ignore_index, label_smoothing));
}

OptionalTensor mse_loss(const at::Tensor& input, const at::Tensor& target, int64_t reduction) {
  if (!mse_loss_covers(input, target)) return std::nullopt;
  if (at::GradMode::is_enabled() && (input.requires_grad() || target.requires_grad()))
    return MSELoss::apply(input, target, reduction);
  return mse_loss_forward(input, target, reduction);
}

}  // namespace fusedloss
