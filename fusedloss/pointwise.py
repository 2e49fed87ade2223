"""torch's pointwise losses as functions: mean squared error and its family."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction

from ._dispatch import NUMBER, call_torch, fused, is_eager, may_be_fused, named_reduction, warn
from .pointwise_registry import GAUSSIAN_CONSTANT

# torch's own functions, read here before `patch` can replace them.
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
    r"""Mean squared error: a fused `torch.nn.functional.mse_loss`.

    With input :math:`x` and target :math:`t`, the loss of an element is :math:`(x - t)^2`, in the unit of input
    squared. Its gradient is :math:`2 (x - t)` for input and the negative of that for target. 'mean' divides the sum by
    the number of elements.

    Source: the definition of `torch.nn.MSELoss`.

    Args:
        input: any shape; float32, float64, bfloat16 or float16.
        target: the shape of input. Another shape that broadcasts with it works too, with torch's warning.
        size_average, reduce: deprecated; they override reduction.
        reduction: 'none', 'mean' or 'sum'. Default 'mean'.
        weight: the shape of input. With a weight, torch's own function computes the loss.

    Returns:
        A scalar of input's dtype. With 'none', one loss per element, in the broadcast shape. Under autocast the result
        is float32, as in torch; a float64 input still gives float64.

    Raises:
        ValueError: reduction is unknown.
        RuntimeError: the shapes do not broadcast, or the devices differ.
        NotImplementedError: torch does not compute squared errors in this dtype.
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
    r"""Mean absolute error: a fused `torch.nn.functional.l1_loss`.

    With input :math:`x` and target :math:`t`, the loss of an element is :math:`|x - t|`, in the unit of input. Its
    gradient for input is :math:`\operatorname{sign}(x - t)`, which is 0 if both are equal or one is NaN. The gradient
    for target is the negative of that.

    Source: the definition of `torch.nn.L1Loss`.

    The arguments, the result and the errors are those of `mse_loss`.
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
    r"""Smooth L1 loss: a fused `torch.nn.functional.smooth_l1_loss`.

    With :math:`d = x - t`, the loss of an element is :math:`d^2 / 2\beta` where :math:`|d| < \beta`, else
    :math:`|d| - \beta / 2`, in the unit of input. Its gradient for input is :math:`d / \beta` clamped to [-1, 1]. The
    gradient for target is the negative of that.

    Source: Girshick, "Fast R-CNN", 2015.

    Args:
        beta: the distance at which the parabola ends, in the unit of input; not negative. 0 gives `l1_loss`. Default 1.

    The other arguments, the result and the errors are those of `mse_loss`. A negative beta is a RuntimeError.
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
    r"""Huber loss: a fused `torch.nn.functional.huber_loss`.

    With :math:`d = x - t`, the loss of an element is :math:`d^2 / 2` where :math:`|d| < \delta`, else
    :math:`\delta \, (|d| - \delta / 2)`, in the unit of input squared. Its gradient for input is :math:`d` clamped to
    :math:`[-\delta, \delta]`. The gradient for target is the negative of that.

    Source: Huber, "Robust Estimation of a Location Parameter", 1964.

    Args:
        delta: the distance at which the parabola ends, in the unit of input; positive. Default 1.
        weight: the shape of input. With a weight, torch's own function computes the loss.

    The other arguments, the result and the errors are those of `mse_loss`. A delta that is not positive is a
    RuntimeError.
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
    r"""Binary cross entropy of logits: a fused `torch.nn.functional.binary_cross_entropy_with_logits`.

    With the softplus :math:`s(x) = \log(1 + e^x)`, the loss of an element, in nats, is
    :math:`w \, ((1 - t) \, s(x) + p \, t \, s(-x))`. Its gradient for input is
    :math:`w \, ((1 - t) \, \sigma(x) - p \, t \, \sigma(-x))`. target, weight and pos_weight receive gradients too, if
    they require them.

    Source: the definition of `torch.nn.BCEWithLogitsLoss`.

    Args:
        input: logits of any shape; float32, float64, bfloat16 or float16.
        target: probabilities, of the shape of input.
        weight: :math:`w`, of a shape that can be expanded to that of input. Default 1.
        size_average, reduce: deprecated; they override reduction.
        reduction: 'none', 'mean' or 'sum'. The default, 'mean', divides by the number of elements.
        pos_weight: :math:`p`, of a shape that can be expanded to that of input. Default 1.

    Returns:
        A scalar of input's dtype. With 'none', one loss per element. Under autocast the result is float32, as in torch;
        a float64 input still gives float64.

    Raises:
        ValueError: target does not have the shape of input, or reduction is unknown.
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
    r"""Kullback-Leibler divergence: a fused `torch.nn.functional.kl_div`.

    The loss of an element, in nats, is :math:`t \, (\log t - x)`, or with log_target :math:`e^t \, (t - x)`. Its
    gradient for input is :math:`-t` or :math:`-e^t`. A probability :math:`t = 0` gives the loss 0 if :math:`x` is
    finite and, as in torch, NaN if it is infinite. With log_target, :math:`t = -\infty` gives NaN for any :math:`x`, as
    in torch.

    Source: Kullback and Leibler, "On Information and Sufficiency", 1951.

    Args:
        input: log-probabilities of any shape; float32, float64, bfloat16 or float16.
        target: probabilities, or with log_target their logarithms, of a shape that broadcasts with that of input.
        size_average, reduce: deprecated; they override reduction.
        reduction: 'none', 'batchmean', 'mean' or 'sum'. 'batchmean' divides by the first size of input. The default,
            'mean', divides by the number of elements and warns, as torch does, that 'batchmean' is the divergence.
        log_target: if True, target holds log-probabilities. Default False.

    The result and the errors are those of `mse_loss`.
    """
    by_name = size_average is None and reduce is None
    kind: str | None = reduction
    divisor: int | None = None
    if log_target is not False and log_target is not True:
        kind = None  # torch refuses it
    elif not by_name:
        # torch divides by the batch even where size_average and reduce override 'batchmean': leave that call to torch.
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
        named_reduction(reduction, size_average, reduce)  # only to give torch's warning
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
    r"""Negative log likelihood of Poisson counts: a fused `torch.nn.functional.poisson_nll_loss`.

    The loss of an element, in nats, is :math:`e^x - t x`, or :math:`x - t \log(x + \epsilon)` with log_input=False.
    Where :math:`t > 1`, full adds Stirling's approximation of :math:`\log t!`, which is
    :math:`t \log t - t + \tfrac12 \log 2 \pi t`. The gradient for input is :math:`e^x - t`, or
    :math:`1 - t / (x + \epsilon)`.

    Source: the definition of `torch.nn.PoissonNLLLoss`.

    Args:
        input: the logarithm of the rate, or with log_input=False the rate; any shape; float32, float64, bfloat16 or
            float16.
        target: counts, of a shape that broadcasts with that of input.
        log_input: if True, input is the logarithm of the rate. Default True.
        full: if True, add the approximation. Default False.
        size_average, reduce: deprecated; they override reduction.
        eps: :math:`\epsilon`, which is added to the rate inside the logarithm. Default 1e-8.
        reduction: 'none', 'mean' or 'sum'. Default 'mean'.

    The result and the errors are those of `mse_loss`.
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
    r"""Negative log likelihood of a normal distribution: a fused `torch.nn.functional.gaussian_nll_loss`.

    With :math:`v = \max(\mathrm{var}, \epsilon)`, the loss of an element, in nats, is
    :math:`\tfrac12 \, (\log v + (x - t)^2 / v)`; full adds :math:`\tfrac12 \log 2 \pi`. The gradients are
    :math:`(x - t) / v` for input, the negative of that for target, and :math:`\tfrac12 \, (1 - (x - t)^2 / v) / v` for
    var, even where var is below :math:`\epsilon`.

    Source: Nix and Weigend, "Estimating the mean and variance of the target probability distribution", 1994.

    Args:
        input: means, of any shape; float32, float64, bfloat16 or float16.
        target: observed values, of the shape of input or one that broadcasts with it.
        var: variances in the unit of input squared, not negative. Either a number or a tensor, whose shape is that of
            input, that of input without its last dimension, or that of input with one dimension of size 1.
        full: if True, add the constant. Default False.
        eps: :math:`\epsilon`, the least variance. Default 1e-6.
        reduction: 'none', 'mean' or 'sum'. Default 'mean'.

    Returns:
        What `mse_loss` returns, with one exception: for 16-bit tensors on the CPU the result keeps their dtype under
        autocast, because torch's CPU autocast does not cover this loss.

    Raises:
        ValueError: var has a negative element or a shape other than these, or reduction is unknown. In a compiled graph
            a negative var is a RuntimeError. To look for one, the host waits for the GPU, as in torch's function.
        RuntimeError: the shapes of input and target do not broadcast, or the devices differ.
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
                _refuse_negative(var, loss)  # after the kernels, which refuse a var whose memory was freed
                return loss
    return call_torch(torch_gaussian_nll_loss, input, target, var, full=full, eps=eps, reduction=reduction)


def soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Logistic loss of two classes: a fused `torch.nn.functional.soft_margin_loss`.

    With targets :math:`t` of 1 and -1, the loss of an element, in nats, is :math:`\log(1 + e^{-t x})`. Its gradient for
    input is :math:`-t \, \sigma(-t x)`. The computation stays finite where torch's overflows.

    Source: the definition of `torch.nn.SoftMarginLoss`.

    The arguments, the result and the errors are those of `mse_loss`, with two exceptions: the shape of target must be
    one that can be expanded to that of input, and different shapes give no warning.
    """
    reduction = named_reduction(reduction, size_average, reduce)
    loss = fused("soft_margin_loss", (input, target), reduction, fits=lambda input, target: _can_expand(target, input))
    if loss is not None:
        return loss
    return call_torch(torch_soft_margin_loss, input, target, reduction=reduction)


def _stays_16_bit(input: Tensor) -> bool:
    """True if torch keeps the dtype of this input under autocast; the other losses become float32."""
    return input.dtype.itemsize == 2 and input.is_cpu and torch.is_autocast_enabled("cpu")


def _refuse_negative(var: Tensor, loss: Tensor) -> None:
    """Raise ValueError if var has a negative element.

    Checking all of var would take as long as the loss itself. But a negative variance makes the loss -inf, so var is
    checked only if the loss, or its least element, is -inf or NaN.
    """
    message = "gaussian_nll_loss: var has negative entry/entries, expected none"
    if not is_eager((var,)):  # a graph checks when it runs
        torch._assert_async(~torch.any(var < 0), message)
    elif loss.numel() > 0:
        least = loss if loss.dim() == 0 else loss.detach().amin()
        if not least.item() > -math.inf and torch.any(var < 0):
            raise ValueError(message)


def _if_given(**options: Tensor | None) -> dict[str, Tensor]:
    """The options that are not None: an older torch does not have these arguments."""
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
