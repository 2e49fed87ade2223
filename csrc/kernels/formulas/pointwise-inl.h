// The family of losses with one element each of input and target. A formula is written once: on dual numbers it gives
// its derivatives too, on the CPU and on the GPU. `loss` takes the operands, which are tensors, and then the
// parameters, which are one number for a call.
//
// A new loss is a struct here, its name in the list at the end, and its function and module in fusedloss/.
#if defined(FUSEDLOSS_POINTWISE_INL) == defined(FUSEDLOSS_ISA_TOGGLE)
#ifdef FUSEDLOSS_POINTWISE_INL
#undef FUSEDLOSS_POINTWISE_INL
#else
#define FUSEDLOSS_POINTWISE_INL
#endif

#include <cmath>

#include "kernels/formulas/dual_functions-inl.h"

FUSEDLOSS_BEGIN_NAMESPACE
namespace {

// (input - target)^2, with half of its slope: the kernels double the product with grad_output, which the mean has
// divided. 2 (input - target) would be infinite where that product is not.
struct MSELoss {
  static constexpr int kOperands = 2, kParameters = 0;
  static constexpr bool kHasHalfSlope = true;
  template <typename V, typename X, typename T>
  static FUSEDLOSS_INLINE auto loss(X input, T target) {
    const auto difference = input - target;
    return with_slope(square(plain(difference)), plain(difference), difference);
  }
};

// |input - target|
struct L1Loss {
  static constexpr int kOperands = 2, kParameters = 0;
  template <typename V, typename X, typename T>
  static FUSEDLOSS_INLINE auto loss(X input, T target) {
    return abs(input - target);
  }
};

// A parabola within beta, and beyond it the line with slope 1 that continues it. The slope is given by hand, so that it
// has no 1/beta in it, which is infinite for a subnormal beta.
struct SmoothL1Loss {
  static constexpr int kOperands = 2, kParameters = 1;
  template <typename V, typename X, typename T, typename P>
  static FUSEDLOSS_INLINE auto loss(X input, T target, P beta) {
    const auto distance = abs(input - target);
    const auto size = plain(distance), ratio = size / beta;
    const auto is_far = size >= beta;
    const auto loss = where(is_far, size - 0.5 * beta, 0.5 * size * ratio);
    return with_slope(loss, where(is_far, constant<V>(1), ratio), distance);
  }
};

// The same, times delta.
struct HuberLoss {
  static constexpr int kOperands = 2, kParameters = 1;
  template <typename V, typename X, typename T, typename P>
  static FUSEDLOSS_INLINE auto loss(X input, T target, P delta) {
    const auto distance = abs(input - target);
    return where(distance >= delta, delta * (distance - 0.5 * delta), 0.5 * distance * distance);
  }
};

// -(target log p + (1 - target) log(1 - p)) with p = sigmoid(input). Of log p and log(1 - p), one is the logarithm that
// softplus_below_0 gives, and the other is that and |input|: with targets in [0, 1] all terms are positive, so that the
// loss is precise however sure p is. The derivative by target would cancel, and is given as what it comes to.
struct BCEWithLogitsLoss {
  static constexpr int kOperands = 2, kParameters = 0;
  template <typename V, typename X, typename T>
  static FUSEDLOSS_INLINE auto loss(X input, T target) {
    const auto size = magnitude(input);
    const auto against = where(input > 0, 1 - plain(target), plain(target));
    return with_slope(against * size + softplus_below_0(-size), -input, target);
  }
};

// The same with a weight for each element, and another for its positive part.
struct WeightedBCEWithLogitsLoss {
  static constexpr int kOperands = 4, kParameters = 0;
  template <typename V, typename X, typename T, typename W, typename P>
  static FUSEDLOSS_INLINE auto loss(X input, T target, W weight, P pos_weight) {
    const auto size = magnitude(input);
    const auto if_0 = 1 - plain(target);
    const auto if_1 = plain(target) * pos_weight;
    const auto loss = where(input > 0, if_0, if_1) * size + (if_0 + if_1) * softplus_below_0(-size);
    // The same twice: one does not cancel near 0, the other is no difference of infinities.
    const auto near = (1 - pos_weight) * logsigmoid(input) - input;
    const auto far = -(softplus(input) + pos_weight * logsigmoid(input));
    return weight * with_slope(loss, where(abs(input) < 1, near, far), target);
  }
};

// target (log target - input), where input is a log-probability; 0 where target is.
struct KLDivLoss {
  static constexpr int kOperands = 2, kParameters = 0;
  template <typename V, typename X, typename T>
  static FUSEDLOSS_INLINE auto loss(X input, T target) {
    return xlogy(target, target) - target * input;
  }
};

// The same, where target is a log-probability too.
struct KLDivLogTargetLoss {
  static constexpr int kOperands = 2, kParameters = 0;
  template <typename V, typename X, typename T>
  static FUSEDLOSS_INLINE auto loss(X input, T target) {
    return exp(target) * (target - input);
  }
};

// -log P(target) of a Poisson distribution without its constant, log(target!): rate - target log(rate). input is the
// logarithm of the rate, or (kLog false) the rate, to which eps is added before its logarithm is taken. kFull: with
// Stirling's approximation of the constant, for targets above 1: target log(target) - target + log(2 pi target) / 2,
// the logarithms joined into one.
template <bool kLog, bool kFull>
struct PoissonNLLLossOf {
  static constexpr int kOperands = 2, kParameters = 1;
  template <typename V, typename X, typename T, typename P>
  static FUSEDLOSS_INLINE auto loss(X input, T target, P eps) {
    if constexpr (kFull) {
      const auto stirling = (target + 0.5) * log(target) - target + 0.9189385332046727;
      return variable_part<V>(input, target, eps) + where(target <= 1, constant<V>(0), stirling);
    } else {
      return variable_part<V>(input, target, eps);
    }
  }

 private:
  template <typename V, typename X, typename T, typename P>
  static FUSEDLOSS_INLINE auto variable_part(X input, T target, P eps) {
    if constexpr (kLog) {
      return exp(input) - target * input;
    } else {
      return input - target * log(input + eps);
    }
  }
};
using PoissonNLLLoss = PoissonNLLLossOf<true, false>;
using PoissonNLLFullLoss = PoissonNLLLossOf<true, true>;
using PoissonNLLRateLoss = PoissonNLLLossOf<false, false>;
using PoissonNLLRateFullLoss = PoissonNLLLossOf<false, true>;

// -log of the normal density with mean input and variance var, up to `constant_part`. A var below eps counts as eps,
// but keeps its derivative, as torch has it. The loss of a negative var is -inf, which no other is, so that a sum shows
// whether it contains one: see _refuse_negative in fusedloss/pointwise.py.
struct GaussianNLLLoss {
  static constexpr int kOperands = 3, kParameters = 2;
  template <typename V, typename X, typename T, typename W, typename P>
  static FUSEDLOSS_INLINE auto loss(X input, T target, W var, P eps, P constant_part) {
    const auto raised = raise_to(var, eps.value);
    const auto loss = 0.5 * (log(raised) + square(input - target) / raised) + constant_part;
    return where(var < 0, constant<V>(-INFINITY), loss);
  }
};

// log(1 + e^(-target input)), target being 1 or -1
struct SoftMarginLoss {
  static constexpr int kOperands = 2, kParameters = 0;
  template <typename V, typename X, typename T>
  static FUSEDLOSS_INLINE auto loss(X input, T target) {
    return softplus(-target * input);
  }
};

}  // namespace
FUSEDLOSS_END_NAMESPACE

// All of them, by the names that fusedloss/ knows them by.
#define FUSEDLOSS_POINTWISE_LOSSES(X)                                     \
  X(mse_loss, MSELoss)                                                    \
  X(l1_loss, L1Loss)                                                      \
  X(smooth_l1_loss, SmoothL1Loss)                                         \
  X(huber_loss, HuberLoss)                                                \
  X(binary_cross_entropy_with_logits, BCEWithLogitsLoss)                  \
  X(weighted_binary_cross_entropy_with_logits, WeightedBCEWithLogitsLoss) \
  X(kl_div, KLDivLoss)                                                    \
  X(kl_div_log_target, KLDivLogTargetLoss)                                \
  X(poisson_nll_loss, PoissonNLLLoss)                                     \
  X(poisson_nll_loss_full, PoissonNLLFullLoss)                            \
  X(poisson_nll_loss_of_rate, PoissonNLLRateLoss)                         \
  X(poisson_nll_loss_of_rate_full, PoissonNLLRateFullLoss)                \
  X(gaussian_nll_loss, GaussianNLLLoss)                                   \
  X(soft_margin_loss, SoftMarginLoss)

#endif  // include guard
