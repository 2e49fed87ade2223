// The functions of the op layer: what bindings.cpp exposes, and below them what autograd.cpp calls.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace fusedloss {

using OptionalTensor = std::optional<at::Tensor>;

// The losses, with autograd; nothing where the kernels do not cover the call, which then is torch's own function's.
// `reduction` is torch's number for it. input and target of mse_loss have one shape; broadcasting is the caller's.
// inplace_backward: the gradient is written over input.
OptionalTensor cross_entropy(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                             int64_t reduction, int64_t ignore_index, double label_smoothing, bool inplace_backward);
OptionalTensor mse_loss(const at::Tensor& input, const at::Tensor& target, int64_t reduction);

// Whether a class index out of range is found on the host, before a kernel is launched. On the CPU it is found anyway.
void set_debug(bool enabled);

// Do the kernels compute this call and its gradients? Arguments that torch would refuse are covered: the forward pass
// refuses them with a message of its own.
bool cross_entropy_covers(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight);
bool mse_loss_covers(const at::Tensor& input, const at::Tensor& target);

struct CrossEntropyResult {
  at::Tensor loss;        // under autocast float32, whatever the input
  at::Tensor statistics;  // 1-D, for the backward pass: row_max, row_scale, and where they are needed the mean's
                          // denominator and the sum of weight
  at::Tensor grad;        // d loss/d input, if asked for
};

// With its gradient at once the logits are read from memory once instead of twice. For a mean or a sum.
CrossEntropyResult cross_entropy_forward(const at::Tensor& input, const at::Tensor& target,
                                         const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                                         double label_smoothing, bool autocast, bool with_grad = false);

// -> d loss/d input, times grad_output; in_place: written over input, of which it is then an alias. ready: what the
// forward pass has left, the gradient for a grad_output of 1; on CUDA it is looked at there, and ready becomes the result,
// as it is or written anew.
at::Tensor cross_entropy_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& target,
                                  const OptionalTensor& weight, const at::Tensor& statistics, int64_t reduction,
                                  int64_t ignore_index, double label_smoothing, bool in_place = false,
                                  const at::Tensor& ready = {});

struct MSELossResult {
  at::Tensor loss;  // under autocast float32, whatever the input
  at::Tensor grad_input, grad_target;  // if asked for
};

// Gradients at once as above.
MSELossResult mse_loss_forward(const at::Tensor& input, const at::Tensor& target, int64_t reduction, bool autocast,
                               bool grad_input = false, bool grad_target = false);

// -> the gradients of input and target, times grad_output; undefined where not wanted. ready_…: as above, where wanted.
std::tuple<at::Tensor, at::Tensor> mse_loss_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                                     const at::Tensor& target, int64_t reduction, bool want_input,
                                                     bool want_target, const at::Tensor& ready_input = {},
                                                     const at::Tensor& ready_target = {});

}  // namespace fusedloss
