// Checks that the losses of class indices share: the shape and dtype of target and weight, and class indices that are
// out of range.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <string>

#include "ops/checks.h"
#include "ops/row_layout.h"

namespace fusedloss {

// Whether class indices are checked on the host before a kernel is launched. The CPU kernels report an index out of
// range in any case.
inline std::atomic<bool> debug_enabled = false;
inline void set_debug(bool enabled) { debug_enabled = enabled; }

inline void check_has_classes(const char* op, const at::Tensor& input) {
  TORCH_CHECK(input.dim() > 0, op,
              ": input must have shape (C), (N, C) or (N, C, d1, ...), got a tensor without dimensions");
}

inline void check_class_indices(const char* op, const at::Tensor& input, const at::Tensor& target) {
  const auto expected = sizes_of_rows(input);
  const bool right = target.sizes() == c10::IntArrayRef(expected);
  // torch raises ValueError for a wrong batch size and RuntimeError for any other wrong shape.
  const bool batch = input.dim() == 1 ? target.dim() != 1 : target.dim() > 0 && target.size(0) == input.size(0);
  TORCH_CHECK_VALUE(right || batch, op, ": target must have the batch size of input, expected shape ",
                    c10::IntArrayRef(expected), " for input of shape ", input.sizes(), ", got ", target.sizes());
  TORCH_CHECK(right, op, ": target must have shape ", c10::IntArrayRef(expected), " for input of shape ", input.sizes(),
              ", got ", target.sizes());
  TORCH_CHECK(at::isIntegralType(target.scalar_type(), /*includeBool=*/false), op,
              ": target must hold class indices of an integer type (int64), got ", target.scalar_type());
}

// Returns the class indices as the kernels read them: int64, contiguous.
inline at::Tensor kernel_class_indices(const at::Tensor& target) {
  return (target.scalar_type() == at::kLong ? target : target.to(at::kLong)).contiguous();
}

inline void check_weight_dtype(const char* op, const at::Tensor& input, const at::Tensor& weight, bool autocast) {
  // Under autocast torch casts both input and weight to float32.
  const auto type = weight.scalar_type();
  TORCH_CHECK(type == input.scalar_type() || (autocast && kernel_dtype(type).has_value() && type != at::kDouble), op,
              ": weight must have the dtype of input, ", input.scalar_type(), ", got ", type);
}

// Checks the class weights and returns them as the kernels read them: contiguous, of the accumulate type. `input` may
// be any tensor with input's dtype and device.
inline at::Tensor kernel_weight(const char* op, const at::Tensor& given, int64_t classes, const at::Tensor& input) {
  TORCH_CHECK(given.dim() == 1 && given.numel() == classes, op,
              ": weight must be 1-D with one element for each of the ", classes, " classes, got shape ", given.sizes());
  check_same_device(op, "weight", given, input);
  check_memory(op, "weight", given);
  return given.to(accumulate_type(input.scalar_type())).contiguous();
}

// Returns the element of target that has this row number, such as "target[1, 2]".
inline std::string describe_row(const at::Tensor& target, int64_t row) {
  std::string index;
  for (int64_t d = target.dim() - 1, rest = row; d >= 0; --d) {
    index = std::to_string(rest % target.size(d)) + (index.empty() ? "" : ", ") + index;
    rest /= target.size(d);
  }
  return index.empty() ? "target" : "target[" + index + "]";
}

template <typename Options>
[[noreturn]] void refuse_class_index(const char* op, const Options& o, const at::Tensor& target, int64_t row,
                                     int64_t index) {
  TORCH_CHECK_INDEX(false, op, ": ", describe_row(target, row), " is ", index, ", expected a class index in [0, ",
                    o.classes, ") or ignore_index ", o.ignore_index);
}

// `target` must be int64. It is copied to the host, which synchronises with the device.
template <typename Options>
void check_class_indices_on_host(const char* op, const Options& o, const at::Tensor& target) {
  const at::Tensor on_host = target.cpu();
  const int64_t* index = on_host.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < on_host.numel(); ++row)
    if (index[row] != o.ignore_index && (index[row] < 0 || index[row] >= o.classes))
      refuse_class_index(op, o, target, row, index[row]);
}

}  // namespace fusedloss
