"""The pointwise losses of torch as functions: mean squared error and its family."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction

from ._dispatch import NUMBER, call_torch, fused, is_eager, may_be_fused, named_reduction, warn
from .pointwise_registry import GAUSSIAN_CONSTANT

# torch's own functions, taken where `patch` has not replaced them.
torch_mse_loss = F.mse_loss
torch_l1_loss = F.l1_loss
torch_smooth_l1_loss = F.smooth_l1_loss
torch_huber_loss = F.huber_loss
torch_binary_cross_entropy_with_logits = F.binary_cross_entropy_with_logits
torch_kl_div = F.kl_div
torch_poisson_nll_loss = F.poisson_nll_loss
torch_gaussian_nll_loss = F.gaussian_nll_loss
torch_soft_margin_loss = F.soft_margin_loss


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Mean squared error, `torch.nn.functional.mse_loss`, fused.

    Each element's loss is :math:`(x - t)^2`, its gradient :math:`2 (x - t)` for input and the negative for target;
    'mean' divides the sum by the number of elements.

    Args:
        input: any shape; float32, float64, bfloat16 or float16.
        target: the shape of input; another that broadcasts with it works, with torch's warning.
        size_average, reduce: deprecated; they override reduction.
        reduction: 'none', 'mean' or 'sum'. Default 'mean'.
        weight: the shape of input; computed by torch's own function.

    Returns:
        A scalar of input's dtype, or with 'none' one loss an element, in the broadcast shape. Under autocast float32
        (float64 stays), as torch's.

    Raises:
        ValueError: reduction is unknown.
        RuntimeError: the shapes do not broadcast, or the devices differ.
        NotImplementedError: the dtype is none that squared errors are computed in.
    """
    reduction = named_reduction(reduction, size_average, reduce)
    if weight is None:
        loss = fused("mse_loss", (input, target), reduction, warns=True)
        if loss is not None:
            return loss
    return call_torch(torch_mse_loss, input, target, reduction=reduction, weight=weight)


def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Mean absolute error, `torch.nn.functional.l1_loss`, fused.

    Each element's loss is :math:`|x - t|`, its gradient :math:`\operatorname{sign}(x - t)` for input, 0 where both are
    equal or one is NaN, and the negative for target.

    Arguments, result and errors are those of `mse_loss`.
    """
    reduction = named_reduction(reduction, size_average, reduce)
    if weight is None:
        loss = fused("l1_loss", (input, target), reduction, warns=True)
        if loss is not None:
            return loss
    return call_torch(torch_l1_loss, input, target, reduction=reduction, weight=weight)


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    r"""Smooth L1 loss, `torch.nn.functional.smooth_l1_loss`, fused.

    With :math:`d = x - t`, each element's loss is :math:`d^2 / 2\beta` where :math:`|d| < \beta`, else
    :math:`|d| - \beta / 2`; its gradient for input is :math:`d / \beta` limited to [-1, 1], and the negative for
    target.

    Source: Girshick, "Fast R-CNN", 2015.

    Args:
        beta: where the parabola ends, in the unit of input; not negative, and 0 for `l1_loss`. Default 1.

    Other arguments, result and errors are those of `mse_loss`; a negative beta is a RuntimeError.
    """
    reduction = named_reduction(reduction, size_average, reduce)
    if isinstance(beta, NUMBER) and 0 <= beta < math.inf:
        name, parameters = ("smooth_l1_loss", (beta,)) if beta > 0 else ("l1_loss", ())
        loss = fused(name, (input, target), reduction, parameters, warns=True)
        if loss is not None:
            return loss
    return call_torch(torch_smooth_l1_loss, input, target, reduction=reduction, beta=beta)


def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    r"""Huber loss, `torch.nn.functional.huber_loss`, fused.

    With :math:`d = x - t`, each element's loss is :math:`d^2 / 2` where :math:`|d| < \delta`, else
    :math:`\delta \, (|d| - \delta / 2)`; its gradient for input is :math:`d` limited to
    :math:`[-\delta, \delta]`, and the negative for target.

    Source: Huber, "Robust Estimation of a Location Parameter", 1964.

    Args:
        delta: where the parabola ends, in the unit of input; positive. Default 1.
        weight: the shape of input; computed by torch's own function.

    Other arguments, result and errors are those of `mse_loss`; a delta that is not positive is a RuntimeError.
    """
    if weight is None and isinstance(delta, NUMBER) and 0 < delta < math.inf:
        loss = fused("huber_loss", (input, target), reduction, (delta,), warns=True)
        if loss is not None:
            return loss
    return call_torch(torch_huber_loss, input, target, reduction=reduction, delta=delta, **_if_given(weight=weight))


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    r"""Binary cross entropy of logits, `torch.nn.functional.binary_cross_entropy_with_logits`, fused.

    With the softplus :math:`s(x) = \log(1 + e^x)`, each element's loss is
    :math:`w \, ((1 - t) \, s(x) + p \, t \, s(-x))`; its gradient for input is
    :math:`w \, ((1 - t) \, \sigma(x) - p \, t \, \sigma(-x))`.

    Args:
        input: logits of any shape; float32, float64, bfloat16 or float16.
        target: probabilities, of the shape of input.
        weight: :math:`w`, of a shape that can be expanded to that of input. Default 1.
        size_average, reduce: deprecated; they override reduction.
        reduction: 'none', 'mean' or 'sum'. Default 'mean', which divides by the number of elements.
        pos_weight: :math:`p`, of a shape that can be expanded to that of input. Default 1.

    Returns:
        A scalar of input's dtype, or with 'none' one loss an element. Under autocast float32 (float64 stays), as
        torch's.
        All of input, target, weight and pos_weight receive gradients where they require them.

    Raises:
        ValueError: target has not the shape of input, or reduction is unknown.
        RuntimeError: weight or pos_weight cannot be expanded, or the devices differ.
    """
    reduction = named_reduction(reduction, size_average, reduce)
    loss = None
    if weight is None and pos_weight is None:
        loss = fused("binary_cross_entropy_with_logits", (input, target), reduction, fits=_bce_fits)
    elif may_be_fused(input, target, *(given for given in (weight, pos_weight) if given is not None)):
        one = input.new_ones(())
        operands = (input, target, one if weight is None else weight, one if pos_weight is None else pos_weight)
        loss = fused("weighted_binary_cross_entropy_with_logits", operands, reduction, fits=_bce_fits)
    if loss is not None:
        return loss
    return call_torch(
        torch_binary_cross_entropy_with_logits,
        input,
        target,
        weight=weight,
        reduction=reduction,
        pos_weight=pos_weight,
    )


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    r"""Kullback-Leibler divergence, `torch.nn.functional.kl_div`, fused.

    Each element's loss is :math:`t \, (\log t - x)`, 0 where :math:`t` is and :math:`x` is finite, or with log_target
    :math:`e^t \, (t - x)`; its gradient for input is :math:`-t` or :math:`-e^t`. As with torch's function, a target of
    probability 0 whose input is infinite gives NaN, and with log_target one of :math:`-\infty` does with any input.

    Source: Kullback and Leibler, "On Information and Sufficiency", 1951.

    Args:
        input: log-probabilities of any shape; float32, float64, bfloat16 or float16.
        target: probabilities, or log-probabilities; of a shape that broadcasts with that of input.
        size_average, reduce: deprecated; they override reduction.
        reduction: 'none', 'batchmean', 'mean' or 'sum'. 'batchmean' divides by the first size of input; 'mean', the
            default, by the number of elements, and torch's warning says that the former is meant.
        log_target: target holds log-probabilities. Default False.

    Returns and raises what `mse_loss` does.
    """
    by_name = size_average is None and reduce is None
    kind: str | None = reduction
    divisor: int | None = None
    if log_target is not False and log_target is not True:
        kind = None  # torch refuses it
    elif not by_name:
        # torch divides by the batch even where those override 'batchmean': a call for torch.
        batch = reduction == "batchmean"
        kind = None if batch else _reduction.legacy_get_string(size_average, reduce, emit_warning=False)
    elif reduction == "batchmean" and may_be_fused(input, target):
        kind, divisor = ("mean", input.shape[0]) if input.dim() > 0 else ("sum", None)
    loss = None
    if kind is not None:
        loss = fused("kl_div_log_target" if log_target else "kl_div", (input, target), kind, divisor=divisor)
    if loss is None:
        options = {"size_average": size_average, "reduce": reduce, "reduction": reduction}
        return call_torch(torch_kl_div, input, target, **options, log_target=log_target)
    if not by_name:
        named_reduction(reduction, size_average, reduce)  # for its warning
    elif reduction == "mean":
        warn(
            "reduction: 'mean' divides the total loss by both the batch size and the support size."
            "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
            "'mean' will be changed to behave the same as 'batchmean' in the next major release.",
            stacklevel=2,
        )
    return loss


def poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative log-likelihood of Poisson counts, `torch.nn.functional.poisson_nll_loss`, fused.

    Each element's loss is :math:`e^x - t x`, or :math:`x - t \log(x + \epsilon)` where input is the rate itself; full
    adds Stirling's approximation of :math:`\log t!`, :math:`t \log t - t + \tfrac12 \log 2 \pi t` where
    :math:`t > 1`.

    Args:
        input: logarithm of the rate, or with log_input=False the rate; any shape; float32, float64, bfloat16, float16.
        target: counts, of a shape that broadcasts with that of input.
        log_input: input is the logarithm of the rate. Default True.
        full: add the approximation. Default False.
        size_average, reduce: deprecated; they override reduction.
        eps: :math:`\epsilon`, added to the rate. Default 1e-8.
        reduction: 'none', 'mean' or 'sum'. Default 'mean'.

    Returns and raises what `mse_loss` does.
    """
    reduction = named_reduction(reduction, size_average, reduce)
    are_bool = type(log_input) is bool and type(full) is bool  # torch refuses another type
    if are_bool and reduction in ("none", "mean", "sum") and isinstance(eps, NUMBER):
        name = f"poisson_nll_loss{'' if log_input else '_of_rate'}{'_full' if full else ''}"
        loss = fused(name, (input, target), reduction, (eps,))
        if loss is not None:
            return loss
    options = {"log_input": log_input, "full": full, "eps": eps, "reduction": reduction}
    return call_torch(torch_poisson_nll_loss, input, target, **options)


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative log-likelihood of a normal distribution, `torch.nn.functional.gaussian_nll_loss`, fused.

    With :math:`v = \max(\mathrm{var}, \epsilon)`, each element's loss is
    :math:`\tfrac12 \, (\log v + (x - t)^2 / v)`, and with full :math:`\tfrac12 \log 2 \pi` more. The gradients are
    :math:`(x - t) / v` for input, the negative for target, and :math:`\tfrac12 \, (1 - (x - t)^2 / v) / v` for var,
    also where it is below :math:`\epsilon`.

    Source: Nix and Weigend, "Estimating the mean and variance of the target probability distribution", 1994.

    Args:
        input: means, any shape; float32, float64, bfloat16 or float16.
        target: of the shape of input, or one that broadcasts with it.
        var: variances, not negative: a number, or of input's shape, that without its last dimension, or that with one
            dimension of size 1.
        full: add the constant. Default False.
        eps: :math:`\epsilon`. Default 1e-6.
        reduction: 'none', 'mean' or 'sum'. Default 'mean'.

    Returns:
        As `mse_loss`; but of 16-bit tensors on the CPU, whose autocast does not know this loss, it stays one.

    Raises:
        ValueError: var is negative (a RuntimeError where the compiler has made a graph of it) or of another size, or
            reduction is unknown. To look for a negative var the host waits for the GPU, as with torch's function.
    """
    if (
        isinstance(var, Tensor)
        and isinstance(eps, NUMBER)
        and reduction in ("none", "mean", "sum")
        and may_be_fused(input, target, var)
        and not math.isnan(eps)
        and not _stays_16_bit(input)
    ):
        fits = var.shape == input.shape
        if not fits and var.shape == input.shape[:-1]:
            var, fits = var.unsqueeze(-1), True
        if not fits and var.dim() == input.dim():
            fits = sum(size for size, own in zip(var.shape, input.shape, strict=True) if size != own) == 1
        if fits:
            parameters = (eps, GAUSSIAN_CONSTANT if full else 0.0)
            loss = fused("gaussian_nll_loss", (input, target, var), reduction, parameters)
            if loss is not None:
                _refuse_negative(var, loss)  # after the kernels, which refuse one whose memory was freed
                return loss
    return call_torch(torch_gaussian_nll_loss, input, target, var, full=full, eps=eps, reduction=reduction)


def soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Logistic loss of two classes, `torch.nn.functional.soft_margin_loss`, fused.

    Each element's loss is :math:`\log(1 + e^{-t x})` for targets 1 and -1, its gradient for input
    :math:`-t \, \sigma(-t x)`. Computed so that it is finite where torch's overflows.

    Arguments, result and errors are those of `mse_loss`, but that the shape of target must be one that can be expanded
    to that of input, and that no warning is given where the shapes differ.
    """
    reduction = named_reduction(reduction, size_average, reduce)
    loss = fused("soft_margin_loss", (input, target), reduction, fits=lambda input, target: _can_expand(target, input))
    if loss is not None:
        return loss
    return call_torch(torch_soft_margin_loss, input, target, reduction=reduction)


def _stays_16_bit(input: Tensor) -> bool:
    """Where the other losses become float32."""
    return input.dtype.itemsize == 2 and input.is_cpu and torch.is_autocast_enabled("cpu")


def _refuse_negative(var: Tensor, loss: Tensor) -> None:
    """Raise ValueError if var has a negative element.

    A check of all of var would take as long as the loss. But the loss of a negative variance is -inf, so var is checked
    only if the loss, or its least element, is -inf or NaN.
    """
    message = "gaussian_nll_loss: var has negative entry/entries, expected none"
    if not is_eager((var,)):  # a graph looks when it runs
        torch._assert_async(~torch.any(var < 0), message)
    elif loss.numel() > 0:
        least = loss if loss.dim() == 0 else loss.detach().amin()
        if not least.item() > -math.inf and torch.any(var < 0):
            raise ValueError(message)


def _if_given(**options: Tensor | None) -> dict[str, Tensor]:
    """For arguments that an older torch does not have."""
    return {name: value for name, value in options.items() if value is not None}


def _bce_fits(input: Tensor, target: Tensor, *weights: Tensor) -> bool:
    return target.shape == input.shape and all(_can_expand(weight, input) for weight in weights)


def _can_expand(tensor: Tensor, to: Tensor) -> bool:
    more = to.dim() - tensor.dim()
    return more >= 0 and all(size in (1, other) for size, other in zip(tensor.shape, to.shape[more:], strict=True))


TORCHS: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    mse_loss: torch_mse_loss,
    l1_loss: torch_l1_loss,
    smooth_l1_loss: torch_smooth_l1_loss,
    huber_loss: torch_huber_loss,
    binary_cross_entropy_with_logits: torch_binary_cross_entropy_with_logits,
    kl_div: torch_kl_div,
    poisson_nll_loss: torch_poisson_nll_loss,
    gaussian_nll_loss: torch_gaussian_nll_loss,
    soft_margin_loss: torch_soft_margin_loss,
}
