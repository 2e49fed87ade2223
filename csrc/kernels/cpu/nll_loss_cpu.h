#pragma once

#include "kernels/cpu/chunks.h"
#include "kernels/options.h"
#include "kernels/tiles.h"

namespace fusedloss::cpu {

// Rows of a chunk of the forward pass. Each row costs one or two cache misses; a core can have about ten in flight.
constexpr int64_t kNLLLossForwardRows = 2048;

// The tiles of grad_input. Each of them is a chunk of the backward pass.
Tiling nll_loss_tiling(const NLLLossOptions& options);

Work nll_loss_forward_work(const NLLLossOptions& options);
Work nll_loss_backward_work(const NLLLossOptions& options);

// Bytes that options.scratch must have for the forward pass.
int64_t nll_loss_scratch_bytes(const NLLLossOptions& options);

// The functions that are compiled for each instruction set and stored type. The calls of a function that takes chunks
// cover every chunk once, and may come from any thread.
struct NLLLossKernels {
  // `finish` reduces the chunks' results in scratch, and returns the first row whose target is out of range, or -1.
  void (*forward)(const NLLLossOptions&, int64_t begin_chunk, int64_t end_chunk);
  int64_t (*finish)(const NLLLossOptions&);
  void (*backward)(const NLLLossOptions&, int64_t begin_chunk, int64_t end_chunk);
};

// Returns the functions for this machine's instruction set and the dtype of the input.
const NLLLossKernels& nll_loss_kernels(const NLLLossOptions& options);

}  // namespace fusedloss::cpu
