// The kinds of target distributions (q in formulas/cross_entropy-inl.h) that the kernels are compiled for.
#pragma once

#include <type_traits>

#include "kernels/integers.h"
#include "kernels/options.h"

namespace fusedloss::cuda {

// What a row's target distribution is made from. The kernels are compiled for each kind, because probabilities take
// registers that the other kinds do not need.
enum class TargetKind { kIndex, kSmoothedIndex, kProbabilities };

// True if classes other than the target class may have a nonzero q.
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

// What q is made from outside the target class. A loop over a row's classes is compiled for each kind: to test the kind
// at each class would cost as much as the rest of the loop.
enum class SpreadKind { kNone, kUniform, kWeights, kProbabilities, kWeightedProbabilities };
FUSEDLOSS_ANYWHERE constexpr bool is_weighted(SpreadKind kind) {
  return kind == SpreadKind::kWeights || kind == SpreadKind::kWeightedProbabilities;
}
FUSEDLOSS_ANYWHERE constexpr bool is_of_probabilities(SpreadKind kind) {
  return kind == SpreadKind::kProbabilities || kind == SpreadKind::kWeightedProbabilities;
}

}  // namespace fusedloss::cuda
