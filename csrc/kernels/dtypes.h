// The types that a tensor's elements are stored in, and the type that each is computed in.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fusedloss {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// The accumulate type of a stored type T: every sum, maximum and exponential is computed in it. It is double for double,
// and float for the others.
template <typename T>
using AccumulateType = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace fusedloss
