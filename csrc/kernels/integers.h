// Integer arithmetic for the kernels of both devices and for the code that launches them.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FUSEDLOSS_ANYWHERE __host__ __device__ inline
#else
#define FUSEDLOSS_ANYWHERE inline
#endif

namespace fusedloss {

FUSEDLOSS_ANYWHERE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FUSEDLOSS_ANYWHERE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
FUSEDLOSS_ANYWHERE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fusedloss
