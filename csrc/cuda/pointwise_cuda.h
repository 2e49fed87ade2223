#pragma once

#include <cuda_runtime_api.h>

#include "options.h"

namespace fusedloss::cuda {

// Bytes that options.scratch must have for the forward pass.
int64_t pointwise_scratch_bytes(const PointwiseOptions& options);

// Each launches on `stream` and returns the first error; no launch synchronises with the host.
cudaError_t pointwise_forward(const PointwiseOptions& options, cudaStream_t stream);
cudaError_t pointwise_backward(const PointwiseOptions& options, cudaStream_t stream);

}  // namespace fusedloss::cuda
