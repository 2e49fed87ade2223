// A formula over one block of elements: what the kernels of pointwise losses, which know no formula, call for each block.
// Included inside the namespace of each instruction set after vec.h, elementary.h and the formulas, so without include
// guard.

// The elements from i on: their losses, and their gradients by the operands of kWrt. Both are computed in either pass, so
// that its gradients have the same bits: the compiler joins other operations to one where it has less to compute.
template <typename F, typename A, unsigned kWrt, int... kOperand, int... kParameter>
FUSEDLOSS_INLINE void evaluate(const PointwiseBlock& b, const A (&parameter)[F::kParameters + 1], int64_t i,
                               std::integer_sequence<int, kOperand...>, std::integer_sequence<int, kParameter...>) {
  using V = typename Simd<A>::V;
  const auto loss = F::template loss<V>(
      operand<kOperand, kWrt>(load(static_cast<const A*>(b.operand[kOperand]) + i))...,
      Dual<V, 0>{V{} + parameter[kParameter]}...);
  store(static_cast<A*>(b.loss) + i, loss.value);
  if constexpr (kWrt != 0) {
    const V g = load(static_cast<const A*>(b.grad_output) + i);
    (
        [&] {
          if constexpr ((kWrt >> kOperand & 1) != 0)
            store(static_cast<A*>(b.grad[kOperand]) + i, gradient<F>(g, partial_by<kOperand>(loss)));
        }(),
        ...);
  }
}

template <typename F, typename A, unsigned kWrt>
void evaluate_block(const PointwiseBlock& b) {
  A parameter[F::kParameters + 1];  // not in memory that a store could change
  for (int i = 0; i < F::kParameters; ++i) parameter[i] = A(b.parameter[i]);
  for (int64_t i = 0; i < b.size; i += Simd<A>::kLanes)
    evaluate<F, A, kWrt>(b, parameter, i, std::make_integer_sequence<int, F::kOperands>{},
                         std::make_integer_sequence<int, F::kParameters>{});
}

// As PointwiseFormula has it. Mostly the gradient of the first operand is wanted, or none.
template <typename F, typename A>
void on_block(const PointwiseBlock& b) {
  constexpr unsigned kFirst = 1, kAll = (1u << F::kOperands) - 1;
  if (b.wrt == 0) {
    evaluate_block<F, A, 0>(b);
  } else if (b.wrt == kFirst) {
    evaluate_block<F, A, kFirst>(b);
  } else {
    evaluate_block<F, A, kAll>(b);
  }
}
