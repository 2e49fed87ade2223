// The types that a tensor's elements are stored in, and the type that each is computed in.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fusedloss {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// The 16-bit types as they are stored, for sources that have no others.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// What a template on the stored type is for each DType, in its order.
#define FUSEDLOSS_FOR_EACH_DTYPE(name) \
  {name<float>, name<double>, name<::fusedloss::bfloat16>, name<::fusedloss::float16>}

// The accumulate type of a stored type T: every sum, maximum and exponential is computed in it. It is double for
// double, and float for the others.
template <typename T>
using AccumulateType = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace fusedloss
