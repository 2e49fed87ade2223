// What a formula is to the op layer on the GPU: two launchers. The losses of this extension and those that a user's
// expression is compiled to look the same.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/options.h"

namespace fusedloss::cuda {

// Each launches on the stream and returns the first error; no launch synchronises with the host.
struct PointwiseFormula {
  cudaError_t (*forward)(const PointwiseOptions&, cudaStream_t);
  cudaError_t (*backward)(const PointwiseOptions&, cudaStream_t);
};

}  // namespace fusedloss::cuda
