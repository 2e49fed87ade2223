// The 16-bit types as stored.
#pragma once

#include <cstdint>

#include "kernels/dtypes.h"

namespace fusedloss::cpu {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

}  // namespace fusedloss::cpu
