// Calls the cross entropy kernels: takes the tensors of a call and returns its loss and its gradient.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/checks.h"

namespace fusedloss {

// The arguments of one call, named as in torch's own function. `reduction` is torch's number for it.
struct CrossEntropyCall {
  const at::Tensor& input;       // logits, (C), (N, C) or (N, C, d1, …)
  const at::Tensor& target;      // class indices in input's shape without C, or class probabilities in input's shape
  const OptionalTensor& weight;  // (C)
  int64_t reduction, ignore_index;
  double label_smoothing;
};

// True if the kernels compute this call of plain tensors, and its gradient. It is also true for most arguments that
// torch rejects: the forward pass rejects them with its own message.
bool cross_entropy_covers(const CrossEntropyCall& call);

// True if the kernels need the sum of weight over the classes.
inline bool sums_class_weights(bool has_weight, double label_smoothing, bool class_indices) {
  return has_weight && label_smoothing > 0 && class_indices;
}

// The number of elements of the statistics: two for each row, one for the mean's denominator and one for the sum of
// weight. The last two are counted only if they are needed, so that no element is left unwritten. Int is int64_t, or
// c10::SymInt where the number of rows may be symbolic.
template <typename Int>
Int cross_entropy_statistics_numel(const Int& rows, bool is_mean, bool sums_weight) {
  return rows * 2 + int64_t(is_mean) + int64_t(sums_weight);
}

struct CrossEntropyResult {
  at::Tensor loss;        // of input's dtype, or of float32 under autocast (float64 stays float64)
  at::Tensor statistics;  // 1-D, for the backward pass: row_max, row_scale, and if they are needed the mean's
                          // denominator and the sum of weight; see CrossEntropyOptions in kernels/options.h
  at::Tensor grad;        // d loss/d input, if it was requested
};

// with_grad: also compute the gradient for a grad_output of 1, so that the logits are read from memory once instead of
// twice. Only for a mean or a sum.
CrossEntropyResult cross_entropy_forward(const CrossEntropyCall& call, bool autocast, bool with_grad = false);

// Returns d loss/d input times grad_output. in_place: the gradient is written over input, and the result is an alias of
// input. ready: the gradient for a grad_output of 1, if the forward pass computed one; its memory becomes the result.
// On CUDA the kernel reads grad_output, and overwrites ready only if grad_output is not 1.
at::Tensor cross_entropy_backward(const at::Tensor& grad_output, const CrossEntropyCall& call,
                                  const at::Tensor& statistics, bool in_place = false, const at::Tensor& ready = {});

}  // namespace fusedloss
