"""The losses as functions, with the signatures of `torch.nn.functional`.

A call that the kernels cover goes to them: at once where it is eager, as a registered op where the compiler or a
dispatch mode must see it. Any other (a tensor subclass, a device without kernels, functorch, forward-mode AD, …) goes
to torch's own function, so that it gives what torch gives. docs/coverage.md lists which.

The `autograd.Function` of a loss is `torch::autograd::Function` in csrc/autograd/<loss>_autograd.cpp. It is compiled
and bound to Python by `torch.utils.cpp_extension`, as fusedloss/_build.py plans it.
"""

from collections.abc import Callable
from numbers import Integral

from torch import Tensor
from torch.nn import _reduction

from . import _backend, ops
from ._dispatch import NUMBER, call_torch, cross_entropy_covers, is_eager, nll_loss_covers
from .ops import torch_cross_entropy, torch_nll_loss
from .pointwise import (
    TORCHS,
    binary_cross_entropy_with_logits,
    gaussian_nll_loss,
    huber_loss,
    kl_div,
    l1_loss,
    mse_loss,
    poisson_nll_loss,
    smooth_l1_loss,
    soft_margin_loss,
)

__all__ = [
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "gaussian_nll_loss",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "mse_loss",
    "nll_loss",
    "poisson_nll_loss",
    "smooth_l1_loss",
    "soft_margin_loss",
]

INT64 = (-(2**63), 2**63 - 1)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Cross entropy between logits and targets, `torch.nn.functional.cross_entropy`, fused.

    With logits :math:`x`, :math:`m = \max_c x_c`, :math:`\ell = \log \sum_c e^{x_c - m}`, a row of weights :math:`w`
    and smoothing :math:`\epsilon`, each row's loss is

    .. math::
        \sum_c q_c \, (\ell - (x_c - m)), \qquad
        q_c = (1 - \epsilon) \, w_y [c = y] + \tfrac{\epsilon}{C} \, w_c
        \quad\text{or}\quad q_c = w_c \, ((1 - \epsilon) \, t_c + \tfrac{\epsilon}{C})

    for a class index :math:`y` or class probabilities :math:`t`; its gradient is
    :math:`p_c \sum_k q_k - q_c` with the softmax :math:`p_c = e^{x_c - m - \ell}`. 'mean' divides the sum of the rows
    by :math:`\sum w_y` over the rows kept, and for probabilities by the number of rows.

    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2015, for the smoothing; the
    one-pass softmax is Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.

    Args:
        input: logits of shape (C), (N, C) or (N, C, d1, …, dK); float32, float64, bfloat16 or float16.
        target: class indices of shape (), (N) or (N, d1, …, dK), of any integer type; or class probabilities of
            input's shape and dtype.
        weight: one weight for each class, shape (C), of input's dtype.
        size_average, reduce: deprecated; they override reduction.
        ignore_index: class index whose rows add nothing. Default -100.
        reduction: 'none', 'mean' or 'sum'. Default 'mean'.
        label_smoothing: :math:`\epsilon` in [0, 1]. Default 0.
        inplace_backward: the backward pass writes the gradient over input, which saves that much memory and the time
            to map it. input must be the result of an operation, not a leaf, and no other backward pass may need its
            values any more: autograd raises a RuntimeError where one does, a second one of this loss included. Without
            effect where the gradient is itself differentiated, where the call is a registered op (under the compiler or
            a dispatch mode), and where the kernels do not compute it. Default False.

    Returns:
        A scalar of input's dtype, or with 'none' one loss a row, in the shape of class-index targets. Under autocast
        float32 (float64 stays), as torch's.

    Raises:
        IndexError: a class index is neither in [0, C) nor ignore_index (CPU; on CUDA a device-side assertion fails).
        ValueError: the batch sizes differ, or reduction is unknown.
        TypeError: an option is of another type.
        RuntimeError: another shape, dtype or device is wrong; or inplace_backward, and input is a leaf, a view of one,
            or has elements that share memory.
        NotImplementedError: input is not of one of the four types.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if inplace_backward is not False and inplace_backward is not True:
        raise TypeError(f"cross_entropy: inplace_backward must be a bool, got {type(inplace_backward).__name__}")
    if not (type(ignore_index) is int and INT64[0] <= ignore_index <= INT64[1] and type(label_smoothing) is float):
        if not (_is_index(ignore_index) and isinstance(label_smoothing, NUMBER)):
            options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
            return call_torch(torch_cross_entropy, input, target, weight, **options)
        ignore_index, label_smoothing = int(ignore_index), float(label_smoothing)
    if is_eager((input, target), weight):
        loss: Tensor | None = _backend.extension().cross_entropy(
            input, target, weight, _reduction.get_enum(reduction), ignore_index, label_smoothing, inplace_backward
        )
        if loss is not None:
            return loss
    if cross_entropy_covers(input, target, weight):
        number = _reduction.get_enum(reduction)
        return ops.cross_entropy(input, target, weight, number, ignore_index, label_smoothing)
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    return call_torch(torch_cross_entropy, input, target, weight, **options)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative log likelihood of class indices, `torch.nn.functional.nll_loss`, fused.

    With log-probabilities :math:`x`, weights :math:`w` and a class index :math:`y`, each row's loss is
    :math:`-w_y x_y`; its gradient is :math:`-w_y` for that class and 0 for the others. 'mean' divides the sum of the
    rows by :math:`\sum w_y` over the rows kept.

    Args:
        input: log-probabilities of shape (C), (N, C) or (N, C, d1, …, dK); float32, float64, bfloat16 or float16. The
            backward pass does not need them: they may be freed, or overwritten.
        target: class indices of shape (), (N) or (N, d1, …, dK), of any integer type.
        weight: one weight for each class, shape (C), of input's dtype.
        size_average, reduce: deprecated; they override reduction.
        ignore_index: class index whose rows add nothing. Default -100.
        reduction: 'none', 'mean' or 'sum'. Default 'mean'.

    Returns:
        A scalar of input's dtype, or with 'none' one loss a row, in the shape of target. Under autocast float32
        (float64 stays), as torch's.

    Raises:
        IndexError: a class index is neither in [0, C) nor ignore_index (CPU; on CUDA a device-side assertion fails).
        ValueError: the batch sizes differ, or reduction is unknown.
        RuntimeError: another shape, dtype or device is wrong.
        NotImplementedError: input is not of one of the four types.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if not (type(ignore_index) is int and INT64[0] <= ignore_index <= INT64[1]):
        if not _is_index(ignore_index):
            return call_torch(torch_nll_loss, input, target, weight, ignore_index=ignore_index, reduction=reduction)
        ignore_index = int(ignore_index)
    if is_eager((input, target), weight):
        number = _reduction.get_enum(reduction)
        loss: Tensor | None = _backend.extension().nll_loss(input, target, weight, number, ignore_index)
        if loss is not None:
            return loss
    if nll_loss_covers(input, target, weight):
        return ops.nll_loss(input, target, weight, _reduction.get_enum(reduction), ignore_index)
    return call_torch(torch_nll_loss, input, target, weight, ignore_index=ignore_index, reduction=reduction)


def _is_index(value: object) -> bool:
    """Is it an integer that the kernels take? What else torch takes or refuses for one, it decides."""
    return isinstance(value, Integral) and not isinstance(value, bool) and INT64[0] <= int(value) <= INT64[1]


def _give_to_torchscript(torchs: Callable[..., Tensor], instead_of: Callable[..., Tensor]) -> None:
    # The attribute that torch.jit.script looks for, which no function is declared to have.
    instead_of.__prepare_scriptable__ = lambda: torchs  # type: ignore[attr-defined]


# TorchScript cannot compile a call into an extension. Asked for these functions, or what calls them, it gets torch's.
for _ours, _torchs in {cross_entropy: torch_cross_entropy, nll_loss: torch_nll_loss, **TORCHS}.items():
    _give_to_torchscript(_torchs, instead_of=_ours)
