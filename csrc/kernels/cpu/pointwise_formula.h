// The interface between formulas and the CPU kernels of pointwise losses: a function that computes one block of
// elements, for each instruction set and type. Losses of this extension and those that are compiled from a user's
// expression have the same interface.
#pragma once

#include <cstdint>

#include "kernels/cpu/instruction_set.h"
#include "kernels/options.h"

namespace fusedloss::cpu {

// Operands and gradients have their stored type. The formula checks `dtype` for each vector and converts in registers,
// so that it is compiled once for all types whose accumulate type is float. Losses and grad_output have the accumulate
// type.
struct PointwiseBlock {
  int64_t size;  // a multiple of the lanes of a vector
  DType dtype;
  const void* const* operand;  // [size] for each operand
  const double* parameter;
  unsigned wrt;             // one bit for each operand whose gradient is wanted; 0: only the losses are wanted
  void* loss;               // [size]; null: only the sum of the losses is wanted
  const void* grad_output;  // the factor of the gradients: [size], or one vector if one_grad_output is true
  bool one_grad_output;     // all elements have the same grad_output
  void* const* grad;        // [size] for each operand; null if it is not wanted
};

// Returns the sum of the losses if `loss` is null, else 0.
using PointwiseFunction = double(const PointwiseBlock&);

struct PointwiseFormula {
  PointwiseFunction* of_float[kInstructionSets];
  PointwiseFunction* of_double[kInstructionSets];
};

}  // namespace fusedloss::cpu
