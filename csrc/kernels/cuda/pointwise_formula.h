// A formula's two launchers, which is all that the op layer needs of it on the GPU. The losses of this extension and
// those that are compiled from a user's expression have the same interface.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/options.h"

namespace fusedloss::cuda {

// Each launcher launches on the stream and returns the first error. None of them synchronises with the host.
struct PointwiseFormula {
  cudaError_t (*forward)(const PointwiseOptions&, cudaStream_t);
  cudaError_t (*backward)(const PointwiseOptions&, cudaStream_t);
};

}  // namespace fusedloss::cuda
