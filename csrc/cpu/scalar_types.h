// The 16-bit types as stored, and the type each dtype is computed in.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fusedloss::cpu {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

// The statistics' type: every sum, maximum and exponential of a T is one of these.
template <typename T>
using Statistic = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace fusedloss::cpu
