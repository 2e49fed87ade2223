// What a formula is to the kernels of pointwise losses on the CPU: a function of one block of elements, for each
// instruction set and type. The losses of this extension and those that a user's expression is compiled to look the same.
#pragma once

#include <cstdint>

#include "cpu/instruction_set.h"

namespace fusedloss::cpu {

// Elements of a block. All that it touches stays in the first cache.
constexpr int64_t kPointwiseBlock = 512;

// All arrays are of the statistics' type and have as many elements as are a multiple of a vector's.
struct PointwiseBlock {
  int64_t size;                // <= kPointwiseBlock
  const void* const* operand;  // of each operand, [size]
  const double* parameter;
  unsigned wrt;             // the operands whose gradients are wanted, a bit each; 0: the losses alone
  void* loss;               // [size]
  const void* grad_output;  // [size]; what the gradients are multiplied by
  void* const* grad;        // of each operand, [size]; where one is wanted that is not the first, all are written
};

struct PointwiseFormula {
  void (*of_float[kInstructionSets])(const PointwiseBlock&);
  void (*of_double[kInstructionSets])(const PointwiseBlock&);
};

}  // namespace fusedloss::cpu
