#pragma once

#include "kernels/cpu/chunks.h"
#include "kernels/options.h"
#include "kernels/tiles.h"

namespace fusedloss::cpu {

// Rows of a chunk of the forward pass: each is a cache miss or two, of which a core has some ten under way.
constexpr int64_t kNLLLossForwardRows = 2048;

// The tiles of grad_input, each a chunk of the backward pass.
Tiling nll_loss_tiling(const NLLLossOptions& options);

Work nll_loss_forward_work(const NLLLossOptions& options);
Work nll_loss_backward_work(const NLLLossOptions& options);

// Bytes that options.scratch must have for the forward pass.
int64_t nll_loss_scratch_bytes(const NLLLossOptions& options);

// The functions that are compiled for each instruction set and stored type. A function that takes chunks is called once
// for every chunk, from any thread.
struct NLLLossKernels {
  // `finish` reduces what the chunks left in scratch, and returns the first row whose target is out of range, or -1.
  void (*forward)(const NLLLossOptions&, int64_t begin_chunk, int64_t end_chunk);
  int64_t (*finish)(const NLLLossOptions&);
  void (*backward)(const NLLLossOptions&, int64_t begin_chunk, int64_t end_chunk);
};

// Returns the functions for this machine's instruction set and the dtype of the input.
const NLLLossKernels& nll_loss_kernels(const NLLLossOptions& options);

}  // namespace fusedloss::cpu
