#pragma once

#include "kernels/cpu/chunks.h"
#include "kernels/cpu/pointwise_formula.h"
#include "kernels/options.h"

namespace fusedloss::cpu {

// Elements of a block, if any of its data goes through a buffer. All memory that a block accesses then stays in L1.
constexpr int64_t kPointwiseBlock = 512;
// Elements of a chunk. Without buffers, the whole chunk is one block.
constexpr int64_t kPointwiseChunk = 16 * kPointwiseBlock;

// The work of the forward or the backward pass.
Work pointwise_work(const PointwiseOptions& options);

// Bytes that options.scratch must have for the forward pass.
int64_t pointwise_scratch_bytes(const PointwiseOptions& options);

// The functions that are compiled for each instruction set and stored type.
struct PointwiseKernels {
  // `evaluate` computes either pass. Its calls cover every chunk once, and may come from any thread. After the forward
  // pass, `finish` reduces the chunks' sums in scratch.
  void (*evaluate)(const PointwiseFormula&, const PointwiseOptions&, int64_t begin_chunk, int64_t end_chunk);
  void (*finish)(const PointwiseOptions&);
};

// Returns the functions for this machine's instruction set and the dtype of the operands.
const PointwiseKernels& pointwise_kernels(const PointwiseOptions& options);

// The formula of the loss with this name in formulas/pointwise-inl.h, or null if there is none.
const PointwiseFormula* find_pointwise_loss(const char* name);

}  // namespace fusedloss::cpu
