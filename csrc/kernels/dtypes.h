// The types in which a tensor's elements are stored, and the type in which each of them is computed.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fusedloss {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// The 16-bit types as they are stored, for sources that have no other definition of them.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// Instances of a template, one for each stored type, in the order of DType.
#define FUSEDLOSS_FOR_EACH_DTYPE(name) \
  {name<float>, name<double>, name<::fusedloss::bfloat16>, name<::fusedloss::float16>}

// The accumulate type of a stored type T: double for double, and float for all others. Every sum, maximum and
// exponential is computed in it.
template <typename T>
using AccumulateType = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace fusedloss
