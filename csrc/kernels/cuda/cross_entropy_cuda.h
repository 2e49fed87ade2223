#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/dispatch_dtype.h"
#include "kernels/options.h"

namespace fusedloss::cuda {

constexpr int64_t kMaxClasses = int64_t(1) << 30;  // within a row, the kernels count classes in int

// For logits of one type.
template <DType kDType>
struct CrossEntropyOf {
  // Bytes that options.scratch must have for the forward pass. Everything else in the options is set, but for what
  // options.tuning leaves to the device: this fills it in.
  static cudaError_t scratch_bytes(CrossEntropyOptions& options, int64_t& bytes);

  // Each launches on `stream` and returns the first error; no launch synchronises with the host.
  static cudaError_t forward(const CrossEntropyOptions& options, cudaStream_t stream);
  static cudaError_t backward(CrossEntropyOptions options, cudaStream_t stream);
};

extern template struct CrossEntropyOf<DType::kFloat32>;
extern template struct CrossEntropyOf<DType::kFloat64>;
extern template struct CrossEntropyOf<DType::kBFloat16>;
extern template struct CrossEntropyOf<DType::kFloat16>;

// Calls f with the CrossEntropyOf<…> of the logits' type.
template <typename F>
cudaError_t on_cross_entropy(const CrossEntropyOptions& options, F f) {
  return on_dtype_constant(options.dtype,
                           [&](auto constant) { return f(CrossEntropyOf<decltype(constant)::value>()); });
}

inline cudaError_t cross_entropy_scratch_bytes(CrossEntropyOptions& options, int64_t& bytes) {
  return on_cross_entropy(options, [&](auto of_type) { return of_type.scratch_bytes(options, bytes); });
}
inline cudaError_t cross_entropy_forward(const CrossEntropyOptions& options, cudaStream_t stream) {
  return on_cross_entropy(options, [&](auto of_type) { return of_type.forward(options, stream); });
}
inline cudaError_t cross_entropy_backward(const CrossEntropyOptions& options, cudaStream_t stream) {
  return on_cross_entropy(options, [&](auto of_type) { return of_type.backward(options, stream); });
}

}  // namespace fusedloss::cuda
