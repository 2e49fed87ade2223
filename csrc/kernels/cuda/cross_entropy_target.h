// The kinds of target distributions, q in formulas/cross_entropy-inl.h, which kernels are compiled for.
#pragma once

#include <type_traits>

#include "kernels/integers.h"
#include "kernels/options.h"

namespace fusedloss::cuda {

// What the target distribution of a row is made of. The kernels are compiled for each: probabilities take registers
// that other targets can do without.
enum class TargetKind { kIndex, kSmoothedIndex, kProbabilities };

// The target distribution is not 0 outside of the target class.
FUSEDLOSS_ANYWHERE constexpr bool is_spread(TargetKind kind) { return kind != TargetKind::kIndex; }

inline TargetKind target_kind(const CrossEntropyOptions& o) {
  return o.target_probability ? TargetKind::kProbabilities
         : o.is_spread()      ? TargetKind::kSmoothedIndex
                              : TargetKind::kIndex;
}

// Calls f(integral_constant of the TargetKind).
template <typename F>
auto on_target(const CrossEntropyOptions& o, F f) {
  switch (target_kind(o)) {
    case TargetKind::kProbabilities: return f(std::integral_constant<TargetKind, TargetKind::kProbabilities>());
    case TargetKind::kSmoothedIndex: return f(std::integral_constant<TargetKind, TargetKind::kSmoothedIndex>());
    default: return f(std::integral_constant<TargetKind, TargetKind::kIndex>());
  }
}

// What the target distribution has outside of the target class. A loop over a row's classes is compiled for each of
// these: to ask at each class would cost as much as all else.
enum class SpreadKind { kNone, kUniform, kWeights, kProbabilities, kWeightedProbabilities };
FUSEDLOSS_ANYWHERE constexpr bool is_weighted(SpreadKind kind) {
  return kind == SpreadKind::kWeights || kind == SpreadKind::kWeightedProbabilities;
}
FUSEDLOSS_ANYWHERE constexpr bool is_of_probabilities(SpreadKind kind) {
  return kind == SpreadKind::kProbabilities || kind == SpreadKind::kWeightedProbabilities;
}

}  // namespace fusedloss::cuda
