// Cross entropy between torch and the kernels: checks the arguments, allocates, fills the options, picks the device.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like_ops.h>

#include <utility>

#include "ops/checks.h"
#include "ops/class_indices.h"
#include "kernels/cpu/cross_entropy_cpu.h"
#include "ops/cuda_tuning.h"
#include "ops/huge_pages.h"
#include "ops/ops.h"
#include "ops/plain.h"
#include "ops/row_layout.h"
#include "ops/run.h"
#ifdef FUSEDLOSS_WITH_CUDA
#include <ATen/ops/sum.h>

#include "kernels/cuda/cross_entropy_cuda.h"
#endif

namespace fusedloss {
namespace {

constexpr const char* kOp = "cross_entropy";

bool has_probabilities(const at::Tensor& input, const at::Tensor& target) {
  return input.sizes() == target.sizes();
}

void check_probabilities(const at::Tensor& input, const at::Tensor& target, int64_t ignore_index) {
  TORCH_CHECK(at::isFloatingType(target.scalar_type()), kOp, ": target has the shape of input, ", input.sizes(),
              ", so it must hold class probabilities of a floating point type, got ", target.scalar_type(),
              "; class indices have the shape of input without its class dimension");
  TORCH_CHECK(ignore_index < 0, kOp, ": ignore_index must be negative where target holds class probabilities, got ",
              ignore_index);
}

// The options of one call, and the tensors whose memory they point to.
struct Call {
  CrossEntropyOptions o = {};
  Layout layout = Layout::kRows;
  at::Tensor input, target, weight, statistics;

  Call(const at::Tensor& input_, const at::Tensor& target_, const OptionalTensor& weight_, int64_t reduction,
       int64_t ignore_index, double label_smoothing) {
    o.tuning = cuda_tuning();
    o.dtype = check_dtype(kOp, "input", input_);
    check_memory(kOp, "input", input_);
    o.reduction = check_reduction(kOp, reduction);
    o.ignore_index = ignore_index;
    check_same_device(kOp, "target", target_, input_);
    check_memory(kOp, "target", target_);
    const bool probabilities = has_probabilities(input_, target_);
    if (probabilities) {
      check_probabilities(input_, target_, ignore_index);
    } else {
      check_class_indices(kOp, input_, target_);
    }
    TORCH_CHECK(!(label_smoothing > 1), kOp, ": label_smoothing must be between 0.0 and 1.0, got ", label_smoothing);
    o.label_smoothing = label_smoothing > 0 ? label_smoothing : 0;  // torch takes negative and NaN for none

    const RowSizes sizes = row_sizes(input_);
    const auto found = layout_of(input_, sizes);
    input = found.has_value() ? input_ : input_.contiguous();
    layout = found.has_value() ? *found : *layout_of(input, sizes);
    o.logits = input.const_data_ptr();
    o.logits_strides = kernel_strides(input, layout);
    o.outer = sizes.outer;
    o.classes = sizes.classes;
    o.inner = sizes.inner;
    if (layout == Layout::kSwapped) std::swap(o.outer, o.inner);

    if (probabilities) {
      target = in_layout(target_, sizes, layout);
      static const double kNothing = 0;  // not null, which would say that there are class indices
      o.target_probability = target.numel() > 0 ? target.const_data_ptr() : &kNothing;
      o.target_strides = kernel_strides(target, layout);
    } else {
      target = target_.to(at::kLong).contiguous();
      o.target_index = target.const_data_ptr<int64_t>();
    }
    if (weight_.has_value()) take_weight(*weight_);
  }

  void take_weight(const at::Tensor& given) {
    weight = kernel_weight(kOp, given, o.classes, input);
    o.weight = weight.const_data_ptr();
  }

  bool sums_weights() const { return weight.defined() && o.label_smoothing > 0 && o.target_index != nullptr; }

  // Two a row, and of the last two those that are needed, so that nothing is left unwritten.
  int64_t statistics_numel() const { return 2 * o.rows() + (o.reduction == Reduction::kMean) + sums_weights(); }

  void take_statistics(const at::Tensor& given) {
    statistics = given;
    char* const first = static_cast<char*>(statistics.data_ptr());
    const auto at = [&](int64_t i) { return first + i * statistics.element_size(); };
    o.row_max = at(0);
    o.row_scale = at(o.rows());
    o.total_weight = o.reduction == Reduction::kMean ? at(2 * o.rows()) : nullptr;
    o.weight_sum = sums_weights() ? at(statistics_numel() - 1) : nullptr;
  }
};

void forward_on_cpu(Call& call) {
  CrossEntropyOptions& o = call.o;
  const cpu::CrossEntropyWork work = cpu::cross_entropy_work(o);
  const HostScratch scratch(cpu::cross_entropy_scratch_bytes(o));
  o.scratch = scratch.data();
  if (o.weight_sum != nullptr) cpu::cross_entropy_weight_sum(o);
  if (o.total_weight != nullptr && o.grad_logits != nullptr) {
    run_on_cpu(work.chunks, work.grain,
               [&](int64_t begin, int64_t end) { cpu::cross_entropy_sum_target_weights(o, begin, end); });
    cpu::cross_entropy_total_weight(o);
  }
  run_on_cpu(work.chunks, work.grain, [&](int64_t begin, int64_t end) { cpu::cross_entropy_forward(o, begin, end); });
  const int64_t bad = cpu::cross_entropy_finish(o);
  if (bad >= 0) refuse_class_index(kOp, o, call.target, bad, o.target_index[bad]);
}

#ifdef FUSEDLOSS_WITH_CUDA
void forward_on_cuda(Call& call) {
  CrossEntropyOptions& o = call.o;
  if (o.weight_sum != nullptr) {
    auto weight_sum = call.statistics.slice(0, call.statistics_numel() - 1);
    at::sum_out(weight_sum, call.weight, at::IntArrayRef{0}, /*keepdim=*/true);
  }
  run_on_cuda(kOp, call.input, [&](cudaStream_t stream) {
    int64_t bytes = 0;
    const cudaError_t error = cuda::cross_entropy_scratch_bytes(o, bytes);
    if (error != cudaSuccess) return error;
    const auto scratch = call.input.new_empty({bytes}, at::kByte);
    o.scratch = scratch.data_ptr();
    return cuda::cross_entropy_forward(o, stream);
  });
}
#endif

void run_forward(Call& call) {
#ifdef FUSEDLOSS_WITH_CUDA
  if (on_cuda(call.input)) return forward_on_cuda(call);
#endif
  forward_on_cpu(call);
}

// Uninitialised, laid out like input, as the fake kernel in fusedloss/ops.py promises.
at::Tensor fresh_gradient(const at::Tensor& input) {
  // The operator itself: at::empty_like brings a header that doubles this file's time to compile.
  const at::Tensor grad = at::_ops::empty_like::call(input, {}, {}, {}, {}, {});
  prefer_huge_pages(grad);
  return grad;
}

// The gradient of a call, which its options then point to; written in the layout of the kernels.
struct Gradient {
  at::Tensor grad, written;

  Gradient(Call& call, const at::Tensor& grad_)
      : grad(grad_),
        written(layout_of(grad, row_sizes(grad)) == call.layout ? grad : empty_in_layout(grad, call.layout)) {
    if (!written.is_same(grad)) prefer_huge_pages(written);
    call.o.grad_logits = written.data_ptr();
    call.o.grad_strides = kernel_strides(written, call.layout);
  }

  at::Tensor take() const { return written.is_same(grad) ? grad : grad.copy_(written); }
};

void run_backward(const Call& call) {
  const CrossEntropyOptions& o = call.o;
#ifdef FUSEDLOSS_WITH_CUDA
  if (on_cuda(call.input)) {
    run_on_cuda(kOp, call.input, [&](cudaStream_t stream) { return cuda::cross_entropy_backward(o, stream); });
    return;
  }
#endif
  const cpu::CrossEntropyWork work = cpu::cross_entropy_work(o);
  run_on_cpu(work.chunks, work.grain, [&](int64_t begin, int64_t end) { cpu::cross_entropy_backward(o, begin, end); });
}

}  // namespace

void set_debug(bool enabled) { debug_enabled = enabled; }

bool cross_entropy_covers(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight) {
  if (!is_ours(input) || !is_plain(target) || (weight.has_value() && !is_plain(*weight))) return false;
  if (input.dim() == 0 || row_sizes(input).classes == 0) return false;
#ifdef FUSEDLOSS_WITH_CUDA
  if (on_cuda(input) && row_sizes(input).classes > cuda::kMaxClasses) return false;
#endif
  if (weight.has_value() && weight->requires_grad()) return false;  // torch differentiates, or refuses
  if (input.dim() == 1 && target.dim() == 1 && target.numel() == 1 && input.numel() != 1) return false;
  if (has_probabilities(input, target) && at::isFloatingType(target.scalar_type())) {
    // No kernel for the gradient of target, nor for mixed types, which torch promotes.
    if (target.requires_grad() || target.scalar_type() != input.scalar_type()) return false;
    if (weight.has_value() && weight->scalar_type() != input.scalar_type()) return false;
  }
  return true;
}

CrossEntropyResult cross_entropy_forward(const at::Tensor& input, const at::Tensor& target,
                                         const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                                         double label_smoothing, bool autocast, bool with_grad) {
  Call call(input, target, weight, reduction, ignore_index, label_smoothing);
  CrossEntropyOptions& o = call.o;
  if (weight.has_value()) check_weight_dtype(kOp, input, *weight, autocast);
  if (debug_enabled && o.target_index != nullptr) check_class_indices_on_host(kOp, o, call.target);
  const auto statistics =
      input.new_empty({call.statistics_numel()}, accumulate_type(input.scalar_type()));
  call.take_statistics(statistics);

  const auto type = loss_type(input, autocast);
  const auto loss =
      o.reduction == Reduction::kNone ? input.new_empty(sizes_of_rows(input), type) : input.new_empty({}, type);
  o.loss_dtype = *kernel_dtype(loss.scalar_type());
  o.loss = loss.data_ptr();

  std::optional<Gradient> gradient;
  if (with_grad) gradient.emplace(call, fresh_gradient(input));
  run_forward(call);
  return {loss, statistics, gradient ? gradient->take() : at::Tensor()};
}

at::Tensor cross_entropy_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& target,
                                  const OptionalTensor& weight, const at::Tensor& statistics, int64_t reduction,
                                  int64_t ignore_index, double label_smoothing, bool in_place,
                                  const at::Tensor& ready) {
  Call call(input, target, weight, reduction, ignore_index, label_smoothing);
  CrossEntropyOptions& o = call.o;
  check_same_device(kOp, "statistics", statistics, input);
  TORCH_CHECK(statistics.numel() == call.statistics_numel() && statistics.is_contiguous() &&
                  statistics.scalar_type() == accumulate_type(input.scalar_type()),
              kOp, ": statistics must be those of this input's forward pass");
  check_memory(kOp, "statistics", statistics);
  call.take_statistics(statistics);

  check_same_device(kOp, "grad_output", grad_output, input);
  const bool per_row = o.reduction == Reduction::kNone;
  TORCH_CHECK(grad_output.numel() == (per_row ? o.rows() : 1), kOp, ": grad_output must have the shape of the loss, ",
              per_row ? target.sizes() : c10::IntArrayRef(), ", got ", grad_output.sizes());
  o.loss_dtype = check_loss_dtype(kOp, "grad_output", grad_output, input);
  check_memory(kOp, "grad_output", grad_output);
  const bool one_value = !per_row || is_one_value(grad_output);
  const at::Tensor upstream = one_value ? grad_output : grad_output.contiguous();
  o.grad_output = upstream.const_data_ptr();
  o.grad_output_stride = one_value ? 0 : 1;

  const Gradient gradient(call, in_place ? input : ready.defined() ? ready : fresh_gradient(input));
#ifdef FUSEDLOSS_WITH_CUDA
  if (on_cuda(input) && !per_row) {
    o.grad_ready = ready.defined() && gradient.written.is_same(ready);
    o.grad_output_was_one = grad_output_was_one_on_cuda(HandOver::kCrossEntropy, input);
  }
#endif
  run_backward(call);
  return gradient.take();
}

}  // namespace fusedloss
