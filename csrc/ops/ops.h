// The functions of the op layer: what bindings.cpp exposes, and below them what autograd.cpp calls.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <array>
#include <optional>
#include <typeinfo>
#include <utility>
#include <vector>

#include "ops/pointwise_registry.h"

namespace fusedloss {

using OptionalTensor = std::optional<at::Tensor>;

// One call of a pointwise loss. The operands have one shape, that of input, which is the first; broadcasting is the
// caller's. divisor: what the mean divides by, their number if it is not given.
struct PointwiseCall {
  const PointwiseLoss& loss;
  at::TensorList operands;
  c10::ArrayRef<double> parameters;
  int64_t reduction;
  std::optional<int64_t> divisor;
};

// The losses, with autograd; nothing where the kernels do not cover the call, which then is torch's own function's.
// `reduction` is torch's number for it. inplace_backward: the gradient is written over input.
OptionalTensor cross_entropy(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                             int64_t reduction, int64_t ignore_index, double label_smoothing, bool inplace_backward);
OptionalTensor pointwise(int64_t loss, at::TensorList operands, c10::ArrayRef<double> parameters, int64_t reduction,
                         std::optional<int64_t> divisor);
OptionalTensor nll_loss(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                        int64_t reduction, int64_t ignore_index);

// Whether a class index out of range is found on the host, before a kernel is launched. On the CPU it is found anyway.
void set_debug(bool enabled);

// Do the kernels compute this call and its gradients? Arguments that torch would refuse are covered: the forward pass
// refuses them with a message of its own.
bool cross_entropy_covers(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight);
bool pointwise_covers(const PointwiseLoss& loss, at::TensorList operands);
bool nll_loss_covers(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight);

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

struct PointwiseResult {
  at::Tensor loss;                // under autocast float32, whatever the input
  std::vector<at::Tensor> grads;  // of each operand, if asked for
};

// Gradients at once as above. Which are wanted is a bit for each operand, the lowest for the first.
PointwiseResult pointwise_forward(const PointwiseCall& call, bool autocast, unsigned with_grads = 0);

// -> the gradients of the operands, times grad_output; undefined where not wanted. ready: as above, where wanted.
std::vector<at::Tensor> pointwise_backward(const at::Tensor& grad_output, const PointwiseCall& call, unsigned wanted,
                                           std::vector<at::Tensor> ready = {});

struct NLLLossResult {
  at::Tensor loss;          // under autocast float32, whatever the input
  at::Tensor total_weight;  // 1-D, for the backward pass: what the mean divides by, if there is one
};

NLLLossResult nll_loss_forward(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                               int64_t reduction, int64_t ignore_index, bool autocast);

// -> d loss/d input, times grad_output. Of input only the sizes and the dtype are needed; strides: the gradient's.
at::Tensor nll_loss_backward(const at::Tensor& grad_output, const at::Tensor& target, const OptionalTensor& weight,
                             const at::Tensor& total_weight, at::IntArrayRef sizes, at::IntArrayRef strides,
                             at::ScalarType dtype, int64_t reduction, int64_t ignore_index);

// What a loss has as its grad_fn: the nodes' types, and what Python calls them.
std::array<std::pair<const std::type_info*, const char*>, 3> node_types();

// Those that at::empty_like(input) has.
c10::SmallVector<int64_t, 8> gradient_strides(const at::Tensor& input);

}  // namespace fusedloss
