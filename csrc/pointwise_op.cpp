// Pointwise losses between torch and the kernels: checks the arguments, allocates, fills the options, picks the
// device.

#include <ATen/core/Tensor.h>

#include "checks.h"
#include "cpu/pointwise_cpu.h"
#include "huge_pages.h"
#include "ops.h"
#include "plain.h"
#include "run.h"
#ifdef FUSEDLOSS_WITH_CUDA
#include "cuda/pointwise_cuda.h"
#endif

namespace fusedloss {
namespace {

// Uninitialised, elements at the same places in memory.
at::Tensor empty_beside(const at::Tensor& t, at::ScalarType type) {
  const auto fresh = t.new_empty_strided(t.sizes(), t.strides(), type);
  prefer_huge_pages(fresh);
  return fresh;
}

// The options of one call, and the tensors whose memory they point to. Elements are paired by their place in memory,
// so input and target must be dense and in the same order; gradients and losses are laid out as they are.
struct Call {
  PointwiseOptions o = {};
  at::Tensor input, target;

  Call(const char* op, const at::Tensor& input_, const at::Tensor& target_, int64_t reduction) {
    o.dtype = check_dtype(op, "input", input_);
    o.reduction = check_reduction(op, reduction);
    check_same_device(op, "target", target_, input_);
    TORCH_CHECK(input_.sizes() == target_.sizes(), op, ": target must have the shape of input, ", input_.sizes(),
                ", got ", target_.sizes());
    TORCH_CHECK(input_.scalar_type() == target_.scalar_type(), op, ": target must have the dtype of input, ",
                input_.scalar_type(), ", got ", target_.scalar_type());
    input = input_.is_non_overlapping_and_dense() ? input_ : input_.clone();
    target = target_.strides() == input.strides() ? target_ : empty_beside(input, input.scalar_type()).copy_(target_);
    o.numel = input.numel();
    o.input = input.const_data_ptr();
    o.target = target.const_data_ptr();
  }
};

// The gradients of a call that are wanted, which its options then point to.
struct Gradients {
  at::Tensor of_input, of_target;
  bool are_ready;  // the forward pass has left all of them

  Gradients(Call& call, bool want_input, bool want_target, const at::Tensor& ready_input = {},
            const at::Tensor& ready_target = {})
      : of_input(ready_input),
        of_target(ready_target),
        are_ready((!want_input || ready_input.defined()) && (!want_target || ready_target.defined())) {
    if (want_input && !of_input.defined()) of_input = empty_beside(call.input, call.input.scalar_type());
    if (want_target && !of_target.defined()) of_target = empty_beside(call.input, call.input.scalar_type());
    call.o.grad_input = want_input ? of_input.data_ptr() : nullptr;
    call.o.grad_target = want_target ? of_target.data_ptr() : nullptr;
  }
};

void run_forward(const char* op, Call& call) {
  PointwiseOptions& o = call.o;
#ifdef FUSEDLOSS_WITH_CUDA
  if (on_cuda(call.input)) {
    const auto scratch = call.input.new_empty({cuda::pointwise_scratch_bytes(o)}, at::kByte);
    o.scratch = scratch.data_ptr();
    run_on_cuda(op, call.input, [&](cudaStream_t stream) { return cuda::pointwise_forward(o, stream); });
    return;
  }
#endif
  const HostScratch scratch(cpu::pointwise_scratch_bytes(o));
  o.scratch = scratch.data();
  run_on_cpu(cpu::pointwise_chunks(o), cpu::kPointwiseGrain,
             [&](int64_t begin, int64_t end) { cpu::pointwise_forward(o, begin, end); });
  cpu::pointwise_finish(o);
}

}  // namespace

bool mse_loss_covers(const at::Tensor& input, const at::Tensor& target) {
  // torch promotes mixed types.
  return is_ours(input) && is_plain(target) && input.scalar_type() == target.scalar_type();
}

MSELossResult mse_loss_forward(const at::Tensor& input, const at::Tensor& target, int64_t reduction, bool autocast,
                               bool grad_input, bool grad_target) {
  constexpr const char* kOp = "mse_loss";
  Call call(kOp, input, target, reduction);
  PointwiseOptions& o = call.o;
  const auto type = loss_type(input, autocast);
  const auto loss = o.reduction == Reduction::kNone ? empty_beside(call.input, type) : input.new_empty({}, type);
  o.loss = loss.data_ptr();
  o.loss_dtype = *kernel_dtype(loss.scalar_type());
  const Gradients gradients(call, grad_input, grad_target);
  run_forward(kOp, call);
  return {loss, gradients.of_input, gradients.of_target};
}

std::tuple<at::Tensor, at::Tensor> mse_loss_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                                     const at::Tensor& target, int64_t reduction, bool want_input,
                                                     bool want_target, const at::Tensor& ready_input,
                                                     const at::Tensor& ready_target) {
  constexpr const char* kOp = "mse_loss";
  Call call(kOp, input, target, reduction);
  PointwiseOptions& o = call.o;
  check_same_device(kOp, "grad_output", grad_output, input);
  const bool per_element = o.reduction == Reduction::kNone;
  TORCH_CHECK(per_element ? grad_output.sizes() == input.sizes() : grad_output.numel() == 1, kOp,
              ": grad_output must have the shape of the loss, got ", grad_output.sizes());
  o.loss_dtype = check_loss_dtype(kOp, "grad_output", grad_output, input);
  const bool one_value = !per_element || is_one_value(grad_output);
  at::Tensor upstream = grad_output;
  if (!one_value && grad_output.strides() != call.input.strides())
    upstream = empty_beside(call.input, grad_output.scalar_type()).copy_(grad_output);
  o.grad_output = upstream.const_data_ptr();
  o.grad_output_stride = one_value ? 0 : 1;

  const Gradients gradients(call, want_input, want_target, ready_input, ready_target);
#ifdef FUSEDLOSS_WITH_CUDA
  if (on_cuda(input)) {
    if (!per_element) {
      o.grad_ready = gradients.are_ready;
      o.grad_output_was_one = grad_output_was_one_on_cuda(input);
    }
    run_on_cuda(kOp, input, [&](cudaStream_t stream) { return cuda::pointwise_backward(o, stream); });
    return {gradients.of_input, gradients.of_target};
  }
#endif
  run_on_cpu(cpu::pointwise_chunks(o), cpu::kPointwiseGrain,
             [&](int64_t begin, int64_t end) { cpu::pointwise_backward(o, begin, end); });
  return {gradients.of_input, gradients.of_target};
}

}  // namespace fusedloss
