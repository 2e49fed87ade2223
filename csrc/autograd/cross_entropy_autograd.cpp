#include <ATen/ops/cross_entropy_loss.h>
#include <torch/csrc/autograd/custom_function.h>

#include <vector>

#include "autograd/backward_cases.h"
#include "autograd/losses.h"
#include "autograd/ready_gradients.h"
#include "ops/cross_entropy_op.h"
#include "ops/plain.h"
#include "ops/row_layout.h"

namespace fusedloss {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

CrossEntropyResult run_forward(const CrossEntropyCall& call, bool with_grad) {
  RECORD_FUNCTION(with_grad ? "fusedloss::cross_entropy_forward_with_grad" : "fusedloss::cross_entropy_forward",
                  ProfiledInputs());
  return cross_entropy_forward(call, autocast_to_float32(call.input), with_grad);
}

// What the forward pass saves for the backward pass.
struct Saved {
  at::Tensor input, target;
  OptionalTensor weight;
  at::Tensor statistics;
  int64_t reduction, ignore_index;
  double label_smoothing;
  bool inplace_backward;

  // Uses few entries of saved_data: each costs as much time as a small loss.
  void pack(AutogradContext* ctx) const {
    ctx->save_for_backward({input, target, weight.value_or(at::Tensor()), statistics});
    ctx->saved_data["options"] = std::vector<int64_t>{reduction, ignore_index, inplace_backward};
    ctx->saved_data["label_smoothing"] = label_smoothing;
  }

  static Saved unpack(AutogradContext* ctx) {
    const variable_list tensors = ctx->get_saved_variables();
    const auto options = ctx->saved_data["options"].toIntVector();
    Saved s;
    s.input = tensors[0];
    s.target = tensors[1];
    if (tensors[2].defined()) s.weight = tensors[2];
    s.statistics = tensors[3];
    s.reduction = options[0];
    s.ignore_index = options[1];
    s.inplace_backward = options[2] != 0;
    s.label_smoothing = ctx->saved_data["label_smoothing"].toDouble();
    return s;
  }

  CrossEntropyCall call() const { return {input, target, weight, reduction, ignore_index, label_smoothing}; }
};

// ---- the cases of a backward pass

at::Tensor compose(const Saved& s, const at::Tensor& grad_output) {
  check_saved("cross_entropy", "input", s.input);
  check_saved("cross_entropy", "target", s.target);
  if (s.weight.has_value()) check_saved("cross_entropy", "weight", *s.weight);
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t,
                               int64_t, double);
  return call_registered_op<Signature>("fusedloss::cross_entropy_composed_gradient", grad_output, s.input, s.target,
                                       s.weight, s.reduction, s.ignore_index, s.label_smoothing);
}

at::Tensor call_backward_op(const Saved& s, const at::Tensor& grad_output) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                               const at::Tensor&, int64_t, int64_t, double);
  return call_registered_op<Signature>("fusedloss::cross_entropy_backward", grad_output, s.input, s.target, s.weight,
                                       s.statistics, s.reduction, s.ignore_index, s.label_smoothing);
}

at::Tensor call_kernel(const Saved& s, const at::Tensor& grad_output, const at::Tensor& ready) {
  RECORD_FUNCTION("fusedloss::cross_entropy_backward", ProfiledInputs());
  return cross_entropy_backward(grad_output, s.call(), s.statistics, /*in_place=*/false, ready);
}

at::Tensor call_kernel_in_place(AutogradContext* ctx, const Saved& s, const at::Tensor& grad_output) {
  RECORD_FUNCTION("fusedloss::cross_entropy_backward", ProfiledInputs());
  // An alias of input without autograd history. It shares input's version counter.
  const at::Tensor logits = s.input.detach();
  const CrossEntropyCall call = {logits, s.target, s.weight, s.reduction, s.ignore_index, s.label_smoothing};
  const at::Tensor grad = cross_entropy_backward(grad_output, call, s.statistics, /*in_place=*/true);
  torch::autograd::impl::bump_version(logits);
  ctx->saved_data["overwritten"] = true;
  return grad;
}

class CrossEntropy : public torch::autograd::Function<CrossEntropy> {
 public:
  static constexpr bool is_traceable = true;  // lets compiled autograd trace it

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& target,
                            const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                            double label_smoothing, bool inplace_backward) {
    const bool with_grad = !inplace_backward && forward_computes_gradient(ReadyLoss::kCrossEntropy, input, reduction);
    const auto [loss, statistics, grad] =
        run_forward({input, target, weight, reduction, ignore_index, label_smoothing}, with_grad);
    ReadyGradients::leave(ctx, grad);
    Saved{input, target, weight, statistics, reduction, ignore_index, label_smoothing, inplace_backward}.pack(ctx);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    TORCH_CHECK(ctx->saved_data.count("overwritten") == 0,
                "cross_entropy: the backward pass cannot run a second time, because the first has written the gradient "
                "over input (inplace_backward=True)");
    const Saved saved = Saved::unpack(ctx);
    const at::Tensor& grad_output = grad_outputs[0];
    ReadyGradients ready(ctx, ReadyLoss::kCrossEntropy, 1);

    at::Tensor grad;
    if (must_compose(grad_output)) {
      grad = compose(saved, grad_output);
    } else if (!is_plain(grad_output)) {
      grad = call_backward_op(saved, grad_output);
    } else if (auto handed_over = ready.hand_over(grad_output)) {
      grad = handed_over->front();
    } else if (saved.inplace_backward) {
      grad = call_kernel_in_place(ctx, saved, grad_output);
    } else {
      grad = call_kernel(saved, grad_output, ready.grads()[0]);
    }
    return {grad, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

// ---- the gradient that is written over the logits

bool is_leaf_or_its_view(const at::Tensor& input) {
  const at::TensorBase& base = input.is_view() ? input._base() : input;
  return base.is_leaf() && base.requires_grad();
}

void check_overwritable(const at::Tensor& input) {
  TORCH_CHECK(!is_leaf_or_its_view(input),
              "cross_entropy: inplace_backward=True writes the gradient over input, got a ",
              "leaf that requires grad, or a view of one, expected the result of an operation");
  TORCH_CHECK(!may_overlap(input), "cross_entropy: inplace_backward=True writes the gradient over input, got elements ",
              "that share memory (sizes ", input.sizes(), ", strides ", input.strides(),
              "), expected each element to have its own memory; pass input.contiguous()");
}

}  // namespace

OptionalTensor cross_entropy(const CrossEntropyCall& call, bool inplace_backward) {
  if (!are_ours(call.input, call.target, call.weight)) return std::nullopt;
  if (!cross_entropy_covers(call))
    return at::cross_entropy_loss(call.input, call.target, call.weight, call.reduction, call.ignore_index,
                                  call.label_smoothing);
  if (!at::GradMode::is_enabled() || !call.input.requires_grad()) return run_forward(call, /*with_grad=*/false).loss;
  if (inplace_backward) check_overwritable(call.input);
  return CrossEntropy::apply(call.input, call.target, call.weight, call.reduction, call.ignore_index,
                             call.label_smoothing, inplace_backward);
}

NodeType cross_entropy_node() { return {&typeid(torch::autograd::CppNode<CrossEntropy>), "CrossEntropyBackward"}; }

}  // namespace fusedloss
