// What a formula is to the kernels of pointwise losses on the CPU: a function of one block of elements, for each
// instruction set and type. The losses of this extension and those that a user's expression is compiled to look the
// same.
#pragma once

#include <cstdint>

#include "kernels/cpu/instruction_set.h"
#include "kernels/options.h"

namespace fusedloss::cpu {

// Operands and gradients are of the type as stored, which the formula asks for each vector: it widens and narrows in
// registers, and compiles once for all types that have float for their statistics. Losses and grad_output are of the
// accumulate type.
struct PointwiseBlock {
  int64_t size;  // a multiple of a vector's elements
  DType dtype;
  const void* const* operand;  // of each operand, [size]
  const double* parameter;
  unsigned wrt;             // the operands whose gradients are wanted, a bit each; 0: the losses alone
  void* loss;               // [size]; null: only their sum is wanted
  const void* grad_output;  // what the gradients are multiplied by: [size], or
  bool one_grad_output;     // one vector, which serves all elements
  void* const* grad;        // of each operand, [size]; null where it is not wanted
};

// -> the sum of the losses where `loss` is null, else 0.
using PointwiseFunction = double(const PointwiseBlock&);

struct PointwiseFormula {
  PointwiseFunction* of_float[kInstructionSets];
  PointwiseFunction* of_double[kInstructionSets];
};

}  // namespace fusedloss::cpu
