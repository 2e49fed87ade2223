#pragma once

#include <cuda_runtime_api.h>

#include "kernels/options.h"

namespace fusedloss::cuda {

constexpr int64_t kMaxClasses = int64_t(1) << 30;  // the kernels count the classes of a row in int

// The launchers for logits of one dtype. Each returns the first error. No launch synchronises with the host.
struct CrossEntropyLaunchers {
  // Must be called before scratch_bytes and forward. Fills in what options.tuning leaves to the device. All other
  // options must be set, except scratch.
  cudaError_t (*prepare_forward)(CrossEntropyOptions&);
  // The size in bytes that options.scratch must have for the forward pass.
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
