#include "ops/cross_entropy_op.h"

#include <ATen/ops/empty_like_ops.h>

#include <optional>
#include <utility>

#include "kernels/cpu/cross_entropy_cpu.h"
#include "ops/class_indices.h"
#include "ops/cuda_tuning.h"
#include "ops/huge_pages.h"
#include "ops/last_grad_output.h"
#include "ops/loss_tensors.h"
#include "ops/row_layout.h"
#include "ops/run.h"
#ifdef FUSEDLOSS_WITH_CUDA
#include <ATen/ops/sum.h>

#include "kernels/cuda/cross_entropy_cuda.h"
#endif

namespace fusedloss {
namespace {

constexpr const char* kOp = "cross_entropy";

bool has_probabilities(const CrossEntropyCall& call) { return call.input.sizes() == call.target.sizes(); }

void check_probabilities(const CrossEntropyCall& call) {
  TORCH_CHECK(at::isFloatingType(call.target.scalar_type()), kOp, ": target has the shape of input, ",
              call.input.sizes(), ", so it must hold class probabilities of a floating point type, got ",
              call.target.scalar_type(), "; class indices have the shape of input without its class dimension");
  TORCH_CHECK(call.target.scalar_type() == call.input.scalar_type(), kOp,
              ": target holds class probabilities, so it must have the dtype of input, ", call.input.scalar_type(),
              ", got ", call.target.scalar_type());
  TORCH_CHECK(call.ignore_index < 0, kOp, ": ignore_index must be negative when target holds class probabilities, got ",
              call.ignore_index);
}

// The kernels' arguments for one call: the options, and the tensors that own the memory the options point to.
struct Arguments {
  CrossEntropyOptions o = {};
  Layout layout = Layout::kRows;
  at::Tensor input, target, weight, statistics;

  explicit Arguments(const CrossEntropyCall& call) {
    o.tuning = cuda_tuning();
    o.dtype = check_dtype(kOp, "input", call.input);
    check_has_classes(kOp, call.input);
    check_memory(kOp, "input", call.input);
    o.reduction = check_reduction(kOp, call.reduction);
    o.ignore_index = call.ignore_index;
    check_same_device(kOp, "target", call.target, call.input);
    check_memory(kOp, "target", call.target);
    const bool probabilities = has_probabilities(call);
    if (probabilities) {
      check_probabilities(call);
    } else {
      check_class_indices(kOp, call.input, call.target);
    }
    TORCH_CHECK(!(call.label_smoothing > 1), kOp, ": label_smoothing must be between 0.0 and 1.0, got ",
                call.label_smoothing);
    o.label_smoothing = call.label_smoothing > 0 ? call.label_smoothing : 0;  // torch treats negative and NaN as 0

    const RowSizes sizes = row_sizes(call.input);
    take_input(call.input, sizes);
    probabilities ? take_probabilities(call.target, sizes) : take_class_indices(call.target);
    if (call.weight.has_value()) take_weight(*call.weight);
  }

  int64_t statistics_numel() const {
    return cross_entropy_statistics_numel(o.rows(), o.reduction == Reduction::kMean, sums_weight());
  }

  void take_gradient(const at::Tensor& written) {
    o.grad_logits = written.data_ptr();
    o.grad_strides = kernel_strides(written, layout);
  }

  void take_statistics(const at::Tensor& given) {
    statistics = given;
    char* const first = static_cast<char*>(statistics.data_ptr());
    const auto at = [&](int64_t i) { return first + i * statistics.element_size(); };
    o.row_max = at(0);
    o.row_scale = at(o.rows());
    o.total_weight = o.reduction == Reduction::kMean ? at(2 * o.rows()) : nullptr;
    o.weight_sum = sums_weight() ? at(statistics_numel() - 1) : nullptr;
  }

 private:
  bool sums_weight() const {
    return sums_class_weights(weight.defined(), o.label_smoothing, /*class_indices=*/o.target_index != nullptr);
  }

  void take_input(const at::Tensor& given, const RowSizes& sizes) {
    const auto found = layout_of(given, sizes);
    input = found.has_value() ? given : given.contiguous();
    layout = found.has_value() ? *found : *layout_of(input, sizes);
    o.logits = input.const_data_ptr();
    o.logits_strides = kernel_strides(input, layout);
    o.outer = sizes.outer;
    o.classes = sizes.classes;
    o.inner = sizes.inner;
    if (layout == Layout::kSwapped) std::swap(o.outer, o.inner);
  }

  void take_probabilities(const at::Tensor& given, const RowSizes& sizes) {
    target = in_layout(given, sizes, layout);
    static const double kNothing = 0;  // not null: null means class indices
    o.target_probability = target.numel() > 0 ? target.const_data_ptr() : &kNothing;
    o.target_strides = kernel_strides(target, layout);
  }

  void take_class_indices(const at::Tensor& given) {
    target = kernel_class_indices(given);
    o.target_index = target.const_data_ptr<int64_t>();
  }

  void take_weight(const at::Tensor& given) {
    weight = kernel_weight(kOp, given, o.classes, input);
    o.weight = weight.const_data_ptr();
  }
};

void forward_on_cpu(Arguments& a) {
  CrossEntropyOptions& o = a.o;
  const cpu::Work work = cpu::cross_entropy_work(o);
  const cpu::CrossEntropyKernels& kernels = cpu::cross_entropy_kernels(o);
  const HostScratch scratch(cpu::cross_entropy_scratch_bytes(o));
  o.scratch = scratch.data();
  if (o.weight_sum != nullptr) kernels.weight_sum(o);
  if (cpu::needs_total_weight_first(o)) {
    run_on_cpu(work, kernels.sum_target_weights, o);
    kernels.total_weight(o);
  }
  run_on_cpu(work, kernels.forward, o);
  const int64_t bad = kernels.finish(o);
  if (bad >= 0) refuse_class_index(kOp, o, a.target, bad, o.target_index[bad]);
}

#ifdef FUSEDLOSS_WITH_CUDA
void forward_on_cuda(Arguments& a) {
  CrossEntropyOptions& o = a.o;
  if (o.weight_sum != nullptr) {
    auto weight_sum = a.statistics.slice(0, a.statistics_numel() - 1);
    at::sum_out(weight_sum, a.weight, at::IntArrayRef{0}, /*keepdim=*/true);
  }
  const cuda::CrossEntropyLaunchers& launchers = cuda::cross_entropy_launchers(o);
  run_on_cuda(kOp, a.input, [&](cudaStream_t stream) {
    const cudaError_t error = launchers.prepare_forward(o);
    if (error != cudaSuccess) return error;
    const auto scratch = a.input.new_empty({launchers.scratch_bytes(o)}, at::kByte);
    o.scratch = scratch.data_ptr();
    return launchers.forward(o, stream);
  });
}
#endif

void run_forward(Arguments& a) {
#ifdef FUSEDLOSS_WITH_CUDA
  if (on_cuda(a.input)) return forward_on_cuda(a);
#endif
  forward_on_cpu(a);
}

void run_backward(const Arguments& a) {
  const CrossEntropyOptions& o = a.o;
#ifdef FUSEDLOSS_WITH_CUDA
  if (on_cuda(a.input)) return run_on_cuda(kOp, a.input, cuda::cross_entropy_launchers(o).backward, o);
#endif
  run_on_cpu(cpu::cross_entropy_work(o), cpu::cross_entropy_kernels(o).backward, o);
}

// Returns an uninitialised tensor in the layout of input, which the fake kernel in fusedloss/ops.py promises.
at::Tensor fresh_gradient(const at::Tensor& input) {
  // Calls the operator directly: the header of at::empty_like doubles the compile time of this file.
  const at::Tensor grad = at::_ops::empty_like::call(input, {}, {}, {}, {}, {});
  prefer_huge_pages(grad);
  return grad;
}

void check_statistics(const Arguments& a, const at::Tensor& statistics, const at::Tensor& input) {
  check_same_device(kOp, "statistics", statistics, input);
  const at::ScalarType expected = accumulate_type(input.scalar_type());
  TORCH_CHECK(
      statistics.numel() == a.statistics_numel() && statistics.is_contiguous() && statistics.scalar_type() == expected,
      kOp, ": statistics must come from the forward pass of the same call, expected ", a.statistics_numel(),
      " contiguous elements of type ", expected, ", got shape ", statistics.sizes(), " with strides ",
      statistics.strides(), " and type ", statistics.scalar_type());
  check_memory(kOp, "statistics", statistics);
}

}  // namespace

bool cross_entropy_covers(const CrossEntropyCall& call) {
  const at::Tensor &input = call.input, &target = call.target;
  const OptionalTensor& weight = call.weight;
  if (input.dim() == 0 || row_sizes(input).classes == 0) return false;
#ifdef FUSEDLOSS_WITH_CUDA
  if (on_cuda(input) && row_sizes(input).classes > cuda::kMaxClasses) return false;
#endif
  if (weight.has_value() && weight->requires_grad()) return false;  // torch differentiates it, or raises
  if (input.dim() == 1 && target.dim() == 1 && target.numel() == 1 && input.numel() != 1) return false;
  if (has_probabilities(call) && at::isFloatingType(target.scalar_type())) {
    // There is no kernel for the gradient of target, or for mixed dtypes, which torch promotes.
    if (target.requires_grad() || target.scalar_type() != input.scalar_type()) return false;
    if (weight.has_value() && weight->scalar_type() != input.scalar_type()) return false;
  }
  return true;
}

CrossEntropyResult cross_entropy_forward(const CrossEntropyCall& call, bool autocast, bool with_grad) {
  const at::Tensor& input = call.input;
  Arguments a(call);
  CrossEntropyOptions& o = a.o;
  if (call.weight.has_value()) check_weight_dtype(kOp, input, *call.weight, autocast);
  if (debug_enabled && o.target_index != nullptr) check_class_indices_on_host(kOp, o, a.target);
  const auto statistics = input.new_empty({a.statistics_numel()}, accumulate_type(input.scalar_type()));
  a.take_statistics(statistics);
  const auto loss = allocate_loss(o, input, autocast,
                                  [&](at::ScalarType type) { return input.new_empty(sizes_of_rows(input), type); });

  std::optional<GradientInLayout> gradient;
  if (with_grad) a.take_gradient(gradient.emplace(fresh_gradient(input), a.layout).written);
  run_forward(a);
  return {loss, statistics, gradient ? gradient->take() : at::Tensor()};
}

at::Tensor cross_entropy_backward(const at::Tensor& grad_output, const CrossEntropyCall& call,
                                  const at::Tensor& statistics, bool in_place, const at::Tensor& ready) {
  const at::Tensor& input = call.input;
  Arguments a(call);
  CrossEntropyOptions& o = a.o;
  check_statistics(a, statistics, input);
  a.take_statistics(statistics);
  const auto upstream = take_grad_output(kOp, o, grad_output, input, sizes_of_rows(input),
                                         [](const at::Tensor& given) { return given.contiguous(); });

  const GradientInLayout gradient(in_place ? input : ready.defined() ? ready : fresh_gradient(input), a.layout);
  a.take_gradient(gradient.written);
  take_ready_gradient(o, ReadyLoss::kCrossEntropy, input, ready.defined() && gradient.written.is_same(ready));
  run_backward(a);
  return gradient.take();
}

}  // namespace fusedloss
