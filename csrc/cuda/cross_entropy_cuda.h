#pragma once

#include <cuda_runtime_api.h>

#include "options.h"

namespace fusedloss::cuda {

constexpr int64_t kMaxClasses = int64_t(1) << 30;  // within a row, the kernels count classes in int

// Bytes that options.scratch must have for the forward pass. Everything else in the options is set, but for what
// options.tuning leaves to the device: this fills it in.
cudaError_t cross_entropy_scratch_bytes(CrossEntropyOptions& options, int64_t& bytes);

// Each launches on `stream` and returns the first error; no launch synchronises with the host.
cudaError_t cross_entropy_forward(const CrossEntropyOptions& options, cudaStream_t stream);
cudaError_t cross_entropy_backward(const CrossEntropyOptions& options, cudaStream_t stream);

}  // namespace fusedloss::cuda
