// Cross entropy between torch and the kernels: from the tensors of a call to its loss and its gradient.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/checks.h"

namespace fusedloss {

// The arguments of one call, as torch's own function has them; `reduction` is torch's number for it.
struct CrossEntropyCall {
  const at::Tensor& input;       // logits, (C), (N, C) or (N, C, d1, …)
  const at::Tensor& target;      // class indices, input's shape without C; or class probabilities of input's shape
  const OptionalTensor& weight;  // (C)
  int64_t reduction, ignore_index;
  double label_smoothing;
};

// Do the kernels compute this call of plain tensors, and its gradient? Arguments that torch would refuse are covered:
// the forward pass refuses them with a message of its own.
bool cross_entropy_covers(const CrossEntropyCall& call);

// Whether the sum of weight over the classes is needed.
inline bool sums_class_weights(bool has_weight, double label_smoothing, bool class_indices) {
  return has_weight && label_smoothing > 0 && class_indices;
}

// Elements of the statistics: two for each row, and of the mean's denominator and the sum of weight those that are
// needed, so that no element is left unwritten. Int: int64_t, or what the compiler knows of a number.
template <typename Int>
Int cross_entropy_statistics_numel(const Int& rows, bool is_mean, bool sums_weight) {
  return rows * 2 + int64_t(is_mean) + int64_t(sums_weight);
}

struct CrossEntropyResult {
  at::Tensor loss;        // of input's dtype, under autocast float32
  at::Tensor statistics;  // 1-D, for the backward pass: row_max, row_scale, and where they are needed the mean's
                          // denominator and the sum of weight; see cross_entropy_statistics_numel
  at::Tensor grad;        // d loss/d input, if it was asked for
};

// with_grad: the gradient for a grad_output of 1 is computed too, so that the logits are read from memory once and not
// twice. For a mean or a sum.
CrossEntropyResult cross_entropy_forward(const CrossEntropyCall& call, bool autocast, bool with_grad = false);

// Returns d loss/d input, times grad_output. in_place: it is written over input, and is an alias of that. ready: the
// gradient for a grad_output of 1, if the forward pass has left one; on CUDA the kernel looks at grad_output, and ready
// becomes the result, as it is or written anew.
at::Tensor cross_entropy_backward(const at::Tensor& grad_output, const CrossEntropyCall& call,
                                  const at::Tensor& statistics, bool in_place = false, const at::Tensor& ready = {});

}  // namespace fusedloss
