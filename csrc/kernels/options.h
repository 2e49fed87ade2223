// What a kernel is told: sizes, strides, pointers and choices, as plain structs.
// No torch here: CPU kernels, CUDA kernels and the op files all include it.
#pragma once

#include <cstdint>

#include "kernels/dtypes.h"

namespace fusedloss {

// The numbers are torch's own (at::Reduction).
enum class Reduction : int32_t { kNone = 0, kMean = 1, kSum = 2 };

// Strides count elements, not bytes.
struct Strides {
  int64_t outer, classes, inner;
};

// The thresholds by which the CUDA kernels divide the work (kernels/cuda/cross_entropy_plan.h). The defaults are for a
// large GPU; smaller numbers bring small problems to every kernel, which is how the tests reach them.
struct CudaTuning {
  int64_t thread_classes = 16;         // up to so many neighbouring classes, a thread takes a row
  int64_t warp_bytes = 8192;           // up to so many bytes, a warp or a part of one takes a row, and keeps it
  int64_t lane_vectors = 8;            // of a row for each lane, at most; twice that if rows are not kept
  int64_t min_lanes = 2;               // of a warp that take a row, where the row has as many vectors
  int64_t block_threads = 256;         // at most, of a block that takes a row of class indices and writes its gradient
  int64_t other_threads = 128;         // at most, of other blocks, unless rows are few; never fewer than 128
  int64_t split_classes = 8192;        // for each block, at least, where rows are few and several blocks share one
  int64_t target_weight_rows = 16384;  // of a block that adds up the weights of the rows' target classes
  int64_t max_blocks = 8192;           // of a grid; where the problem is larger, a block takes several parts in turn
  int64_t waves = 2;                   // at most, of blocks that take rows in turn; the device holds one at once
  int64_t overlap = 1;                 // 1: a kernel may start while the one before runs, if the device can; 0: never

  // 0: as the current device has them.
  int64_t multiprocessors = 0;
  int64_t kept_bytes = 0;      // of shared memory, in which a block may keep its rows; its columns, in twice that
  int64_t cluster_blocks = 0;  // at most, in one cluster; 1: there are no clusters
};

// Logits of shape (C), (N, C) or (N, C, d1, …) are seen as [outer, classes, inner]; a row is the classes of one
// (outer, inner) position. Rows are numbered as the elements of a contiguous [outer, inner] are. The "accumulate type"
// is float, and double for kFloat64.
struct CrossEntropyOptions {
  DType dtype;       // of logits, target_probability and grad_logits
  DType loss_dtype;  // of loss and grad_output: dtype or the accumulate type
  Reduction reduction;
  int64_t outer, classes, inner;
  int64_t ignore_index;
  double label_smoothing;  // 0 is none; in [0, 1]

  const void* logits;  // [outer, classes, inner]
  Strides logits_strides;
  const int64_t* target_index;     // [outer, inner] contiguous; null for probabilities
  const void* target_probability;  // [outer, classes, inner]; null for class indices
  Strides target_strides;
  const void* weight;  // [classes] contiguous, accumulate type; null is 1 for every class

  // Written by the forward pass, read by the backward pass; all of the accumulate type. Where the number of rows is a
  // multiple of so many elements as 16 bytes hold, row_max, row_scale and the loss of each row are 16-byte aligned.
  void* row_max;       // [rows]
  void* row_scale;     // [rows]  sum(q) / sum(exp(logit - row_max)), q as in formulas/cross_entropy-inl.h
  void* total_weight;  // [1]     what the mean divides by; null for the other reductions
  void* weight_sum;    // [1]     the sum of weight, before the first launch; null where it is not needed

  void* loss;     // [rows] for kNone, else [1]
  void* scratch;  // forward only; as many bytes as the launcher asks for, 16-byte aligned

  const void* grad_output;     // [rows] for kNone, else [1]; null is 1
  int64_t grad_output_stride;  // 0 where one value serves all rows
  void* grad_logits;           // [outer, classes, inner]; not null in the forward pass: write it there already
  Strides grad_strides;

  // CUDA's backward pass, where one value serves all rows:
  bool grad_ready;               // grad_logits holds the gradient for a grad_output of 1
  int32_t* grad_output_was_one;  // in memory that the host can read, or null; tells it

  CudaTuning tuning;

  int64_t rows() const { return outer * inner; }
  // Has the target distribution q of a row more than one class? See formulas/cross_entropy-inl.h.
  bool is_spread() const { return target_probability != nullptr || label_smoothing > 0; }
};

// The negative log likelihood of class indices. Rows as above.
struct NLLLossOptions {
  DType dtype;       // of input and grad_input
  DType loss_dtype;  // of loss and grad_output: dtype or the accumulate type
  Reduction reduction;
  int64_t outer, classes, inner;
  int64_t ignore_index;

  const void* input;  // [outer, classes, inner], log-probabilities; forward only
  Strides input_strides;
  const int64_t* target_index;  // [outer, inner] contiguous
  const void* weight;           // [classes] contiguous, accumulate type; null is 1 for every class
  void* total_weight;           // [1] accumulate type, what the mean divides by; null for the other reductions

  void* loss;     // [rows] for kNone, else [1]
  void* scratch;  // forward only; as many bytes as the launcher asks for, 16-byte aligned

  const void* grad_output;     // [rows] for kNone, else [1]
  int64_t grad_output_stride;  // 0 where one value serves all rows
  void* grad_input;            // [outer, classes, inner]; its classes or its inner positions lie side by side
  Strides grad_strides;

  CudaTuning tuning;

  int64_t rows() const { return outer * inner; }
};

constexpr int kMaxOperands = 8, kMaxParameters = 16;
constexpr int kFewestOfRepeated = 3;  // operands of a loss that on CUDA takes a row of weights, say, as it is

// A loss of one element of each of its operands (input, which comes first, target, weights, …): MSE, its family, and
// losses of the user's own.
struct PointwiseOptions {
  DType dtype;       // of the operands and their gradients
  DType loss_dtype;  // of loss and grad_output: dtype or the accumulate type
  Reduction reduction;
  int64_t numel;
  double divisor;  // what the mean divides by

  int operands;
  const void* operand[kMaxOperands];     // of each operand, [numel] contiguous; the first repeats nothing
  int64_t operand_period[kMaxOperands];  // 0, or after how many elements it repeats itself; it then is [period]. CUDA:
                                         // more than 1 only where there are kFewestOfRepeated operands
  double parameter[kMaxParameters];

  void* loss;     // [numel] for kNone, else [1]; null in the backward pass
  void* scratch;  // forward only; as many bytes as the launcher asks for, 16-byte aligned

  const void* grad_output;     // [numel] for kNone, else [1]; null is 1
  int64_t grad_output_stride;  // 0 where one value serves all elements
  void* grad[kMaxOperands];    // of each operand, [numel]; null where it is not wanted; in the forward pass: write it
                               // there already

  bool grad_ready;  // as above
  int32_t* grad_output_was_one;

  CudaTuning tuning;
};

}  // namespace fusedloss
