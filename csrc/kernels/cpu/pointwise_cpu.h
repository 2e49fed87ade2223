#pragma once

#include "kernels/cpu/chunks.h"
#include "kernels/cpu/pointwise_formula.h"
#include "kernels/options.h"

namespace fusedloss::cpu {

// Elements of a block for which something goes by way of a buffer: all that it touches stays in the first cache.
constexpr int64_t kPointwiseBlock = 512;
// Elements of a chunk, which is one block where nothing does.
constexpr int64_t kPointwiseChunk = 16 * kPointwiseBlock;

// Of either pass.
Work pointwise_work(const PointwiseOptions& options);

// Bytes that options.scratch must have for the forward pass.
int64_t pointwise_scratch_bytes(const PointwiseOptions& options);

// The functions that are compiled for each instruction set and stored type.
struct PointwiseKernels {
  // Either pass: called for every chunk once, from any thread. After the forward pass `finish` reduces what the chunks
  // left in scratch.
  void (*evaluate)(const PointwiseFormula&, const PointwiseOptions&, int64_t begin_chunk, int64_t end_chunk);
  void (*finish)(const PointwiseOptions&);
};

// Returns the functions for this machine's instruction set and the dtype of the operands.
const PointwiseKernels& pointwise_kernels(const PointwiseOptions& options);

// The formula of a loss of formulas/pointwise-inl.h, or null where there is none of this name.
const PointwiseFormula* find_pointwise_loss(const char* name);

}  // namespace fusedloss::cpu
