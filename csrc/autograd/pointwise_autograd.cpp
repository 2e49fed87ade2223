#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "autograd/backward_cases.h"
#include "autograd/losses.h"
#include "autograd/ready_gradients.h"
#include "ops/plain.h"
#include "ops/pointwise_op.h"

namespace fusedloss {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

PointwiseResult run_forward(const PointwiseCall& call, unsigned with_grads) {
  RECORD_FUNCTION("fusedloss::" + call.loss.name + (with_grads != 0 ? "_forward_with_grad" : "_forward"),
                  ProfiledInputs());
  return pointwise_forward(call, autocast_to_float32(call.operands[0]), with_grads);
}

// What the forward pass saves for the backward pass.
struct Saved {
  variable_list operands;
  int64_t loss;  // its number
  std::vector<double> parameters;
  int64_t reduction;
  std::optional<int64_t> divisor;

  // Uses at most two entries of saved_data: each costs as much time as a small loss.
  void pack(AutogradContext* ctx) const {
    ctx->save_for_backward(operands);
    ctx->saved_data["options"] = std::vector<int64_t>{loss, reduction, divisor.value_or(kNoDivisor)};
    if (!parameters.empty()) ctx->saved_data["parameters"] = parameters;
  }

  static Saved unpack(AutogradContext* ctx) {
    const auto options = ctx->saved_data["options"].toIntVector();
    const auto parameters = ctx->saved_data.find("parameters");
    Saved s;
    s.operands = ctx->get_saved_variables();
    s.loss = options[0];
    s.reduction = options[1];
    if (options[2] != kNoDivisor) s.divisor = options[2];
    if (parameters != ctx->saved_data.end()) s.parameters = parameters->second.toDoubleVector();
    return s;
  }

  PointwiseCall call() const { return {pointwise_loss(loss), operands, parameters, reduction, divisor}; }

  static constexpr int64_t kNoDivisor = -1;
};

// ---- the cases of a backward pass; bit k of `wanted` is set if the gradient of operand k is wanted

// Calls a registered op, which takes a bool for each operand and returns only the wanted gradients.
variable_list call_gradients_op(const char* name, const PointwiseCall& call, const at::Tensor& grad_output,
                                unsigned wanted) {
  using Signature = std::vector<at::Tensor>(const at::Tensor&, at::TensorList, const std::string&,
                                            c10::ArrayRef<double>, int64_t, std::optional<int64_t>, c10::List<bool>);
  c10::List<bool> are_wanted;
  for (size_t k = 0; k < call.operands.size(); ++k) are_wanted.push_back((wanted >> k & 1) != 0);
  const auto found = call_registered_op<Signature>(name, grad_output, call.operands, call.loss.name, call.parameters,
                                                   call.reduction, call.divisor, are_wanted);
  variable_list grads;
  auto next = found.begin();
  for (const bool is_wanted : are_wanted) grads.push_back(is_wanted ? *next++ : at::Tensor());
  return grads;
}

variable_list compose(const PointwiseCall& call, const at::Tensor& grad_output, unsigned wanted) {
  for (size_t k = 0; k < call.operands.size(); ++k)
    check_saved(call.loss.name.c_str(), call.loss.operands[k].c_str(), call.operands[k]);
  return call_gradients_op("fusedloss::pointwise_composed_gradients", call, grad_output, wanted);
}

variable_list call_backward_op(const PointwiseCall& call, const at::Tensor& grad_output, unsigned wanted) {
  return call_gradients_op("fusedloss::pointwise_backward", call, grad_output, wanted);
}

variable_list call_kernel(const PointwiseCall& call, const at::Tensor& grad_output, unsigned wanted,
                          variable_list ready) {
  RECORD_FUNCTION("fusedloss::" + call.loss.name + "_backward", ProfiledInputs());
  return pointwise_backward(grad_output, call, wanted, std::move(ready));
}

class Pointwise : public torch::autograd::Function<Pointwise> {
 public:
  static constexpr bool is_traceable = true;  // lets compiled autograd trace it

  static at::Tensor forward(AutogradContext* ctx, at::TensorList operands, int64_t loss,
                            c10::ArrayRef<double> parameters, int64_t reduction, std::optional<int64_t> divisor) {
    unsigned with_grads = 0;
    if (forward_computes_gradient(ReadyLoss::kPointwise, operands[0], reduction))
      for (size_t k = 0; k < operands.size(); ++k) with_grads |= unsigned(operands[k].requires_grad()) << k;
    const auto [value, grads] =
        run_forward({pointwise_loss(loss), operands, parameters, reduction, divisor}, with_grads);
    ReadyGradients::leave(ctx, grads);
    Saved{operands.vec(), loss, parameters.vec(), reduction, divisor}.pack(ctx);
    return value;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const Saved saved = Saved::unpack(ctx);
    const PointwiseCall call = saved.call();
    const size_t count = saved.operands.size();
    const at::Tensor& grad_output = grad_outputs[0];
    ReadyGradients ready(ctx, ReadyLoss::kPointwise, count);
    unsigned wanted = 0;
    for (size_t k = 0; k < count; ++k) wanted |= unsigned(ctx->needs_input_grad(k)) << k;

    variable_list grads;
    if (must_compose(grad_output)) {
      grads = compose(call, grad_output, wanted);
    } else if (!is_plain(grad_output)) {
      grads = call_backward_op(call, grad_output, wanted);
    } else if (auto handed_over = ready.hand_over(grad_output)) {
      grads = std::move(*handed_over);
    } else {
      grads = call_kernel(call, grad_output, wanted, std::move(ready.grads()));
    }
    grads.resize(count + 4);  // the other arguments have no gradient
    return grads;
  }
};

}  // namespace

OptionalTensor pointwise(int64_t loss, at::TensorList operands, c10::ArrayRef<double> parameters, int64_t reduction,
                         std::optional<int64_t> divisor) {
  const PointwiseCall call = {pointwise_loss(loss), operands, parameters, reduction, divisor};
  if (!pointwise_covers(call)) return std::nullopt;
  const auto requires_grad = [](const at::Tensor& operand) { return operand.requires_grad(); };
  if (!at::GradMode::is_enabled() || std::none_of(operands.begin(), operands.end(), requires_grad))
    return run_forward(call, /*with_grads=*/0).loss;
  // An inference tensor cannot be saved for the backward pass, and not all of torch's own functions need to save it.
  const auto is_inference = [](const at::Tensor& operand) { return operand.is_inference(); };
  if (std::any_of(operands.begin(), operands.end(), is_inference)) return std::nullopt;
  return Pointwise::apply(operands, loss, parameters, reduction, divisor);
}

NodeType pointwise_node() { return {&typeid(torch::autograd::CppNode<Pointwise>), "PointwiseBackward"}; }

}  // namespace fusedloss
