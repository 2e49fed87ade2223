// What autograd is told: the ops as torch::autograd::Functions. In C++ because at small sizes a Python Function costs
// as much as a whole loss.
//
// A Function is entered only where a gradient is wanted. Where a backward pass is itself to be differentiated
// (create_graph), or its gradient is a batch of them (is_grads_batched), the gradient is composed of torch's own
// operations: it is exact, and autograd knows its derivative. Where someone looks on (a dispatch mode, compiled
// autograd), the backward pass is the op that fusedloss/ops.py registers.

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/nll_loss_nd.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ops/ops.h"
#include "ops/plain.h"
#include "ops/row_layout.h"
#include "ops/run.h"

namespace fusedloss {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

bool must_compose(const at::Tensor& grad_output) {
  constexpr c10::DispatchKeySet kTransforms({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched,
                                             c10::DispatchKey::FuncTorchGradWrapper});
  return at::GradMode::is_enabled() || grad_output.key_set().has_any(kTransforms);
}

template <typename Signature, typename... Arguments>
auto call_registered_op(const char* name, Arguments&&... arguments) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
  return op.call(std::forward<Arguments>(arguments)...);
}

// The gradients of loss(inputs...) by each of its inputs, themselves differentiable where this backward pass has to be.
//
// The tensors must have their memory, which callers check: not all of torch's functions do.
//
// They are taken at views: the graph behind the inputs belongs to the pass that is under way. Taken at the inputs
// themselves, they would run its hooks twice, and count twice what one input owes to another.
template <typename Loss>
variable_list composed_gradients(const variable_list& inputs, const at::Tensor& grad_output, Loss loss) {
  const bool create_graph = at::GradMode::is_enabled();
  const at::AutoGradMode enable(true);
  variable_list views, of;
  for (const auto& input : inputs) {
    views.push_back(input.view_as(input));
    if (input.requires_grad()) of.push_back(views.back());
  }
  const at::Tensor value = loss(views);
  variable_list grads;
  if (!value.requires_grad()) return variable_list(inputs.size());  // all that would is a mask
  const variable_list found = torch::autograd::grad({value}, of, {grad_output}, /*retain_graph=*/create_graph,
                                                    create_graph, /*allow_unused=*/true);
  auto next = found.begin();
  for (const auto& input : inputs) grads.push_back(input.requires_grad() ? *next++ : at::Tensor());
  return grads;
}

// Called before torch's functions are given a tensor that the forward pass has saved.
void check_saved(const char* op, const char* name, const at::Tensor& tensor) {
  if (is_plain(tensor)) check_memory(op, name, tensor);
}

// The passes are seen by the profiler, each under the name of what it computes.

using Inputs = c10::ArrayRef<const c10::IValue>;

CrossEntropyResult run_cross_entropy_forward(const at::Tensor& input, const at::Tensor& target,
                                             const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                                             double label_smoothing, bool with_grad) {
  RECORD_FUNCTION(with_grad ? "fusedloss::cross_entropy_forward_with_grad" : "fusedloss::cross_entropy_forward",
                  Inputs());
  return cross_entropy_forward(input, target, weight, reduction, ignore_index, label_smoothing,
                               autocast_to_float32(input), with_grad);
}

PointwiseResult run_pointwise_forward(const PointwiseCall& call, unsigned with_grads) {
  RECORD_FUNCTION("fusedloss::" + call.loss.name + (with_grads != 0 ? "_forward_with_grad" : "_forward"), Inputs());
  return pointwise_forward(call, autocast_to_float32(call.operands[0]), with_grads);
}

NLLLossResult run_nll_loss_forward(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                                   int64_t reduction, int64_t ignore_index) {
  RECORD_FUNCTION("fusedloss::nll_loss_forward", Inputs());
  return nll_loss_forward(input, target, weight, reduction, ignore_index, autocast_to_float32(input));
}

// ---- the gradient in the forward pass ----
//
// A loss is mostly the root of its graph: the gradient that comes back is 1. The forward pass then computes the
// gradient as well, while the cache holds the input, and the backward pass hands it over: once, for it becomes the
// caller's. Any other grad_output (a loss scale, a weight of this loss among others) is multiplied in float32, by
// computing the gradient anew: a 16-bit gradient scaled afterwards would have been rounded, or lost, before.
//
// On CUDA nobody waits to see the value: there the kernels look at it.

// Whether an op's last grad_output was 1. What it decides is time and never a result.
std::atomic<bool> grad_output_was_one_on_cpu[kHandOvers] = {true, true};

bool grad_output_was_one(HandOver op, const at::Tensor& input) {
#ifdef FUSEDLOSS_WITH_CUDA
  if (on_cuda(input)) {
    const volatile int32_t* const flag = grad_output_was_one_on_cuda(op, input);
    return flag != nullptr && *flag != 0;
  }
#endif
  return grad_output_was_one_on_cpu[int(op)];
}

bool grad_in_forward(HandOver op, const at::Tensor& input, int64_t reduction) {
  // Saved-tensor hooks say that memory is short, or that this forward pass will be run again.
  return reduction != 0 && grad_output_was_one(op, input) &&
         at::SavedTensorDefaultHooks::get_tls_state().stack.empty();
}

bool is_one(const at::Tensor& value) {
  switch (value.scalar_type()) {
    case at::kFloat:
      return *value.const_data_ptr<float>() == 1;
    case at::kDouble:
      return *value.const_data_ptr<double>() == 1;
    case at::kBFloat16:
      return *value.const_data_ptr<at::BFloat16>() == 1;
    default:
      return *value.const_data_ptr<at::Half>() == 1;
  }
}

// An entry each: compiled autograd does not follow tensors in lists.
constexpr const char* kGradsOfForward[kMaxOperands] = {"grad",           "grad of target",    "grad of tensor 2",
                                                       "grad of tensor 3", "grad of tensor 4", "grad of tensor 5",
                                                       "grad of tensor 6", "grad of tensor 7"};

void keep_grads_of_forward(AutogradContext* ctx, at::TensorList grads) {
  for (size_t i = 0; i < grads.size(); ++i)
    if (grads[i].defined()) ctx->saved_data[kGradsOfForward[i]] = grads[i];
}

// The gradients that the forward pass has left; from here on they are the caller's.
struct GradsOfForward {
  variable_list grads;
  bool are_asked_for = false;  // as they are

  GradsOfForward(HandOver op, AutogradContext* ctx, const at::Tensor& grad_output, size_t count) : grads(count) {
    bool any = false;
    for (size_t i = 0; i < count; ++i) {
      const auto found = ctx->saved_data.find(kGradsOfForward[i]);
      if (found == ctx->saved_data.end()) continue;
      grads[i] = std::move(found->second).toTensor();
      ctx->saved_data.erase(found);
      any = true;
    }
    if (on_cuda(grad_output) || grad_output.dim() != 0) return;
    const bool one = is_one(grad_output);
    grad_output_was_one_on_cpu[int(op)] = one;
    are_asked_for = one && any;
  }
};

void drop_grads_of_forward(AutogradContext* ctx) {
  for (const char* name : kGradsOfForward) ctx->saved_data.erase(name);
}

// ---- the gradient in the logits' place

bool is_leaf_or_its_view(const at::Tensor& input) {
  const at::TensorBase& base = input.is_view() ? input._base() : input;
  return base.is_leaf() && base.requires_grad();
}

void check_overwritable(const at::Tensor& input) {
  TORCH_CHECK(!is_leaf_or_its_view(input), "cross_entropy: inplace_backward=True writes the gradient over input, got a ",
              "leaf that requires grad, or a view of one, expected the result of an operation");
  TORCH_CHECK(!may_overlap(input), "cross_entropy: inplace_backward=True writes the gradient over input, got elements ",
              "that share memory (sizes ", input.sizes(), ", strides ", input.strides(),
              "), expected each to have its own; use input.contiguous()");
}

class CrossEntropy : public Function<CrossEntropy> {
 public:
  static constexpr bool is_traceable = true;  // by compiled autograd

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& target,
                            const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                            double label_smoothing, bool inplace_backward) {
    if (inplace_backward) check_overwritable(input);
    const bool with_grad = !inplace_backward && grad_in_forward(HandOver::kCrossEntropy, input, reduction);
    const auto [loss, statistics, grad] =
        run_cross_entropy_forward(input, target, weight, reduction, ignore_index, label_smoothing, with_grad);
    keep_grads_of_forward(ctx, grad);
    ctx->save_for_backward({input, target, weight.value_or(at::Tensor()), statistics});
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["label_smoothing"] = label_smoothing;
    if (inplace_backward) ctx->saved_data["overwritten"] = false;
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto overwritten = ctx->saved_data.find("overwritten");
    const bool in_place = overwritten != ctx->saved_data.end();
    TORCH_CHECK(!in_place || !overwritten->second.toBool(),
                "cross_entropy: a second backward pass, but the first has written the gradient over input "
                "(inplace_backward=True)");
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &input = saved[0], &target = saved[1], &statistics = saved[3];
    const OptionalTensor weight = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
    const int64_t reduction = ctx->saved_data["reduction"].toInt();
    const int64_t ignore_index = ctx->saved_data["ignore_index"].toInt();
    const double label_smoothing = ctx->saved_data["label_smoothing"].toDouble();
    const at::Tensor& grad_output = grad_outputs[0];

    at::Tensor grad;
    if (must_compose(grad_output)) {
      drop_grads_of_forward(ctx);
      check_saved("cross_entropy", "input", input);
      check_saved("cross_entropy", "target", target);
      check_saved("cross_entropy", "weight", saved[2]);
      const auto dtype = grad_output.scalar_type();  // float32 where the forward pass ran under autocast
      grad = composed_gradients({input}, grad_output, [&](const variable_list& views) {
        return at::cross_entropy_loss(views[0].to(dtype), target.to(target.is_floating_point() ? dtype : at::kLong),
                                      weight ? OptionalTensor(weight->to(dtype)) : std::nullopt, reduction,
                                      ignore_index, label_smoothing);
      })[0];
    } else if (!is_plain(grad_output)) {
      drop_grads_of_forward(ctx);
      using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                   const at::Tensor&, int64_t, int64_t, double);
      grad = call_registered_op<Signature>("fusedloss::cross_entropy_backward", grad_output, input, target, weight,
                                           statistics, reduction, ignore_index, label_smoothing);
    } else if (const GradsOfForward left(HandOver::kCrossEntropy, ctx, grad_output, 1); left.are_asked_for) {
      grad = left.grads[0];
    } else {
      RECORD_FUNCTION("fusedloss::cross_entropy_backward", Inputs());
      // An alias without history, which counts its versions with input.
      const at::Tensor logits = in_place ? input.detach() : input;
      grad = cross_entropy_backward(grad_output, logits, target, weight, statistics, reduction, ignore_index,
                                    label_smoothing, in_place, left.grads[0]);
      if (in_place) {
        torch::autograd::impl::bump_version(logits);
        ctx->saved_data["overwritten"] = true;
      }
    }
    return {grad, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

class Pointwise : public Function<Pointwise> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, at::TensorList operands, int64_t loss,
                            c10::ArrayRef<double> parameters, int64_t reduction, std::optional<int64_t> divisor) {
    const PointwiseCall call = {pointwise_loss(loss), operands, parameters, reduction, divisor};
    unsigned with_grads = 0;
    if (grad_in_forward(HandOver::kPointwise, operands[0], reduction))
      for (size_t k = 0; k < operands.size(); ++k) with_grads |= unsigned(operands[k].requires_grad()) << k;
    auto [value, grads] = run_pointwise_forward(call, with_grads);
    keep_grads_of_forward(ctx, grads);
    ctx->save_for_backward(operands.vec());
    // In one list: each entry of saved_data costs as much as a small loss does.
    std::vector<double> numbers = {double(loss), double(reduction), double(divisor.value_or(-1))};
    numbers.insert(numbers.end(), parameters.begin(), parameters.end());
    ctx->saved_data["numbers"] = std::move(numbers);
    return value;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list operands = ctx->get_saved_variables();
    const at::Tensor& grad_output = grad_outputs[0];
    const auto numbers = ctx->saved_data["numbers"].toDoubleVector();
    const auto divisor = numbers[2] < 0 ? std::nullopt : std::optional(int64_t(numbers[2]));
    const PointwiseCall call = {pointwise_loss(int64_t(numbers[0])), operands,
                                c10::ArrayRef<double>(numbers).slice(3), int64_t(numbers[1]), divisor};
    unsigned wanted = 0;
    for (size_t k = 0; k < operands.size(); ++k) wanted |= unsigned(ctx->needs_input_grad(k)) << k;

    variable_list grads;
    if (must_compose(grad_output)) {
      drop_grads_of_forward(ctx);
      for (size_t k = 0; k < operands.size(); ++k)
        check_saved(call.loss.name.c_str(), call.loss.operands[k].c_str(), operands[k]);
      const auto dtype = grad_output.scalar_type();
      grads = composed_gradients(operands, grad_output, [&](variable_list views) {
        for (auto& view : views) view = view.to(dtype);
        return call.loss.composed(views, call.parameters.vec(), call.reduction, divisor);
      });
    } else if (!is_plain(grad_output)) {
      drop_grads_of_forward(ctx);
      grads = backward_by_registered_op(grad_output, call, wanted);
    } else if (GradsOfForward left(HandOver::kPointwise, ctx, grad_output, operands.size()); left.are_asked_for) {
      grads = left.grads;
    } else {
      RECORD_FUNCTION("fusedloss::" + call.loss.name + "_backward", Inputs());
      grads = pointwise_backward(grad_output, call, wanted, std::move(left.grads));
    }
    grads.resize(operands.size() + 4);  // nothing for the other arguments
    return grads;
  }

 private:
  static variable_list backward_by_registered_op(const at::Tensor& grad_output, const PointwiseCall& call,
                                                 unsigned wanted) {
    using Signature = std::vector<at::Tensor>(const at::Tensor&, at::TensorList, const std::string&,
                                              c10::ArrayRef<double>, int64_t, std::optional<int64_t>, c10::List<bool>);
    c10::List<bool> mask;
    for (size_t k = 0; k < call.operands.size(); ++k) mask.push_back((wanted >> k & 1) != 0);
    const auto found = call_registered_op<Signature>("fusedloss::pointwise_backward", grad_output, call.operands,
                                                     call.loss.name, call.parameters, call.reduction, call.divisor, mask);
    variable_list grads;
    auto next = found.begin();
    for (const bool is_wanted : mask) grads.push_back(is_wanted ? *next++ : at::Tensor());
    return grads;
  }
};

// Its gradient does not depend on input, which is not saved: it may be freed, or overwritten.
class NLLLoss : public Function<NLLLoss> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& target,
                            const OptionalTensor& weight, int64_t reduction, int64_t ignore_index) {
    const auto [loss, total_weight] = run_nll_loss_forward(input, target, weight, reduction, ignore_index);
    ctx->save_for_backward({target, weight.value_or(at::Tensor()), total_weight});
    // In one list: each entry of saved_data costs as much as a small loss does.
    std::vector<int64_t> numbers = {reduction, ignore_index, int64_t(input.scalar_type())};
    const auto strides = gradient_strides(input);
    numbers.insert(numbers.end(), input.sizes().begin(), input.sizes().end());
    numbers.insert(numbers.end(), strides.begin(), strides.end());
    ctx->saved_data["numbers"] = std::move(numbers);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &target = saved[0], &total_weight = saved[2], &grad_output = grad_outputs[0];
    const OptionalTensor weight = saved[1].defined() ? OptionalTensor(saved[1]) : std::nullopt;
    const auto numbers = ctx->saved_data["numbers"].toIntVector();
    const int64_t reduction = numbers[0], ignore_index = numbers[1];
    const auto dtype = at::ScalarType(numbers[2]);
    const auto shape = at::IntArrayRef(numbers).slice(3);
    const auto sizes = shape.slice(0, shape.size() / 2), strides = shape.slice(shape.size() / 2);

    at::Tensor grad;
    if (must_compose(grad_output)) {
      check_saved("nll_loss", "target", target);
      check_saved("nll_loss", "weight", saved[1]);
      // Any input has this gradient, and a second derivative of 0; only its place in the graph must be input's own.
      const at::Tensor input = target.new_zeros(sizes, dtype);
      torch::autograd::impl::set_gradient_edge(input, torch::autograd::get_current_node()->next_edge(0));
      const auto type = grad_output.scalar_type();  // float32 where the forward pass ran under autocast
      grad = composed_gradients({input}, grad_output, [&](const variable_list& views) {
        return at::nll_loss_nd(views[0].to(type), target.to(at::kLong),
                               weight ? OptionalTensor(weight->to(type)) : std::nullopt, reduction, ignore_index);
      })[0];
    } else if (!is_plain(grad_output)) {
      using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, const at::Tensor&,
                                   c10::SymIntArrayRef, c10::SymIntArrayRef, at::ScalarType, int64_t, int64_t);
      grad = call_registered_op<Signature>("fusedloss::nll_loss_backward", grad_output, target, weight, total_weight,
                                           c10::fromIntArrayRefSlow(sizes), c10::fromIntArrayRefSlow(strides), dtype,
                                           reduction, ignore_index);
    } else {
      RECORD_FUNCTION("fusedloss::nll_loss_backward", Inputs());
      grad = nll_loss_backward(grad_output, target, weight, total_weight, sizes, strides, dtype, reduction,
                               ignore_index);
    }
    return {grad, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

OptionalTensor cross_entropy(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                             int64_t reduction, int64_t ignore_index, double label_smoothing, bool inplace_backward) {
  if (!cross_entropy_covers(input, target, weight)) return std::nullopt;
  if (at::GradMode::is_enabled() && input.requires_grad())
    return CrossEntropy::apply(input, target, weight, reduction, ignore_index, label_smoothing, inplace_backward);
  return run_cross_entropy_forward(input, target, weight, reduction, ignore_index, label_smoothing, false).loss;
}

OptionalTensor pointwise(int64_t loss, at::TensorList operands, c10::ArrayRef<double> parameters, int64_t reduction,
                         std::optional<int64_t> divisor) {
  const PointwiseCall call = {pointwise_loss(loss), operands, parameters, reduction, divisor};
  if (!pointwise_covers(call.loss, operands)) return std::nullopt;
  const auto requires_grad = [](const at::Tensor& operand) { return operand.requires_grad(); };
  const auto is_inference = [](const at::Tensor& operand) { return operand.is_inference(); };
  if (at::GradMode::is_enabled() && std::any_of(operands.begin(), operands.end(), requires_grad)) {
    if (std::any_of(operands.begin(), operands.end(), is_inference)) {  // cannot be saved; not all of torch's have to
      variable_list given = operands.vec();
      for (auto& operand : given) operand = autocast_to_float32(operand) ? operand.to(at::kFloat) : operand;
      return call.loss.composed(given, parameters.vec(), reduction, divisor);
    }
    return Pointwise::apply(operands, loss, parameters, reduction, divisor);
  }
  return run_pointwise_forward(call, /*with_grads=*/0).loss;
}

OptionalTensor nll_loss(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                        int64_t reduction, int64_t ignore_index) {
  if (!nll_loss_covers(input, target, weight)) return std::nullopt;
  if (at::GradMode::is_enabled() && input.requires_grad())
    return NLLLoss::apply(input, target, weight, reduction, ignore_index);
  return run_nll_loss_forward(input, target, weight, reduction, ignore_index).loss;
}

std::array<std::pair<const std::type_info*, const char*>, 3> node_types() {
  using torch::autograd::CppNode;
  return {{{&typeid(CppNode<CrossEntropy>), "CrossEntropyBackward"},
           {&typeid(CppNode<Pointwise>), "PointwiseBackward"},
           {&typeid(CppNode<NLLLoss>), "NLLLossBackward"}}};
}

}  // namespace fusedloss
