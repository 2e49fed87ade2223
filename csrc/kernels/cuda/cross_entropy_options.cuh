// The parameter of every cross entropy kernel, and the target of a row, whatever the layout of the logits.
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

// The options and the plan, as a kernel receives them.
template <typename T>
struct TypedOptions : CrossEntropyOptions {
  using A = AccumulateType<T>;

  explicit TypedOptions(const CrossEntropyOptions& o, const RowPlan& p)
      : CrossEntropyOptions(o), plan(p), smoothing(make_smoothing<A>(o.label_smoothing, o.classes)) {}

  RowPlan plan;
  Smoothing<A> smoothing;

  // Returns the target class, or -1 if there is none: the target is ignore_index, or it is out of range. An assert at
  // the end of the kernel reports the latter.
  __device__ __forceinline__ int class_of(int64_t index) const {
    return index == ignore_index || uint64_t(index) >= uint64_t(classes) ? -1 : int(index);
  }
  // The row's entry in target_index; -1, which is no class, for class probabilities and past the last row.
  __device__ __forceinline__ int64_t target_at(int64_t row) const {
    return target_index && row < plan.rows ? target_index[row] : -1;
  }
  __device__ __forceinline__ A weight_of(int c) const { return weight ? static_cast<const A*>(weight)[c] : A(1); }
  __device__ __forceinline__ A weight_sum() const {
    const void* const sum = CrossEntropyOptions::weight_sum;
    return sum ? *static_cast<const A*>(sum) : A(classes);
  }
  // Multiplies grad_output by what the reduction applies to each row's loss: the mean divides by total_weight. With
  // class probabilities each row has weight 1.
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

// The target of one row.
template <typename T, TargetKind kTarget>
struct RowTarget {
  using A = AccumulateType<T>;

  const TypedOptions<T>& o;
  const int64_t number;
  const int y;  // the target class; -1 for probabilities, and if there is none
  const A w_y;  // the weight of class y

  __device__ __forceinline__ RowTarget(const TypedOptions<T>& options, int64_t row, int target)
      : o(options), number(row), y(target), w_y(y < 0 ? A(0) : o.weight_of(y)) {}

  __device__ __forceinline__ bool has_probabilities() const { return kTarget == TargetKind::kProbabilities; }
  // False for an ignored row, which adds nothing to the loss. The kernels for longer rows do not even read its logits.
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
