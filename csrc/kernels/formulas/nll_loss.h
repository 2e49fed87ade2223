// The negative log likelihood of a class index, for both devices: of its log-probability x and its weight w
//
//   loss = -w x,   d loss/dx = -w   and 0 for every other class
//
// No include guard and no includes, as in formulas/cross_entropy.h, which has the mean's division.

template <typename A>
FUSEDLOSS_INLINE A nll_loss_value(A x, A w) {
  return -(w * x);
}

template <typename A>
FUSEDLOSS_INLINE A nll_loss_gradient(A w, A grad_output) {
  return -(w * grad_output);
}
