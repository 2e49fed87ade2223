// What every cross entropy kernel is given, and what it asks of a row wherever the row's logits lie.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/cross_entropy_plan.h"
#include "kernels/cuda/cross_entropy_target.h"
#include "kernels/cuda/math.cuh"
#include "kernels/dtypes.h"
#include "kernels/formulas/cross_entropy-inl.h"
#include "kernels/options.h"

namespace fusedloss::cuda {

// A kernel's parameter.
template <typename T>
struct TypedOptions : CrossEntropyOptions {
  using A = AccumulateType<T>;

  explicit TypedOptions(const CrossEntropyOptions& o, const RowPlan& p)
      : CrossEntropyOptions(o), plan(p), smoothing(make_smoothing<A>(o.label_smoothing, o.classes)) {}

  RowPlan plan;
  Smoothing<A> smoothing;

  // -1 where there is none: the target is ignored or, behind an assert, out of range.
  __device__ __forceinline__ int class_of(int64_t index) const {
    return index == ignore_index || uint64_t(index) >= uint64_t(classes) ? -1 : int(index);
  }
  // What stands in the target for a row; something that is no class for probabilities, and behind the last row.
  __device__ __forceinline__ int64_t target_at(int64_t row) const {
    return target_index && row < plan.rows ? target_index[row] : -1;
  }
  __device__ __forceinline__ A weight_of(int c) const { return weight ? static_cast<const A*>(weight)[c] : A(1); }
  __device__ __forceinline__ A weight_sum() const {
    const void* const sum = CrossEntropyOptions::weight_sum;
    return sum ? *static_cast<const A*>(sum) : A(classes);
  }
  // What a row's loss is multiplied by: grad_output, which the mean divides. With probabilities each row weighs 1.
  __device__ __forceinline__ A scale_grad_output(A grad_output) const {
    if (reduction != Reduction::kMean) return grad_output;
    return divide_by_total_weight(grad_output,
                                  target_probability ? A(plan.rows) : *static_cast<const A*>(total_weight));
  }
};

// Calls f(integral_constant of the SpreadKind).
template <TargetKind kTarget, typename T, typename F>
__device__ __forceinline__ void on_spread(const TypedOptions<T>& o, F f) {
  if constexpr (!is_spread(kTarget)) {
    f(std::integral_constant<SpreadKind, SpreadKind::kNone>());
  } else if constexpr (kTarget == TargetKind::kProbabilities) {
    if (o.weight != nullptr) f(std::integral_constant<SpreadKind, SpreadKind::kWeightedProbabilities>());
    else f(std::integral_constant<SpreadKind, SpreadKind::kProbabilities>());
  } else {
    if (o.weight != nullptr) f(std::integral_constant<SpreadKind, SpreadKind::kWeights>());
    else f(std::integral_constant<SpreadKind, SpreadKind::kUniform>());
  }
}

// A row's target.
template <typename T, TargetKind kTarget>
struct RowTarget {
  using A = AccumulateType<T>;

  const TypedOptions<T>& o;
  const int64_t number;
  const int y;  // the target class; -1 for probabilities, and where there is none
  const A w_y;  // its weight

  __device__ __forceinline__ RowTarget(const TypedOptions<T>& options, int64_t row, int target)
      : o(options), number(row), y(target), w_y(y < 0 ? A(0) : o.weight_of(y)) {}

  __device__ __forceinline__ bool has_probabilities() const { return kTarget == TargetKind::kProbabilities; }
  // Whether the row contributes to the loss; an ignored row does not. A row of some length is then not even read.
  __device__ __forceinline__ bool contributes() const { return has_probabilities() || y >= 0; }
  // q of the target class.
  __device__ __forceinline__ A coefficient() const {
    return is_spread(kTarget) ? index_coefficient(w_y, o.smoothing) : math::rounded_product(o.smoothing.kept, w_y);
  }
  // row_scale: sum(q) / sum(exp(x - max)).
  __device__ __forceinline__ A scale_of(const RowState<A>& state) const {
    const A mass = has_probabilities()  ? state.mass
                   : is_spread(kTarget) ? index_mass(w_y, o.weight_sum(), o.smoothing)
                                        : w_y;
    return math::divide_closely_by_moderate(mass, state.sum);
  }
};

}  // namespace fusedloss::cuda
