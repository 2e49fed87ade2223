// How a kernel is launched and chosen. tests/cuda_emulator, which executes kernels on a CPU, defines FUSEDLOSS_LAUNCH
// for itself; no kernel knows of it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// A target out of range stops release builds too, as it does in torch.
#undef NDEBUG
#include <cassert>

#include "options.h"

#ifndef FUSEDLOSS_LAUNCH
#define FUSEDLOSS_LAUNCH(kernel, grid, block, stream, ...) (kernel)<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__)
#endif

// What this compiler pass makes code for: 900 is sm_90, 0 is a CPU.
#ifdef __CUDA_ARCH__
#define FUSEDLOSS_CUDA_ARCH __CUDA_ARCH__
#else
#define FUSEDLOSS_CUDA_ARCH 0
#endif

namespace fusedloss::cuda {

// A grid is as large as its problem up to here, then its blocks take several shares each. The same on every GPU, so
// that sums are added in the same order on every GPU.
constexpr int64_t kMaxBlocks = 8192;

inline unsigned grid_size(int64_t work, int64_t work_of_a_block) {
  const int64_t blocks = (work + work_of_a_block - 1) / work_of_a_block;
  return unsigned(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
                   const Arguments&... arguments) {
  FUSEDLOSS_LAUNCH(kernel, grid, block, stream, arguments...);
  return cudaGetLastError();
}

// Calls f with a value of the type that dtype names: on_dtype(dtype, [&](auto zero) { using T = decltype(zero); … }).
template <typename F>
auto on_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double());
    case DType::kBFloat16:
      return f(__nv_bfloat16());
    case DType::kFloat16:
      return f(__half());
    default:
      return f(float());
  }
}

}  // namespace fusedloss::cuda
