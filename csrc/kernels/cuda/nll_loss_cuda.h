#pragma once

#include <cuda_runtime_api.h>

#include "kernels/options.h"

namespace fusedloss::cuda {

// How many bytes the forward pass needs in options.scratch.
int64_t nll_loss_scratch_bytes(const NLLLossOptions& options);

// Each function launches on `stream` and returns the first error. None of them synchronises with the host.
cudaError_t nll_loss_forward(const NLLLossOptions& options, cudaStream_t stream);
cudaError_t nll_loss_backward(const NLLLossOptions& options, cudaStream_t stream);

}  // namespace fusedloss::cuda
