// Reads and writes values of loss and grad_output, for the options of any loss. They have type T or the accumulate
// type.
#if defined(FUSEDLOSS_LOSS_VALUES_INL) == defined(FUSEDLOSS_ISA_TOGGLE)
#ifdef FUSEDLOSS_LOSS_VALUES_INL
#undef FUSEDLOSS_LOSS_VALUES_INL
#else
#define FUSEDLOSS_LOSS_VALUES_INL
#endif

#include "kernels/cpu/reduce-inl.h"
#include "kernels/cpu/vec-inl.h"
#include "kernels/formulas/cross_entropy-inl.h"
#include "kernels/options.h"

FUSEDLOSS_BEGIN_NAMESPACE

template <typename T, typename Options>
FUSEDLOSS_INLINE void write_loss(const Options& o, int64_t i, AccumulateType<T> value) {
  if (o.loss_dtype == o.dtype) {
    store_one(static_cast<T*>(o.loss) + i, value);
  } else {
    static_cast<AccumulateType<T>*>(o.loss)[i] = value;
  }
}

// Writes the losses of n neighbouring rows or elements.
template <bool kWhole, typename T, typename Options>
FUSEDLOSS_INLINE void write_losses(const Options& o, int64_t i, VectorOf<T> values, int n) {
  if (o.loss_dtype == o.dtype) {
    store_lanes<kWhole>(static_cast<T*>(o.loss) + i, values, n);
  } else {
    store_lanes<kWhole>(static_cast<AccumulateType<T>*>(o.loss) + i, values, n);
  }
}

// Writes the mean or the sum of all rows' losses, rounded once.
template <typename T, typename Options>
void write_reduced_loss(const Options& o, const ChunkResult& all) {
  if (o.reduction == Reduction::kNone) return;
  double loss = total(all.loss);
  if (o.reduction == Reduction::kMean) loss = divide_by_total_weight(loss, total(all.target_weight));
  write_loss<T>(o, 0, AccumulateType<T>(loss));
}

template <typename T, typename Options>
void write_total_weight(const Options& o, const ChunkResult& all) {
  *static_cast<AccumulateType<T>*>(o.total_weight) = AccumulateType<T>(total(all.target_weight));
}

// grad_output of row or element i, or 1 if there is no grad_output.
template <typename T, typename Options>
FUSEDLOSS_INLINE AccumulateType<T> read_grad_output(const Options& o, int64_t i) {
  if (o.grad_output == nullptr) return 1;
  i *= o.grad_output_stride;
  return o.loss_dtype == o.dtype ? load_one(static_cast<const T*>(o.grad_output) + i)
                                 : static_cast<const AccumulateType<T>*>(o.grad_output)[i];
}

// grad_output of n neighbouring rows or elements, each of which has its own.
template <bool kWhole, typename T, typename Options>
FUSEDLOSS_INLINE VectorOf<T> read_grad_outputs(const Options& o, int64_t i, int n) {
  return o.loss_dtype == o.dtype ? load_lanes<kWhole>(static_cast<const T*>(o.grad_output) + i, n)
                                 : load_lanes<kWhole>(static_cast<const AccumulateType<T>*>(o.grad_output) + i, n);
}

FUSEDLOSS_END_NAMESPACE

#endif  // include guard
