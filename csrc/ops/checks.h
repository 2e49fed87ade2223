// Checks that the op files share. Each raises the exception type that torch raises, with a message that names the
// argument, what was given and what was expected.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <optional>

#include "kernels/options.h"

namespace fusedloss {

using OptionalTensor = std::optional<at::Tensor>;

// Returns std::nullopt for a dtype that no kernel supports.
inline std::optional<DType> kernel_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return DType::kFloat32;
    case at::kDouble: return DType::kFloat64;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    default: return std::nullopt;
  }
}

inline DType check_dtype(const char* op, const char* name, const at::Tensor& tensor) {
  const auto dtype = kernel_dtype(tensor.scalar_type());
  TORCH_CHECK_NOT_IMPLEMENTED(dtype.has_value(), op, ": ", name, " must be float32, float64, bfloat16 or float16, got ",
                              tensor.scalar_type());
  return *dtype;
}

inline void check_same_device(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& input) {
  TORCH_CHECK(tensor.device() == input.device(), op, ": ", name, " must be on the device of input, ", input.device(),
              ", got ", tensor.device());
}

// Checks that the storage still holds the tensor's elements: storage.resize_(0), which sharded training and offloading
// use, frees the memory while the tensor still exists. `tensor` must be plain (ops/plain.h).
inline void check_memory(const char* op, const char* name, const at::Tensor& tensor) {
  if (tensor.numel() == 0) return;
  const size_t offset = size_t(tensor.storage_offset());
  const size_t expected = tensor.is_contiguous() ? (offset + size_t(tensor.numel())) * tensor.element_size()
                                                 : at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(),
                                                                                    tensor.element_size(), offset);
  const c10::Storage& storage = tensor.storage();
  const size_t got = storage.data() != nullptr ? storage.nbytes() : 0;
  TORCH_CHECK(got >= expected, op, ": ", name, " must have memory for its elements: expected a storage of at least ",
              expected, " bytes, got ", got, " bytes; its storage was freed or shrunk after the tensor was created");
}

inline Reduction check_reduction(const char* op, int64_t reduction) {
  TORCH_CHECK_VALUE(reduction >= 0 && reduction <= 2, op, ": reduction must be 0 (none), 1 (mean) or 2 (sum), got ",
                    reduction);
  return static_cast<Reduction>(reduction);
}

// True if all elements share one memory location, as in the expanded grad_output that summing the losses produces.
inline bool is_one_value(const at::Tensor& tensor) {
  const auto strides = tensor.strides();
  return tensor.numel() > 0 && std::all_of(strides.begin(), strides.end(), [](int64_t stride) { return stride == 0; });
}

// The type in which sums, maxima and exponentials are computed.
inline at::ScalarType accumulate_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// The dtype of a loss or of grad_output: input's dtype, or the accumulate type under autocast.
inline at::ScalarType loss_type(const at::Tensor& input, bool autocast) {
  return autocast ? accumulate_type(input.scalar_type()) : input.scalar_type();
}

inline DType check_loss_dtype(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& input) {
  const auto expected = accumulate_type(input.scalar_type());
  TORCH_CHECK(tensor.scalar_type() == input.scalar_type() || tensor.scalar_type() == expected, op, ": ", name,
              " must be ", input.scalar_type(), " or ", expected, ", got ", tensor.scalar_type());
  return check_dtype(op, name, tensor);
}

}  // namespace fusedloss
