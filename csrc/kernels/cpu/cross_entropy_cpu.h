#pragma once

#include "kernels/cpu/chunks.h"
#include "kernels/options.h"

namespace fusedloss::cpu {

// Of either pass.
Work cross_entropy_work(const CrossEntropyOptions& options);

// Bytes that options.scratch must have for the forward pass.
int64_t cross_entropy_scratch_bytes(const CrossEntropyOptions& options);

// Writes options.weight_sum: always in the same order, which torch's own sum is not.
void cross_entropy_weight_sum(const CrossEntropyOptions& options);

// Writes options.total_weight before a forward pass that writes the gradient too: every chunk once, from any thread;
// then the sum of what the chunks left in scratch. Any other forward pass writes it itself.
void cross_entropy_sum_target_weights(const CrossEntropyOptions& options, int64_t begin_chunk, int64_t end_chunk);
void cross_entropy_total_weight(const CrossEntropyOptions& options);

// Forward: every chunk once, from any thread; then cross_entropy_finish, which reduces what the chunks left in
// scratch and returns the first row whose target is out of range, or -1.
void cross_entropy_forward(const CrossEntropyOptions& options, int64_t begin_chunk, int64_t end_chunk);
int64_t cross_entropy_finish(const CrossEntropyOptions& options);

void cross_entropy_backward(const CrossEntropyOptions& options, int64_t begin_chunk, int64_t end_chunk);

// The functions above that are compiled for each instruction set and stored type.
struct CrossEntropyKernels {
  void (*weight_sum)(const CrossEntropyOptions&);
  void (*sum_target_weights)(const CrossEntropyOptions&, int64_t begin_chunk, int64_t end_chunk);
  void (*total_weight)(const CrossEntropyOptions&);
  void (*forward)(const CrossEntropyOptions&, int64_t begin_chunk, int64_t end_chunk);
  int64_t (*finish)(const CrossEntropyOptions&);
  void (*backward)(const CrossEntropyOptions&, int64_t begin_chunk, int64_t end_chunk);
};

}  // namespace fusedloss::cpu
