// Single values of loss and grad_output, which are of dtype T or of the statistics' type, of any loss's options. Included
// inside the namespace of each instruction set after cpu/vec.h, so without include guard.

template <typename T, typename Options>
FUSEDLOSS_INLINE void write_loss(const Options& o, int64_t i, Statistic<T> value) {
  if (o.loss_dtype == o.dtype) {
    store_one(static_cast<T*>(o.loss) + i, value);
  } else {
    static_cast<Statistic<T>*>(o.loss)[i] = value;
  }
}

// 1 where there is none.
template <typename T, typename Options>
FUSEDLOSS_INLINE Statistic<T> read_grad_output(const Options& o, int64_t i) {
  if (o.grad_output == nullptr) return 1;
  return o.loss_dtype == o.dtype ? load_one(static_cast<const T*>(o.grad_output) + i)
                                 : static_cast<const Statistic<T>*>(o.grad_output)[i];
}
