// The type that each stored type is computed in.
#pragma once

#include <type_traits>

namespace fusedloss {

// Every sum, maximum and exponential of a T is one of these.
template <typename T>
using Statistic = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace fusedloss
