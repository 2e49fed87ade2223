// The one switch on dtype of the CUDA branch, for files that know CUDA's 16-bit types and for those that do not.
#pragma once

#include <type_traits>

#include "kernels/options.h"

namespace fusedloss::cuda {

// Calls f with dtype as a constant: on_dtype_constant(dtype, [&](auto constant) { … decltype(constant)::value … }).
template <typename F>
auto on_dtype_constant(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(std::integral_constant<DType, DType::kFloat64>());
    case DType::kBFloat16:
      return f(std::integral_constant<DType, DType::kBFloat16>());
    case DType::kFloat16:
      return f(std::integral_constant<DType, DType::kFloat16>());
    default:
      return f(std::integral_constant<DType, DType::kFloat32>());
  }
}

}  // namespace fusedloss::cuda
