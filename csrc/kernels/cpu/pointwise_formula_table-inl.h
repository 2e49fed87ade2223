// Compiles the formulas of one file for one instruction set, as functions that the kernels of pointwise losses call for
// each block of elements. The kernels themselves do not depend on a formula. FUSEDLOSS_FORMULAS names the file: that of
// fusedloss's own losses, or one that was generated from a user's expression.
#if defined(FUSEDLOSS_POINTWISE_FORMULA_TABLE_INL) == defined(FUSEDLOSS_ISA_TOGGLE)
#ifdef FUSEDLOSS_POINTWISE_FORMULA_TABLE_INL
#undef FUSEDLOSS_POINTWISE_FORMULA_TABLE_INL
#else
#define FUSEDLOSS_POINTWISE_FORMULA_TABLE_INL
#endif

#ifndef FUSEDLOSS_FORMULAS
#define FUSEDLOSS_FORMULAS "kernels/formulas/pointwise-inl.h"
#endif

#include <algorithm>
#include <utility>

#include "kernels/cpu/math-inl.h"
#include "kernels/cpu/pointwise_formula.h"
#include "kernels/cpu/reduce-inl.h"
#include FUSEDLOSS_FORMULAS

FUSEDLOSS_BEGIN_NAMESPACE

// Operands are prefetched this many bytes ahead of the arithmetic, because the hardware prefetcher stops at the end of
// a page.
constexpr int64_t kPrefetchDistance = 4096;

// A block's arrays and parameters as local variables, which the compiler can keep in registers: it would have to assume
// that a store changes the PointwiseBlock.
template <typename F, typename A>
struct BlockArrays {
  DType dtype;
  int64_t element_bytes;
  const void* operand[F::kOperands];
  void* grad[F::kOperands];
  const A* grad_output;
  A parameter[F::kParameters + 1];
};

// Computes the vector of elements at i: returns its losses, and stores its gradients by the operands of kWrt. Both are
// computed in either pass, so that the gradients of the two passes are bitwise identical. If the losses were left out,
// the compiler would contract other operations.
template <typename F, typename A, unsigned kWrt, int... kOperand, int... kParameter>
FUSEDLOSS_INLINE auto evaluate(const BlockArrays<F, A>& b, int64_t i, int64_t grad_output_at,
                               std::integer_sequence<int, kOperand...>, std::integer_sequence<int, kParameter...>) {
  using V = typename Simd<A>::V;
  (__builtin_prefetch(static_cast<const char*>(b.operand[kOperand]) + i * b.element_bytes + kPrefetchDistance), ...);
  const auto loss = F::template loss<V>(operand<kOperand, kWrt>(load_stored<A>(b.operand[kOperand], i, b.dtype))...,
                                        Dual<V, 0>{V{} + b.parameter[kParameter]}...);
  if constexpr (kWrt != 0) {
    const V g = load(b.grad_output + grad_output_at);
    (
        [&] {
          if constexpr ((kWrt >> kOperand & 1) != 0)
            if (b.grad[kOperand] != nullptr)
              store_as<A>(b.grad[kOperand], i, gradient<F>(g, partial_by<kOperand>(loss)), b.dtype);
        }(),
        ...);
  }
  return prevent_contraction(loss.value);  // the same value whether it is then stored or summed
}

template <typename F, typename A, unsigned kWrt>
double evaluate_block(const PointwiseBlock& block) {
  using V = typename Simd<A>::V;
  constexpr int kLanes = Simd<A>::kLanes;
  BlockArrays<F, A> b;
  b.dtype = block.dtype;
  b.element_bytes = sizeof(A) == 4 && b.dtype != DType::kFloat32 ? 2 : sizeof(A);
  for (int k = 0; k < F::kOperands; ++k) {
    b.operand[k] = block.operand[k];
    if constexpr (kWrt != 0) b.grad[k] = block.grad[k];
  }
  b.grad_output = static_cast<const A*>(block.grad_output);
  for (int i = 0; i < F::kParameters; ++i) b.parameter[i] = A(block.parameter[i]);
  A* const losses = static_cast<A*>(block.loss);
  const int64_t size = block.size, grad_output_step = block.one_grad_output ? 0 : 1;
  // Eight vectors are added in the accumulate type, and the sums of eight in double.
  SumOfVectors<A> sum;
  for (int64_t i = 0; i < size;) {
    V part = {};
    for (const int64_t end = std::min(i + 8 * kLanes, size); i < end; i += kLanes) {
      const V loss = evaluate<F, A, kWrt>(b, i, i * grad_output_step, std::make_integer_sequence<int, F::kOperands>{},
                                          std::make_integer_sequence<int, F::kParameters>{});
      if (losses != nullptr) store(losses + i, loss);
      part += loss;
    }
    sum.add(part);
  }
  return losses != nullptr ? 0 : sum.value();
}

// The function for PointwiseFormula. Most calls want no gradient, or only that of the first operand, so these two cases
// are compiled separately.
template <typename F, typename A>
double on_block(const PointwiseBlock& b) {
  constexpr unsigned kFirst = 1, kAll = (1u << F::kOperands) - 1;
  if (b.wrt == 0) return evaluate_block<F, A, 0>(b);
  return b.wrt == kFirst ? evaluate_block<F, A, kFirst>(b) : evaluate_block<F, A, kAll>(b);
}

template <typename A>
struct Blocks {
#define FUSEDLOSS_BLOCK(name, Formula) static constexpr PointwiseFunction* name = &on_block<Formula, A>;
  FUSEDLOSS_POINTWISE_LOSSES(FUSEDLOSS_BLOCK)
#undef FUSEDLOSS_BLOCK
};

FUSEDLOSS_END_NAMESPACE

// The formula with this name, compiled for every instruction set.
#undef FUSEDLOSS_FORMULA_TABLE
#define FUSEDLOSS_FORMULA_TABLE(name) \
  {FUSEDLOSS_FOR_EACH_INSTRUCTION_SET(Blocks<float>::name), FUSEDLOSS_FOR_EACH_INSTRUCTION_SET(Blocks<double>::name)}

#endif  // include guard
