#pragma once

#include "kernels/cpu/chunks.h"
#include "kernels/options.h"
#include "kernels/tiles.h"

namespace fusedloss::cpu {

// Rows of a chunk of the forward pass: each is a cache miss or two, of which a core has some ten under way.
constexpr int64_t kNLLLossForwardRows = 2048;

// The tiles of grad_input, each a chunk of the backward pass.
Tiling nll_loss_tiling(const NLLLossOptions& options);

// Forward: every chunk once, from any thread; then nll_loss_finish, which reduces what the chunks left in scratch and
// returns the first row whose target is out of range, or -1.
Work nll_loss_forward_work(const NLLLossOptions& options);
int64_t nll_loss_scratch_bytes(const NLLLossOptions& options);
void nll_loss_forward(const NLLLossOptions& options, int64_t begin_chunk, int64_t end_chunk);
int64_t nll_loss_finish(const NLLLossOptions& options);

Work nll_loss_backward_work(const NLLLossOptions& options);
void nll_loss_backward(const NLLLossOptions& options, int64_t begin_chunk, int64_t end_chunk);

// The functions above that are compiled for each instruction set and stored type.
struct NLLLossKernels {
  void (*forward)(const NLLLossOptions&, int64_t begin_chunk, int64_t end_chunk);
  int64_t (*finish)(const NLLLossOptions&);
  void (*backward)(const NLLLossOptions&, int64_t begin_chunk, int64_t end_chunk);
};

}  // namespace fusedloss::cpu
