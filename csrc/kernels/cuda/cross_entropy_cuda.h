#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/dispatch_dtype.h"
#include "kernels/options.h"

namespace fusedloss::cuda {

constexpr int64_t kMaxClasses = int64_t(1) << 30;  // within a row, the kernels count classes in int

// For logits of one type.
template <DType kDType>
struct CrossEntropyOf {
  // Fills in what options.tuning leaves to the device; everything else in the options is set, but for scratch.
  static cudaError_t prepare_forward(CrossEntropyOptions& options);

  // Bytes that options.scratch must have for the forward pass. The options are prepared.
  static int64_t scratch_bytes(const CrossEntropyOptions& options);

  // Each launches on `stream` and returns the first error; no launch synchronises with the host. The options of the
  // forward pass are prepared.
  static cudaError_t forward(const CrossEntropyOptions& options, cudaStream_t stream);
  static cudaError_t backward(CrossEntropyOptions options, cudaStream_t stream);
};

extern template struct CrossEntropyOf<DType::kFloat32>;
extern template struct CrossEntropyOf<DType::kFloat64>;
extern template struct CrossEntropyOf<DType::kBFloat16>;
extern template struct CrossEntropyOf<DType::kFloat16>;

// Calls f with the CrossEntropyOf<…> of the logits' type.
template <typename F>
auto on_cross_entropy(const CrossEntropyOptions& options, F f) {
  return on_dtype_constant(options.dtype,
                           [&](auto constant) { return f(CrossEntropyOf<decltype(constant)::value>()); });
}

inline cudaError_t cross_entropy_prepare_forward(CrossEntropyOptions& options) {
  return on_cross_entropy(options, [&](auto of_type) { return of_type.prepare_forward(options); });
}
inline int64_t cross_entropy_scratch_bytes(const CrossEntropyOptions& options) {
  return on_cross_entropy(options, [&](auto of_type) { return of_type.scratch_bytes(options); });
}
inline cudaError_t cross_entropy_forward(const CrossEntropyOptions& options, cudaStream_t stream) {
  return on_cross_entropy(options, [&](auto of_type) { return of_type.forward(options, stream); });
}
inline cudaError_t cross_entropy_backward(const CrossEntropyOptions& options, cudaStream_t stream) {
  return on_cross_entropy(options, [&](auto of_type) { return of_type.backward(options, stream); });
}

}  // namespace fusedloss::cuda
