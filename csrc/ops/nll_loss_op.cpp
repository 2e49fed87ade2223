// The negative log likelihood between torch and the kernels: checks the arguments, allocates, fills the options, picks
// the device.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like_ops.h>

#include <utility>

#include "ops/checks.h"
#include "ops/class_indices.h"
#include "kernels/cpu/nll_loss_cpu.h"
#include "ops/cuda_tuning.h"
#include "ops/huge_pages.h"
#include "ops/ops.h"
#include "ops/plain.h"
#include "ops/row_layout.h"
#include "ops/run.h"
#ifdef FUSEDLOSS_WITH_CUDA
#include "kernels/cuda/nll_loss_cuda.h"
#endif

namespace fusedloss {
namespace {

constexpr const char* kOp = "nll_loss";

// The options of one pass, and the tensors whose memory they point to.
struct Call {
  NLLLossOptions o = {};
  at::Tensor target, weight;

  // like: input or its gradient.
  Call(const at::Tensor& like, const at::Tensor& target_, const OptionalTensor& weight_, int64_t reduction,
       int64_t ignore_index) {
    const RowSizes sizes = row_sizes(like);
    o.tuning = cuda_tuning();
    o.dtype = check_dtype(kOp, "input", like);
    o.reduction = check_reduction(kOp, reduction);
    o.outer = sizes.outer;
    o.classes = sizes.classes;
    o.inner = sizes.inner;
    o.ignore_index = ignore_index;
    check_same_device(kOp, "target", target_, like);
    check_class_indices(kOp, like, target_);
    check_memory(kOp, "target", target_);
    target = (target_.scalar_type() == at::kLong ? target_ : target_.to(at::kLong)).contiguous();
    o.target = target.const_data_ptr<int64_t>();
    if (weight_.has_value()) {
      weight = kernel_weight(kOp, *weight_, o.classes, like);
      o.weight = weight.const_data_ptr();
    }
  }
};

void run_forward(Call& call) {
  NLLLossOptions& o = call.o;
#ifdef FUSEDLOSS_WITH_CUDA
  if (on_cuda(call.target)) {
    const auto scratch = call.target.new_empty({cuda::nll_loss_scratch_bytes(o)}, at::kByte);
    o.scratch = scratch.data_ptr();
    run_on_cuda(kOp, call.target, [&](cudaStream_t stream) { return cuda::nll_loss_forward(o, stream); });
    return;
  }
#endif
  const HostScratch scratch(cpu::nll_loss_scratch_bytes(o));
  o.scratch = scratch.data();
  const cpu::NLLLossWork work = cpu::nll_loss_forward_work(o);
  run_on_cpu(work.chunks, work.grain, [&](int64_t begin, int64_t end) { cpu::nll_loss_forward(o, begin, end); });
  const int64_t bad = cpu::nll_loss_finish(o);
  if (bad >= 0) refuse_class_index(kOp, o, call.target, bad, o.target[bad]);
}

void run_backward(const Call& call) {
  const NLLLossOptions& o = call.o;
#ifdef FUSEDLOSS_WITH_CUDA
  if (on_cuda(call.target)) {
    run_on_cuda(kOp, call.target, [&](cudaStream_t stream) { return cuda::nll_loss_backward(o, stream); });
    return;
  }
#endif
  const cpu::NLLLossWork work = cpu::nll_loss_backward_work(o);
  run_on_cpu(work.chunks, work.grain, [&](int64_t begin, int64_t end) { cpu::nll_loss_backward(o, begin, end); });
}

}  // namespace

bool nll_loss_covers(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight) {
  if (!is_ours(input) || !is_plain(target) || (weight.has_value() && !is_plain(*weight))) return false;
  if (input.dim() == 0 || row_sizes(input).classes == 0) return false;
  if (weight.has_value() && weight->requires_grad()) return false;          // torch refuses
  return !(input.dim() == 1 && target.dim() == 1 && target.numel() == 1);  // torch takes it for ()
}

c10::SmallVector<int64_t, 8> gradient_strides(const at::Tensor& input) {
  if (input.is_non_overlapping_and_dense()) return {input.strides().begin(), input.strides().end()};
  const at::Tensor dense = at::_ops::empty_like::call(input, {}, {}, {}, {}, {});  // of which no page is touched
  return {dense.strides().begin(), dense.strides().end()};
}

NLLLossResult nll_loss_forward(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                               int64_t reduction, int64_t ignore_index, bool autocast) {
  Call call(input, target, weight, reduction, ignore_index);
  check_memory(kOp, "input", input);
  NLLLossOptions& o = call.o;
  if (weight.has_value()) check_weight_dtype(kOp, input, *weight, autocast);
  if (debug_enabled) check_class_indices_on_host(kOp, o, call.target);

  const auto strides = row_strides(input);
  const at::Tensor read = strides.has_value() ? input : input.contiguous();
  o.input = read.const_data_ptr();
  o.input_strides = strides.has_value() ? *strides : *row_strides(read);

  const auto type = loss_type(input, autocast);
  const auto loss =
      o.reduction == Reduction::kNone ? input.new_empty(sizes_of_rows(input), type) : input.new_empty({}, type);
  o.loss_dtype = *kernel_dtype(type);
  o.loss = loss.data_ptr();
  const bool mean = o.reduction == Reduction::kMean;
  const auto total_weight = input.new_empty({int64_t(mean)}, accumulate_type(input.scalar_type()));
  if (mean) o.total_weight = total_weight.data_ptr();
  run_forward(call);
  return {loss, total_weight};
}

at::Tensor nll_loss_backward(const at::Tensor& grad_output, const at::Tensor& target, const OptionalTensor& weight,
                             const at::Tensor& total_weight, at::IntArrayRef sizes, at::IntArrayRef strides,
                             at::ScalarType dtype, int64_t reduction, int64_t ignore_index) {
  const at::Tensor grad = target.new_empty_strided(sizes, strides, dtype);
  prefer_huge_pages(grad);
  Call call(grad, target, weight, reduction, ignore_index);
  NLLLossOptions& o = call.o;
  if (o.reduction == Reduction::kMean) {
    check_same_device(kOp, "total_weight", total_weight, grad);
    TORCH_CHECK(total_weight.numel() == 1 && total_weight.scalar_type() == accumulate_type(dtype), kOp,
                ": total_weight must be that of the forward pass");
    check_memory(kOp, "total_weight", total_weight);
    o.total_weight = total_weight.data_ptr();
  }

  check_same_device(kOp, "grad_output", grad_output, grad);
  const bool per_row = o.reduction == Reduction::kNone;
  TORCH_CHECK(grad_output.numel() == (per_row ? o.rows() : 1), kOp, ": grad_output must have the shape of the loss, ",
              per_row ? target.sizes() : c10::IntArrayRef(), ", got ", grad_output.sizes());
  o.loss_dtype = check_loss_dtype(kOp, "grad_output", grad_output, grad);
  check_memory(kOp, "grad_output", grad_output);
  const bool one_value = !per_row || is_one_value(grad_output);
  const at::Tensor upstream = one_value ? grad_output : grad_output.contiguous();
  o.grad_output = upstream.const_data_ptr();
  o.grad_output_stride = one_value ? 0 : 1;

  const auto found = layout_of(grad, row_sizes(grad));
  const Layout layout = found.value_or(Layout::kRows);
  const at::Tensor written = found.has_value() ? grad : empty_in_layout(grad, layout);
  o.grad_input = written.data_ptr();
  o.grad_strides = kernel_strides(written, layout);
  if (layout == Layout::kSwapped) std::swap(o.outer, o.inner);
  run_backward(call);
  return found.has_value() ? grad : grad.copy_(written);
}

}  // namespace fusedloss
