// Pointwise losses between torch and the kernels: checks the arguments, allocates, fills the options, picks the
// device.

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "ops/checks.h"
#include "kernels/cpu/pointwise_cpu.h"
#include "ops/cuda_tuning.h"
#include "ops/huge_pages.h"
#include "ops/ops.h"
#include "ops/plain.h"
#include "ops/run.h"
#ifdef FUSEDLOSS_WITH_CUDA
#include "kernels/cuda/pointwise_cuda.h"
#endif

namespace fusedloss {
namespace {

// Uninitialised, elements at the same places in memory.
at::Tensor empty_beside(const at::Tensor& t, at::ScalarType type) {
  const auto fresh = t.new_empty_strided(t.sizes(), t.strides(), type);
  prefer_huge_pages(fresh);
  return fresh;
}

// The options of one call, and the tensors whose memory they point to. Elements are paired by their place in memory, so
// input, the first operand, must be dense and the others in the same order, or one value each; gradients and losses are
// laid out as input is.
struct Call {
  const char* op;
  const PointwiseLoss& loss;
  PointwiseOptions o = {};
  std::vector<at::Tensor> operands;

  Call(const PointwiseCall& call) : op(call.loss.name.c_str()), loss(call.loss), operands(call.operands.vec()) {
    TORCH_CHECK_VALUE(operands.size() == loss.operands.size(), op, ": got ", operands.size(), " tensors, expected ",
                      loss.operands.size());
    TORCH_CHECK_VALUE(call.parameters.size() <= size_t(kMaxParameters), op, ": got ", call.parameters.size(),
                      " parameters, expected at most ", kMaxParameters);
    at::Tensor& input = operands[0];
    o.tuning = cuda_tuning();
    o.dtype = check_dtype(op, "input", input);
    check_memory(op, "input", input);
    o.reduction = check_reduction(op, call.reduction);
    for (size_t k = 1; k < operands.size(); ++k) check_operand(int(k));
    if (!input.is_non_overlapping_and_dense()) input = input.clone();
    o.operands = int(operands.size());
    for (int k = 0; k < o.operands; ++k) place(k);
    o.numel = input.numel();
    o.divisor = call.divisor ? double(*call.divisor) : double(o.numel);
    std::copy(call.parameters.begin(), call.parameters.end(), o.parameter);
  }

  const at::Tensor& input() const { return operands[0]; }

 private:
  void check_operand(int k) const {
    const at::Tensor &operand = operands[size_t(k)], &input = operands[0];
    const char* name = loss.operands[size_t(k)].c_str();
    check_same_device(op, name, operand, input);
    TORCH_CHECK(operand.sizes() == input.sizes(), op, ": ", name, " must have the shape of input, ", input.sizes(),
                ", got ", operand.sizes());
    TORCH_CHECK(operand.scalar_type() == input.scalar_type(), op, ": ", name, " must have the dtype of input, ",
                input.scalar_type(), ", got ", operand.scalar_type());
    check_memory(op, name, operand);
  }

  // Where it is one value for all elements, or one row (weights of classes, say) for all rows of a contiguous input: how
  // many. Else 0.
  int64_t period_of(const at::Tensor& operand) const {
    if (is_one_value(operand)) return 1;
    if ((on_cuda(input()) && operands.size() < kFewestOfRepeated) || !input().is_contiguous()) return 0;
    int64_t period = 1, dim = operand.dim() - 1;
    for (; dim >= 0 && (operand.stride(dim) == period || operand.size(dim) == 1); --dim) period *= operand.size(dim);
    for (; dim >= 0; --dim)
      if (operand.stride(dim) != 0 && operand.size(dim) != 1) return 0;
    return period > 1 && period < operand.numel() ? period : 0;
  }

  void place(int k) {
    at::Tensor& operand = operands[size_t(k)];
    o.operand_period[k] = k == 0 ? 0 : period_of(operand);
    if (o.operand_period[k] == 0 && operand.strides() != input().strides())
      operand = empty_beside(input(), operand.scalar_type()).copy_(operand);
    o.operand[k] = operand.const_data_ptr();
  }
};

// The gradients of a call that are wanted, which its options then point to; `ready`: those that the forward pass has left.
struct Gradients {
  std::vector<at::Tensor> of;
  bool are_ready = true;  // all of them

  Gradients(Call& call, unsigned wanted, std::vector<at::Tensor> ready = {}) : of(std::move(ready)) {
    of.resize(call.operands.size());
    for (size_t k = 0; k < of.size(); ++k) {
      if ((wanted >> k & 1) == 0) continue;
      are_ready = are_ready && of[k].defined();
      if (!of[k].defined()) of[k] = empty_beside(call.input(), call.input().scalar_type());
      call.o.grad[k] = of[k].data_ptr();
    }
  }
};

void run_forward(Call& call) {
  PointwiseOptions& o = call.o;
#ifdef FUSEDLOSS_WITH_CUDA
  if (on_cuda(call.input())) {
    const auto scratch = call.input().new_empty({cuda::pointwise_scratch_bytes(o)}, at::kByte);
    o.scratch = scratch.data_ptr();
    run_on_cuda(call.op, call.input(), [&](cudaStream_t stream) { return call.loss.on_cuda->forward(o, stream); });
    return;
  }
#endif
  const HostScratch scratch(cpu::pointwise_scratch_bytes(o));
  o.scratch = scratch.data();
  run_on_cpu(cpu::pointwise_chunks(o), cpu::kPointwiseGrain,
             [&](int64_t begin, int64_t end) { cpu::pointwise(*call.loss.on_cpu, o, begin, end); });
  cpu::pointwise_finish(o);
}

}  // namespace

bool pointwise_covers(const PointwiseLoss& loss, at::TensorList operands) {
  const at::Tensor& input = operands[0];
  if (!is_ours(input) || !kernel_dtype(input.scalar_type())) return false;  // torch's functions take integers, and more
  for (const at::Tensor& operand : operands)                                // and promote mixed types
    if (!is_plain(operand) || operand.scalar_type() != input.scalar_type() || operand.sizes() != input.sizes())
      return false;
#ifdef FUSEDLOSS_WITH_CUDA
  if (on_cuda(input)) return loss.on_cuda != nullptr;
#endif
  return loss.on_cpu != nullptr;
}

PointwiseResult pointwise_forward(const PointwiseCall& given, bool autocast, unsigned with_grads) {
  Call call(given);
  PointwiseOptions& o = call.o;
  const auto type = loss_type(call.input(), autocast);
  const auto loss =
      o.reduction == Reduction::kNone ? empty_beside(call.input(), type) : call.input().new_empty({}, type);
  o.loss = loss.data_ptr();
  o.loss_dtype = *kernel_dtype(loss.scalar_type());
  Gradients gradients(call, with_grads);
  run_forward(call);
  return {loss, std::move(gradients.of)};
}

std::vector<at::Tensor> pointwise_backward(const at::Tensor& grad_output, const PointwiseCall& given,
                                           unsigned wanted, std::vector<at::Tensor> ready) {
  Call call(given);
  PointwiseOptions& o = call.o;
  const at::Tensor& input = call.input();
  check_same_device(call.op, "grad_output", grad_output, input);
  const bool per_element = o.reduction == Reduction::kNone;
  TORCH_CHECK(per_element ? grad_output.sizes() == input.sizes() : grad_output.numel() == 1, call.op,
              ": grad_output must have the shape of the loss, got ", grad_output.sizes());
  o.loss_dtype = check_loss_dtype(call.op, "grad_output", grad_output, input);
  check_memory(call.op, "grad_output", grad_output);
  const bool one_value = !per_element || is_one_value(grad_output);
  at::Tensor upstream = grad_output;
  if (!one_value && grad_output.strides() != input.strides())
    upstream = empty_beside(input, grad_output.scalar_type()).copy_(grad_output);
  o.grad_output = upstream.const_data_ptr();
  o.grad_output_stride = one_value ? 0 : 1;

  Gradients gradients(call, wanted, std::move(ready));
#ifdef FUSEDLOSS_WITH_CUDA
  if (on_cuda(input)) {
    if (!per_element) {
      o.grad_ready = gradients.are_ready;
      o.grad_output_was_one = grad_output_was_one_on_cuda(HandOver::kPointwise, input);
    }
    run_on_cuda(call.op, input, [&](cudaStream_t stream) { return call.loss.on_cuda->backward(o, stream); });
    return std::move(gradients.of);
  }
#endif
  run_on_cpu(cpu::pointwise_chunks(o), cpu::kPointwiseGrain,
             [&](int64_t begin, int64_t end) { cpu::pointwise(*call.loss.on_cpu, o, begin, end); });
  return std::move(gradients.of);
}

}  // namespace fusedloss
