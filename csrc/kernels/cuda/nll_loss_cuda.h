#pragma once

#include <cuda_runtime_api.h>

#include "kernels/options.h"

namespace fusedloss::cuda {

// Bytes that options.scratch must have for the forward pass.
int64_t nll_loss_scratch_bytes(const NLLLossOptions& options);

// Each launches on `stream` and returns the first error; no launch synchronises with the host.
cudaError_t nll_loss_forward(const NLLLossOptions& options, cudaStream_t stream);
cudaError_t nll_loss_backward(const NLLLossOptions& options, cudaStream_t stream);

}  // namespace fusedloss::cuda
