#pragma once

#include "kernels/cpu/chunks.h"
#include "kernels/options.h"

namespace fusedloss::cpu {

// The work of the forward or the backward pass, and the bytes that options.scratch must have for the forward pass.
Work cross_entropy_work(const CrossEntropyOptions& options);
int64_t cross_entropy_scratch_bytes(const CrossEntropyOptions& options);

// True if sum_target_weights and total_weight must be called before the forward pass: the gradient that it writes needs
// the divisor of the mean.
inline bool needs_total_weight_first(const CrossEntropyOptions& options) {
  return options.total_weight != nullptr && options.grad_logits != nullptr;
}

// The functions that are compiled for each instruction set and stored type. The calls of a function that takes chunks
// cover every chunk once, and may come from any thread.
struct CrossEntropyKernels {
  // Writes options.weight_sum. The order of the additions is always the same, which that of torch's own sum is not.
  void (*weight_sum)(const CrossEntropyOptions&);
  // sum_target_weights stores the sum of the weights of each chunk in scratch; total_weight adds these sums and writes
  // options.total_weight. If they are not called, `finish` writes it.
  void (*sum_target_weights)(const CrossEntropyOptions&, int64_t begin_chunk, int64_t end_chunk);
  void (*total_weight)(const CrossEntropyOptions&);
  // `finish` reduces the chunks' results in scratch, and returns the first row whose target is out of range, or -1.
  void (*forward)(const CrossEntropyOptions&, int64_t begin_chunk, int64_t end_chunk);
  int64_t (*finish)(const CrossEntropyOptions&);
  void (*backward)(const CrossEntropyOptions&, int64_t begin_chunk, int64_t end_chunk);
};

// Returns the functions for this machine's instruction set and the dtype of the logits.
const CrossEntropyKernels& cross_entropy_kernels(const CrossEntropyOptions& options);

}  // namespace fusedloss::cpu
