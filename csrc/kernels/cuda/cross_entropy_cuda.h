#pragma once

#include <cuda_runtime_api.h>

#include "kernels/options.h"

namespace fusedloss::cuda {

constexpr int64_t kMaxClasses = int64_t(1) << 30;  // within a row, the kernels count classes in int

// The launchers for logits of one type. Each returns the first error; no launch synchronises with the host.
struct CrossEntropyLaunchers {
  // Called before the other two of the forward pass: fills in what options.tuning leaves to the device. Everything else
  // in the options is set, but for scratch.
  cudaError_t (*prepare_forward)(CrossEntropyOptions&);
  // Bytes that options.scratch must have for the forward pass.
  int64_t (*scratch_bytes)(const CrossEntropyOptions&);
  cudaError_t (*forward)(const CrossEntropyOptions&, cudaStream_t);

  cudaError_t (*backward)(const CrossEntropyOptions&, cudaStream_t);
};

extern const CrossEntropyLaunchers kCrossEntropyFloat32, kCrossEntropyFloat64, kCrossEntropyBFloat16,
    kCrossEntropyFloat16;

// Returns the launchers for the dtype of the logits.
inline const CrossEntropyLaunchers& cross_entropy_launchers(const CrossEntropyOptions& options) {
  static constexpr const CrossEntropyLaunchers* kTable[] = {&kCrossEntropyFloat32, &kCrossEntropyFloat64,
                                                            &kCrossEntropyBFloat16, &kCrossEntropyFloat16};
  return *kTable[int(options.dtype)];
}

}  // namespace fusedloss::cuda
