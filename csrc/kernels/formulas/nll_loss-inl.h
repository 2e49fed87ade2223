// The negative log likelihood of a class index, for both devices. With the log-probability x and the weight w of the
// class:
//
//   loss = -w x,   d loss/dx = -w   and 0 for every other class
#if defined(FUSEDLOSS_NLL_LOSS_INL) == defined(FUSEDLOSS_ISA_TOGGLE)
#ifdef FUSEDLOSS_NLL_LOSS_INL
#undef FUSEDLOSS_NLL_LOSS_INL
#else
#define FUSEDLOSS_NLL_LOSS_INL
#endif

#include "kernels/device_math-inl.h"

FUSEDLOSS_BEGIN_NAMESPACE

template <typename A>
FUSEDLOSS_INLINE A nll_loss_value(A x, A w) {
  return -(w * x);
}

template <typename A>
FUSEDLOSS_INLINE A nll_loss_gradient(A w, A grad_output) {
  return -(w * grad_output);
}

FUSEDLOSS_END_NAMESPACE

#endif  // include guard
