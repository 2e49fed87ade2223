#include "ops/nll_loss_op.h"

#include <ATen/ops/empty_like_ops.h>

#include <utility>

#include "kernels/cpu/nll_loss_cpu.h"
#include "ops/class_indices.h"
#include "ops/cuda_tuning.h"
#include "ops/huge_pages.h"
#include "ops/loss_tensors.h"
#include "ops/row_layout.h"
#include "ops/run.h"
#ifdef FUSEDLOSS_WITH_CUDA
#include "kernels/cuda/nll_loss_cuda.h"
#endif

namespace fusedloss {
namespace {

constexpr const char* kOp = "nll_loss";

// The kernels' arguments for one pass: the options, and the tensors that own the memory the options point to.
struct Arguments {
  NLLLossOptions o = {};
  at::Tensor target, weight;

  // like: input, or its gradient.
  Arguments(const at::Tensor& like, const NLLLossCall& call) {
    o.tuning = cuda_tuning();
    o.dtype = check_dtype(kOp, "input", like);
    check_has_classes(kOp, like);
    o.reduction = check_reduction(kOp, call.reduction);
    o.ignore_index = call.ignore_index;
    check_same_device(kOp, "target", call.target, like);
    check_class_indices(kOp, like, call.target);
    check_memory(kOp, "target", call.target);

    const RowSizes sizes = row_sizes(like);
    o.outer = sizes.outer;
    o.classes = sizes.classes;
    o.inner = sizes.inner;
    target = kernel_class_indices(call.target);
    o.target_index = target.const_data_ptr<int64_t>();
    if (call.weight.has_value()) {
      weight = kernel_weight(kOp, *call.weight, o.classes, like);
      o.weight = weight.const_data_ptr();
    }
  }
};

void forward_on_cpu(Arguments& a) {
  NLLLossOptions& o = a.o;
  const cpu::NLLLossKernels& kernels = cpu::nll_loss_kernels(o);
  const HostScratch scratch(cpu::nll_loss_scratch_bytes(o));
  o.scratch = scratch.data();
  run_on_cpu(cpu::nll_loss_forward_work(o), kernels.forward, o);
  const int64_t bad = kernels.finish(o);
  if (bad >= 0) refuse_class_index(kOp, o, a.target, bad, o.target_index[bad]);
}

#ifdef FUSEDLOSS_WITH_CUDA
void forward_on_cuda(Arguments& a) {
  NLLLossOptions& o = a.o;
  const auto scratch = a.target.new_empty({cuda::nll_loss_scratch_bytes(o)}, at::kByte);
  o.scratch = scratch.data_ptr();
  run_on_cuda(kOp, a.target, cuda::nll_loss_forward, o);
}
#endif

void run_forward(Arguments& a) {
#ifdef FUSEDLOSS_WITH_CUDA
  if (on_cuda(a.target)) return forward_on_cuda(a);
#endif
  forward_on_cpu(a);
}

void run_backward(const Arguments& a) {
  const NLLLossOptions& o = a.o;
#ifdef FUSEDLOSS_WITH_CUDA
  if (on_cuda(a.target)) return run_on_cuda(kOp, a.target, cuda::nll_loss_backward, o);
#endif
  run_on_cpu(cpu::nll_loss_backward_work(o), cpu::nll_loss_kernels(o).backward, o);
}

// Points the options to the mean's denominator, which is of the accumulate type.
void take_total_weight(NLLLossOptions& o, const at::Tensor& total_weight) {
  if (o.reduction == Reduction::kMean) o.total_weight = total_weight.data_ptr();
}

void check_total_weight(const NLLLossOptions& o, const at::Tensor& total_weight, const at::Tensor& grad) {
  if (o.reduction != Reduction::kMean) return;
  check_same_device(kOp, "total_weight", total_weight, grad);
  const at::ScalarType expected = accumulate_type(grad.scalar_type());
  TORCH_CHECK(total_weight.numel() == 1 && total_weight.scalar_type() == expected, kOp,
              ": total_weight must come from the forward pass, expected one element of type ", expected, ", got shape ",
              total_weight.sizes(), " and type ", total_weight.scalar_type());
  check_memory(kOp, "total_weight", total_weight);
}

}  // namespace

bool nll_loss_covers(const at::Tensor& input, const NLLLossCall& call) {
  if (input.dim() == 0 || row_sizes(input).classes == 0) return false;
  if (call.weight.has_value() && call.weight->requires_grad()) return false;         // torch raises
  return !(input.dim() == 1 && call.target.dim() == 1 && call.target.numel() == 1);  // torch treats it as shape ()
}

Dimensions gradient_strides(const at::Tensor& input) {
  if (input.is_non_overlapping_and_dense()) return {input.strides().begin(), input.strides().end()};
  const at::Tensor dense = at::_ops::empty_like::call(input, {}, {}, {}, {}, {});  // none of its pages is touched
  return {dense.strides().begin(), dense.strides().end()};
}

NLLLossResult nll_loss_forward(const at::Tensor& input, const NLLLossCall& call, bool autocast) {
  Arguments a(input, call);
  NLLLossOptions& o = a.o;
  check_memory(kOp, "input", input);
  if (call.weight.has_value()) check_weight_dtype(kOp, input, *call.weight, autocast);
  if (debug_enabled) check_class_indices_on_host(kOp, o, a.target);

  const auto strides = row_strides(input);
  const at::Tensor read = strides.has_value() ? input : input.contiguous();
  o.input = read.const_data_ptr();
  o.input_strides = strides.has_value() ? *strides : *row_strides(read);
  const auto total_weight =
      input.new_empty({int64_t(o.reduction == Reduction::kMean)}, accumulate_type(input.scalar_type()));
  take_total_weight(o, total_weight);
  const auto loss = allocate_loss(o, input, autocast,
                                  [&](at::ScalarType type) { return input.new_empty(sizes_of_rows(input), type); });
  run_forward(a);
  return {loss, total_weight};
}

at::Tensor nll_loss_backward(const at::Tensor& grad_output, const NLLLossCall& call, const at::Tensor& total_weight,
                             const GradientGeometry& geometry) {
  const at::Tensor grad = call.target.new_empty_strided(geometry.sizes, geometry.strides, geometry.dtype);
  prefer_huge_pages(grad);
  Arguments a(grad, call);
  NLLLossOptions& o = a.o;
  check_total_weight(o, total_weight, grad);
  take_total_weight(o, total_weight);
  const auto upstream = take_grad_output(kOp, o, grad_output, grad, sizes_of_rows(grad),
                                         [](const at::Tensor& given) { return given.contiguous(); });

  const Layout layout = layout_of(grad, row_sizes(grad)).value_or(Layout::kRows);
  const GradientInLayout gradient(grad, layout);
  o.grad_input = gradient.written.data_ptr();
  o.grad_strides = kernel_strides(gradient.written, layout);
  if (layout == Layout::kSwapped) std::swap(o.outer, o.inner);
  run_backward(a);
  return gradient.take();
}

}  // namespace fusedloss
