// One switch on dtype: the statement runs with T the type as stored. It returns from the function it stands in.
#pragma once

#include "kernels/cpu/scalar_types.h"
#include "kernels/options.h"

#define FUSEDLOSS_ON_DTYPE(dtype, T, ...)             \
  switch (dtype) {                                    \
    case ::fusedloss::DType::kFloat32: {              \
      using T = float;                                \
      __VA_ARGS__;                                    \
    }                                                 \
    case ::fusedloss::DType::kFloat64: {              \
      using T = double;                               \
      __VA_ARGS__;                                    \
    }                                                 \
    case ::fusedloss::DType::kBFloat16: {             \
      using T = ::fusedloss::cpu::bfloat16;           \
      __VA_ARGS__;                                    \
    }                                                 \
    case ::fusedloss::DType::kFloat16: {              \
      using T = ::fusedloss::cpu::float16;            \
      __VA_ARGS__;                                    \
    }                                                 \
  }                                                   \
  __builtin_unreachable()
