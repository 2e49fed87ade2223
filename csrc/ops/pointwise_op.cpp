#include "ops/pointwise_op.h"

#include <algorithm>
#include <utility>

#include "kernels/cpu/pointwise_cpu.h"
#include "ops/cuda_tuning.h"
#include "ops/huge_pages.h"
#include "ops/last_grad_output.h"
#include "ops/loss_tensors.h"
#include "ops/plain.h"
#include "ops/run.h"
#ifdef FUSEDLOSS_WITH_CUDA
#include "kernels/cuda/pointwise_cuda.h"
#endif

namespace fusedloss {
namespace {

// Returns an uninitialised tensor with the sizes and strides of t.
at::Tensor empty_beside(const at::Tensor& t, at::ScalarType type) {
  const auto fresh = t.new_empty_strided(t.sizes(), t.strides(), type);
  prefer_huge_pages(fresh);
  return fresh;
}

bool is_compiled_for(const at::Tensor& input, const PointwiseLoss& loss) {
#ifdef FUSEDLOSS_WITH_CUDA
  if (on_cuda(input)) return loss.on_cuda != nullptr;
#endif
  return loss.on_cpu != nullptr;
}

// The kernels' arguments for one call: the options, and the tensors that own the memory the options point to. The
// kernels pair elements by their place in memory. So input, the first operand, must be dense, and each other operand
// must have the same strides or repeat (period_of). Gradients and losses have the layout of input. `operands` holds the
// tensors; o.operands is their number, and o.operand their addresses.
struct Arguments {
  const char* op;
  const PointwiseLoss& loss;
  PointwiseOptions o = {};
  std::vector<at::Tensor> operands;

  explicit Arguments(const PointwiseCall& call)
      : op(call.loss.name.c_str()), loss(call.loss), operands(call.operands.vec()) {
    TORCH_CHECK_VALUE(operands.size() == loss.operands.size(), op, ": got ", operands.size(), " tensors, expected ",
                      loss.operands.size());
    TORCH_CHECK_VALUE(call.parameters.size() <= size_t(kMaxParameters), op, ": got ", call.parameters.size(),
                      " parameters, expected at most ", kMaxParameters);
    at::Tensor& input = operands[0];
    o.tuning = cuda_tuning();
    o.dtype = check_dtype(op, "input", input);
    check_memory(op, "input", input);
    o.reduction = check_reduction(op, call.reduction);
    TORCH_CHECK_NOT_IMPLEMENTED(is_compiled_for(input, loss), op,
                                ": this loss is not compiled for the device of input, ", input.device());
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

  // Returns the period of an operand that repeats: 1 if one value serves all elements, or the length of a row if one
  // row (class weights, for example) serves all rows of a contiguous input. Returns 0 for any other operand, and on
  // CUDA also for a row if the loss has fewer than kFewestOfRepeated operands, because its kernels do not support that.
  int64_t period_of(const at::Tensor& operand) const {
    if (is_one_value(operand)) return 1;
    if ((on_cuda(input()) && operands.size() < kFewestOfRepeated) || !input().is_contiguous()) return 0;
    int64_t period = 1, dim = operand.dim() - 1;
    for (; dim >= 0 && (operand.stride(dim) == period || operand.size(dim) == 1); --dim) period *= operand.size(dim);
    for (; dim >= 0; --dim)
      if (operand.stride(dim) != 0 && operand.size(dim) != 1) return 0;
    return period > 1 && period < operand.numel() ? period : 0;
  }

  // Points the options to operand k and sets its period. An operand with other strides than input is copied first.
  void place(int k) {
    at::Tensor& operand = operands[size_t(k)];
    o.operand_period[k] = k == 0 ? 0 : period_of(operand);
    if (o.operand_period[k] == 0 && operand.strides() != input().strides())
      operand = empty_beside(input(), operand.scalar_type()).copy_(operand);
    o.operand[k] = operand.const_data_ptr();
  }
};

// The gradients of the operands in the bit mask `wanted` (bit k: operand k). Allocates those that are not in `ready`,
// and points the options to all of them. ready: in the backward pass, the gradients that the forward pass computed.
struct Gradients {
  std::vector<at::Tensor> tensors;
  bool are_ready = true;  // no wanted gradient was missing in `ready`; used in the backward pass only

  Gradients(Arguments& a, unsigned wanted, std::vector<at::Tensor> ready = {}) : tensors(std::move(ready)) {
    tensors.resize(a.operands.size());
    for (size_t k = 0; k < tensors.size(); ++k) {
      if ((wanted >> k & 1) == 0) continue;
      at::Tensor& grad = tensors[k];
      are_ready = are_ready && grad.defined();
      if (!grad.defined()) grad = empty_beside(a.input(), a.input().scalar_type());
      a.o.grad[k] = grad.data_ptr();
    }
  }
};

// The same function of the kernels, `evaluate`, computes both passes. In the backward pass o.loss is null.
void forward_on_cpu(Arguments& a) {
  PointwiseOptions& o = a.o;
  const cpu::PointwiseKernels& kernels = cpu::pointwise_kernels(o);
  const HostScratch scratch(cpu::pointwise_scratch_bytes(o));
  o.scratch = scratch.data();
  run_on_cpu(cpu::pointwise_work(o), kernels.evaluate, *a.loss.on_cpu, o);
  kernels.finish(o);
}

#ifdef FUSEDLOSS_WITH_CUDA
void forward_on_cuda(Arguments& a) {
  PointwiseOptions& o = a.o;
  const auto scratch = a.input().new_empty({cuda::pointwise_scratch_bytes(o)}, at::kByte);
  o.scratch = scratch.data_ptr();
  run_on_cuda(a.op, a.input(), a.loss.on_cuda->forward, o);
}
#endif

void run_forward(Arguments& a) {
#ifdef FUSEDLOSS_WITH_CUDA
  if (on_cuda(a.input())) return forward_on_cuda(a);
#endif
  forward_on_cpu(a);
}

void run_backward(const Arguments& a) {
#ifdef FUSEDLOSS_WITH_CUDA
  if (on_cuda(a.input())) return run_on_cuda(a.op, a.input(), a.loss.on_cuda->backward, a.o);
#endif
  run_on_cpu(cpu::pointwise_work(a.o), cpu::pointwise_kernels(a.o).evaluate, *a.loss.on_cpu, a.o);
}

}  // namespace

bool pointwise_covers(const PointwiseCall& call) {
  const at::Tensor& input = call.operands[0];
  // Other dtypes, such as integers, and mixed dtypes, which torch promotes, are left to torch's own functions.
  if (!is_ours(input) || !kernel_dtype(input.scalar_type())) return false;
  for (const at::Tensor& operand : call.operands)
    if (!is_plain(operand) || operand.scalar_type() != input.scalar_type() || operand.sizes() != input.sizes())
      return false;
  return is_compiled_for(input, call.loss);
}

PointwiseResult pointwise_forward(const PointwiseCall& call, bool autocast, unsigned with_grads) {
  Arguments a(call);
  const at::Tensor& input = a.input();
  const auto loss = allocate_loss(a.o, input, autocast, [&](at::ScalarType type) { return empty_beside(input, type); });
  Gradients gradients(a, with_grads);
  run_forward(a);
  return {loss, std::move(gradients.tensors)};
}

std::vector<at::Tensor> pointwise_backward(const at::Tensor& grad_output, const PointwiseCall& call, unsigned wanted,
                                           std::vector<at::Tensor> ready) {
  Arguments a(call);
  PointwiseOptions& o = a.o;
  const at::Tensor& input = a.input();
  const auto upstream = take_grad_output(a.op, o, grad_output, input, input.sizes(), [&](const at::Tensor& given) {
    return given.strides() == input.strides() ? given : empty_beside(input, given.scalar_type()).copy_(given);
  });

  Gradients gradients(a, wanted, std::move(ready));
  // On CUDA the kernel uses the ready gradients if grad_output is 1. On the CPU the caller has done so.
  take_ready_gradient(o, ReadyLoss::kPointwise, input, gradients.are_ready);
  run_backward(a);
  return std::move(gradients.tensors);
}

}  // namespace fusedloss
