// The pointwise losses, each computed from one element of each of up to eight operands (input, target, weights, …). A
// formula is written once for the CPU and the GPU, on dual numbers, which also give its derivatives. `loss` takes first
// the operands, which are tensors, and then the parameters, each of which is one number for a whole call.
//
// To add a loss, follow the list in CONTRIBUTING.md, which begins with a struct here and its name in the list at the
// end.
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

// (input - target)^2, with half of its slope. The kernels double the product of that half and grad_output, which the
// mean has already divided: 2 (input - target) could be infinite where the final product is not.
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

// A parabola up to a distance of beta, and beyond it the line with slope 1 that continues it. The slope is written by
// hand to avoid 1 / beta, which is infinite for a subnormal beta.
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

// SmoothL1Loss times delta.
struct HuberLoss {
  static constexpr int kOperands = 2, kParameters = 1;
  template <typename V, typename X, typename T, typename P>
  static FUSEDLOSS_INLINE auto loss(X input, T target, P delta) {
    const auto distance = abs(input - target);
    return where(distance >= delta, delta * (distance - 0.5 * delta), 0.5 * distance * distance);
  }
};

// -(target log p + (1 - target) log(1 - p)) with p = sigmoid(input). Of -log p and -log(1 - p), one is
// softplus_below_0(-|input|), and the other is that plus |input|. With targets in [0, 1] no term is negative, so the
// loss is precise even if p is close to 0 or 1. The derivative by target would cancel, so its result, -input, is
// written by hand.
struct BCEWithLogitsLoss {
  static constexpr int kOperands = 2, kParameters = 0;
  template <typename V, typename X, typename T>
  static FUSEDLOSS_INLINE auto loss(X input, T target) {
    const auto size = magnitude(input);
    const auto against = where(input > 0, 1 - plain(target), plain(target));
    return with_slope(against * size + softplus_below_0(-size), -input, target);
  }
};

// BCEWithLogitsLoss with a weight for each element, and another for the positive part of its target.
struct WeightedBCEWithLogitsLoss {
  static constexpr int kOperands = 4, kParameters = 0;
  template <typename V, typename X, typename T, typename W, typename P>
  static FUSEDLOSS_INLINE auto loss(X input, T target, W weight, P pos_weight) {
    const auto size = magnitude(input);
    const auto if_0 = 1 - plain(target);
    const auto if_1 = plain(target) * pos_weight;
    const auto loss = where(input > 0, if_0, if_1) * size + (if_0 + if_1) * softplus_below_0(-size);
    // Two forms of the derivative by target: `near` does not cancel near 0, and `far` does not subtract infinities.
    const auto near = (1 - pos_weight) * logsigmoid(input) - input;
    const auto far = -(softplus(input) + pos_weight * logsigmoid(input));
    return weight * with_slope(loss, where(abs(input) < 1, near, far), target);
  }
};

// target (log target - input), where input is a log-probability; 0 if target is 0.
struct KLDivLoss {
  static constexpr int kOperands = 2, kParameters = 0;
  template <typename V, typename X, typename T>
  static FUSEDLOSS_INLINE auto loss(X input, T target) {
    return xlogy(target, target) - target * input;
  }
};

// KLDivLoss where target is a log-probability, too.
struct KLDivLogTargetLoss {
  static constexpr int kOperands = 2, kParameters = 0;
  template <typename V, typename X, typename T>
  static FUSEDLOSS_INLINE auto loss(X input, T target) {
    return exp(target) * (target - input);
  }
};

// -log P(target) of a Poisson distribution without its constant, log(target!): rate - target log(rate). If kLog, input
// is the logarithm of the rate; else it is the rate, and eps is added to it before its logarithm is taken. If kFull,
// Stirling's approximation of the constant is added for targets above 1. It is
// target log(target) - target + log(2 pi target) / 2, whose two logarithms are combined into one.
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

// -log of the normal density with mean input and variance var; `constant_part` is its constant term, or 0. A var below
// eps is raised to eps but keeps its derivative, as in torch. A negative var, and nothing else, has a loss of -inf, so
// that a sum shows whether it contains one: see _refuse_negative in fusedloss/pointwise.py.
struct GaussianNLLLoss {
  static constexpr int kOperands = 3, kParameters = 2;
  template <typename V, typename X, typename T, typename W, typename P>
  static FUSEDLOSS_INLINE auto loss(X input, T target, W var, P eps, P constant_part) {
    const auto raised = raise_to(var, eps.value);
    const auto loss = 0.5 * (log(raised) + square(input - target) / raised) + constant_part;
    return where(var < 0, constant<V>(-INFINITY), loss);
  }
};

// log(1 + e^(-target input)), where target is 1 or -1
struct SoftMarginLoss {
  static constexpr int kOperands = 2, kParameters = 0;
  template <typename V, typename X, typename T>
  static FUSEDLOSS_INLINE auto loss(X input, T target) {
    return softplus(-target * input);
  }
};

}  // namespace
FUSEDLOSS_END_NAMESPACE

// All pointwise losses, with the names that fusedloss/ uses for them.
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
