#pragma once

#include "kernels/cpu/chunks.h"
#include "kernels/options.h"

namespace fusedloss::cpu {

// The work of either pass, and the bytes that options.scratch must have for the forward pass.
Work cross_entropy_work(const CrossEntropyOptions& options);
int64_t cross_entropy_scratch_bytes(const CrossEntropyOptions& options);

// The functions that are compiled for each instruction set and stored type. What takes chunks is called for every chunk
// once, from any thread.
struct CrossEntropyKernels {
  // Writes options.weight_sum: always in the same order, which torch's own sum is not.
  void (*weight_sum)(const CrossEntropyOptions&);
  // Together they write options.total_weight before a forward pass that writes the gradient too: the latter adds up
  // what the chunks left in scratch. Any other forward pass writes it itself.
  void (*sum_target_weights)(const CrossEntropyOptions&, int64_t begin_chunk, int64_t end_chunk);
  void (*total_weight)(const CrossEntropyOptions&);
  // `finish` reduces what the chunks left in scratch, and returns the first row whose target is out of range, or -1.
  void (*forward)(const CrossEntropyOptions&, int64_t begin_chunk, int64_t end_chunk);
  int64_t (*finish)(const CrossEntropyOptions&);
  void (*backward)(const CrossEntropyOptions&, int64_t begin_chunk, int64_t end_chunk);
};

// Those for this machine and the type of the logits.
const CrossEntropyKernels& cross_entropy_kernels(const CrossEntropyOptions& options);

}  // namespace fusedloss::cpu
