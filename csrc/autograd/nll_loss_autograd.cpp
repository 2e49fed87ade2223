#include <ATen/ops/nll_loss_nd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <utility>
#include <vector>

#include "autograd/backward_cases.h"
#include "autograd/losses.h"
#include "ops/nll_loss_op.h"
#include "ops/plain.h"

namespace fusedloss {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

NLLLossResult run_forward(const at::Tensor& input, const NLLLossCall& call) {
  RECORD_FUNCTION("fusedloss::nll_loss_forward", ProfiledInputs());
  return nll_loss_forward(input, call, autocast_to_float32(input));
}

// What the forward pass saves for the backward pass. The gradient does not depend on the values of input, so input is
// not saved, and may be freed or overwritten.
struct Saved {
  at::Tensor target;
  OptionalTensor weight;
  at::Tensor total_weight;
  int64_t reduction, ignore_index;
  at::ScalarType dtype;       // of input and of its gradient
  Dimensions sizes, strides;  // of the gradient

  // Uses one entry of saved_data: each costs as much time as a small loss.
  void pack(AutogradContext* ctx) const {
    ctx->save_for_backward({target, weight.value_or(at::Tensor()), total_weight});
    std::vector<int64_t> options = {reduction, ignore_index, int64_t(dtype)};
    options.insert(options.end(), sizes.begin(), sizes.end());
    options.insert(options.end(), strides.begin(), strides.end());
    ctx->saved_data["options"] = std::move(options);
  }

  static Saved unpack(AutogradContext* ctx) {
    const variable_list tensors = ctx->get_saved_variables();
    const auto options = ctx->saved_data["options"].toIntVector();
    const auto sizes = options.begin() + 3, strides = sizes + (options.end() - sizes) / 2;
    Saved s;
    s.target = tensors[0];
    if (tensors[1].defined()) s.weight = tensors[1];
    s.total_weight = tensors[2];
    s.reduction = options[0];
    s.ignore_index = options[1];
    s.dtype = at::ScalarType(options[2]);
    s.sizes.assign(sizes, strides);
    s.strides.assign(strides, options.end());
    return s;
  }
};

// ---- the cases of a backward pass

at::Tensor compose(const Saved& s, const at::Tensor& grad_output) {
  check_saved("nll_loss", "target", s.target);
  if (s.weight.has_value()) check_saved("nll_loss", "weight", *s.weight);
  // The gradient is the same for any values of input, and the second derivative is 0. So zeros can replace input; only
  // the gradient edge must be that of input.
  const at::Tensor input = s.target.new_zeros(s.sizes, s.dtype);
  torch::autograd::impl::set_gradient_edge(input, torch::autograd::get_current_node()->next_edge(0));
  using Signature =
      at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t, int64_t);
  return call_registered_op<Signature>("fusedloss::nll_loss_composed_gradient", grad_output, input, s.target, s.weight,
                                       s.reduction, s.ignore_index);
}

at::Tensor call_backward_op(const Saved& s, const at::Tensor& grad_output) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, const at::Tensor&,
                               c10::SymIntArrayRef, c10::SymIntArrayRef, at::ScalarType, int64_t, int64_t);
  return call_registered_op<Signature>("fusedloss::nll_loss_backward", grad_output, s.target, s.weight, s.total_weight,
                                       c10::fromIntArrayRefSlow(s.sizes), c10::fromIntArrayRefSlow(s.strides), s.dtype,
                                       s.reduction, s.ignore_index);
}

at::Tensor call_kernel(const Saved& s, const at::Tensor& grad_output) {
  RECORD_FUNCTION("fusedloss::nll_loss_backward", ProfiledInputs());
  return nll_loss_backward(grad_output, {s.target, s.weight, s.reduction, s.ignore_index}, s.total_weight,
                           {s.sizes, s.strides, s.dtype});
}

class NLLLoss : public torch::autograd::Function<NLLLoss> {
 public:
  static constexpr bool is_traceable = true;  // lets compiled autograd trace it

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& target,
                            const OptionalTensor& weight, int64_t reduction, int64_t ignore_index) {
    const auto [loss, total_weight] = run_forward(input, {target, weight, reduction, ignore_index});
    const Dimensions sizes(input.sizes().begin(), input.sizes().end());
    Saved{target, weight, total_weight, reduction, ignore_index, input.scalar_type(), sizes, gradient_strides(input)}
        .pack(ctx);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const Saved saved = Saved::unpack(ctx);
    const at::Tensor& grad_output = grad_outputs[0];

    at::Tensor grad;
    if (must_compose(grad_output)) {
      grad = compose(saved, grad_output);
    } else if (!is_plain(grad_output)) {
      grad = call_backward_op(saved, grad_output);
    } else {
      grad = call_kernel(saved, grad_output);
    }
    return {grad, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

OptionalTensor nll_loss(const at::Tensor& input, const NLLLossCall& call) {
  if (!are_ours(input, call.target, call.weight)) return std::nullopt;
  if (!nll_loss_covers(input, call))
    return at::nll_loss_nd(input, call.target, call.weight, call.reduction, call.ignore_index);
  if (!at::GradMode::is_enabled() || !input.requires_grad()) return run_forward(input, call).loss;
  return NLLLoss::apply(input, call.target, call.weight, call.reduction, call.ignore_index);
}

NodeType nll_loss_node() { return {&typeid(torch::autograd::CppNode<NLLLoss>), "NLLLossBackward"}; }

}  // namespace fusedloss
