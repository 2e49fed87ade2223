// The arguments of the kernels (sizes, strides, pointers and choices) as plain structs. CPU kernels, CUDA kernels and
// the op files include this file, so it must not include torch.
#pragma once

#include <cstdint>

#include "kernels/dtypes.h"

namespace fusedloss {

// The values are those of at::Reduction.
enum class Reduction : int32_t { kNone = 0, kMean = 1, kSum = 2 };

// Strides count elements, not bytes.
struct Strides {
  int64_t outer, classes, inner;
};

// The thresholds by which the CUDA kernels divide the work (kernels/cuda/cross_entropy_plan.h). The defaults are for a
// large GPU. Tests set smaller values so that small problems reach every kernel.
struct CudaTuning {
  int64_t thread_classes = 16;         // a thread computes a row of at most this many contiguous classes
  int64_t warp_bytes = 8192;           // lanes of one warp compute a row of at most this many bytes, and keep it
  int64_t lane_vectors = 8;            // maximum vectors of a row for each lane; twice as many if rows are not kept
  int64_t min_lanes = 2;               // minimum lanes for each row, if the row has as many vectors
  int64_t block_threads = 256;         // maximum threads of a block that computes class-index rows and their gradient
  int64_t other_threads = 128;         // maximum threads of other blocks, unless rows are few; at least 128
  int64_t split_classes = 8192;        // minimum classes for each block, if rows are few and several blocks share one
  int64_t target_weight_rows = 16384;  // rows for each block of the kernel that sums the target classes' weights
  int64_t max_blocks = 8192;           // maximum blocks of a grid; in a larger problem, blocks loop over several parts
  int64_t waves = 2;                   // maximum waves of blocks that loop over rows; one wave fills the device
  int64_t overlap = 1;                 // 1: a kernel may start before its predecessor ends, if supported; 0: never

  // Properties of the device; 0 means the value of the current device.
  int64_t multiprocessors = 0;
  int64_t kept_bytes = 0;      // shared memory in which a block may keep its rows; columns may use twice as much
  int64_t cluster_blocks = 0;  // maximum blocks of a cluster; 1 means no clusters
};

// Logits of shape (C), (N, C) or (N, C, d1, …) are viewed as [outer, classes, inner]. A row is the classes at one
// (outer, inner) position, and rows are numbered like the elements of a contiguous [outer, inner] tensor. The
// "accumulate type" is double for kFloat64 and float for the other types.
struct CrossEntropyOptions {
  DType dtype;       // of logits, target_probability and grad_logits
  DType loss_dtype;  // of loss and grad_output: dtype or the accumulate type
  Reduction reduction;
  int64_t outer, classes, inner;
  int64_t ignore_index;
  double label_smoothing;  // in [0, 1]; 0 means no smoothing

  const void* logits;  // [outer, classes, inner]
  Strides logits_strides;
  const int64_t* target_index;     // [outer, inner] contiguous; null for probabilities
  const void* target_probability;  // [outer, classes, inner]; null for class indices
  Strides target_strides;
  const void* weight;  // [classes] contiguous, accumulate type; null means 1 for every class

  // Written by the forward pass, read by the backward pass; all of the accumulate type. If the number of rows is a
  // multiple of the number of elements in 16 bytes, row_max, row_scale and the rows' losses are 16-byte aligned.
  void* row_max;       // [rows]
  void* row_scale;     // [rows]  sum(q) / sum(exp(logit - row_max)), q as in formulas/cross_entropy-inl.h
  void* total_weight;  // [1]     the divisor of the mean; null for the other reductions
  void* weight_sum;    // [1]     the sum of weight, written before the first launch; null if it is not needed

  void* loss;     // [rows] for kNone, else [1]
  void* scratch;  // forward only; as many bytes as the launcher asks for, 16-byte aligned

  const void* grad_output;     // [rows] for kNone, else [1]; null means 1
  int64_t grad_output_stride;  // 0 if all rows have the same grad_output
  void* grad_logits;           // [outer, classes, inner]; if not null, the forward pass writes the gradient too
  Strides grad_strides;

  // Only for CUDA's backward pass, if all rows have the same grad_output:
  bool grad_ready;               // grad_logits already holds the gradient for a grad_output of 1
  int32_t* grad_output_was_one;  // receives whether grad_output is 1; host-readable memory, or null

  CudaTuning tuning;

  int64_t rows() const { return outer * inner; }
  // True if the target distribution q of a row may be nonzero for several classes; see formulas/cross_entropy-inl.h.
  bool is_spread() const { return target_probability != nullptr || label_smoothing > 0; }
};

// The negative log likelihood of class indices. Rows are defined as in CrossEntropyOptions.
struct NLLLossOptions {
  DType dtype;       // of input and grad_input
  DType loss_dtype;  // of loss and grad_output: dtype or the accumulate type
  Reduction reduction;
  int64_t outer, classes, inner;
  int64_t ignore_index;

  const void* input;  // [outer, classes, inner], log-probabilities; forward only
  Strides input_strides;
  const int64_t* target_index;  // [outer, inner] contiguous
  const void* weight;           // [classes] contiguous, accumulate type; null means 1 for every class
  void* total_weight;           // [1] accumulate type, the divisor of the mean; null for the other reductions

  void* loss;     // [rows] for kNone, else [1]
  void* scratch;  // forward only; as many bytes as the launcher asks for, 16-byte aligned

  const void* grad_output;     // [rows] for kNone, else [1]
  int64_t grad_output_stride;  // 0 if all rows have the same grad_output
  void* grad_input;            // [outer, classes, inner]; its classes or its inner positions are contiguous
  Strides grad_strides;

  CudaTuning tuning;

  int64_t rows() const { return outer * inner; }
};

constexpr int kMaxOperands = 8, kMaxParameters = 16;
// On CUDA, only a loss with at least this many operands accepts one that repeats, such as a row of weights.
constexpr int kFewestOfRepeated = 3;

// A pointwise loss, which is computed from one element of each operand (input, which comes first, target, weights, …):
// MSE, its family, and the user's own losses.
struct PointwiseOptions {
  DType dtype;       // of the operands and their gradients
  DType loss_dtype;  // of loss and grad_output: dtype or the accumulate type
  Reduction reduction;
  int64_t numel;
  double divisor;  // of the mean

  int operands;
  const void* operand[kMaxOperands];  // [numel] contiguous, or [period] if the operand repeats
  // The number of elements after which the operand repeats, or 0 if it does not. The first operand never repeats. On
  // CUDA, a period above 1 needs kFewestOfRepeated operands.
  int64_t operand_period[kMaxOperands];
  double parameter[kMaxParameters];

  void* loss;     // [numel] for kNone, else [1]; null in the backward pass
  void* scratch;  // forward only; as many bytes as the launcher asks for, 16-byte aligned

  const void* grad_output;     // [numel] for kNone, else [1]; null means 1
  int64_t grad_output_stride;  // 0 if all elements have the same grad_output
  void* grad[kMaxOperands];    // [numel] for each operand, or null; if not null, the forward pass writes it too

  bool grad_ready;  // as in CrossEntropyOptions, like the next field
  int32_t* grad_output_was_one;

  CudaTuning tuning;
};

}  // namespace fusedloss
