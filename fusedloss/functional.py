"""The losses as functions, with the signatures of `torch.nn.functional`.

The kernels compute every call that they support. An eager call goes to them directly. Where the compiler or a dispatch
mode must see the call, it becomes a registered op. Every other call (a tensor subclass, a device without kernels,
functorch, forward-mode AD, …) goes to torch's own function, so the result is torch's. docs/coverage.md lists which call
goes where.

The `autograd.Function` of a loss is the `torch::autograd::Function` in csrc/autograd/<loss>_autograd.cpp.
`torch.utils.cpp_extension` compiles it and binds it to Python; fusedloss/_build.py gives it the sources and flags.
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
    r"""Cross entropy between logits and targets: a fused `torch.nn.functional.cross_entropy`.

    With logits :math:`x`, :math:`m = \max_c x_c`, :math:`\ell = \log \sum_c e^{x_c - m}`, class weights :math:`w` and
    smoothing :math:`\epsilon`, the loss of a row, in nats, is

    .. math::
        \sum_c q_c \, (\ell - (x_c - m)), \qquad
        q_c = (1 - \epsilon) \, w_y [c = y] + \tfrac{\epsilon}{C} \, w_c
        \quad\text{or}\quad q_c = w_c \, ((1 - \epsilon) \, t_c + \tfrac{\epsilon}{C})

    for a class index :math:`y` (first form) or class probabilities :math:`t` (second form). Its gradient for
    :math:`x_c` is :math:`p_c \sum_k q_k - q_c`, with the softmax :math:`p_c = e^{x_c - m - \ell}`. For class indices,
    'mean' divides the sum over the rows by :math:`\sum w_y` over the rows that are not ignored; for probabilities, it
    divides by the number of rows.

    Sources: the definition is that of `torch.nn.CrossEntropyLoss`. The smoothing is from Szegedy et al., "Rethinking
    the Inception Architecture for Computer Vision", 2015, and the one-pass softmax from Milakov and Gimelshein, "Online
    normalizer calculation for softmax", 2018.

    Args:
        input: logits of shape (C), (N, C) or (N, C, d1, …, dK); float32, float64, bfloat16 or float16.
        target: class indices of shape (), (N) or (N, d1, …, dK) and of any integer type, or class probabilities of
            input's shape and dtype.
        weight: one weight per class, of shape (C) and input's dtype. Default: 1 for every class.
        size_average, reduce: deprecated; they override reduction.
        ignore_index: the rows of this class index add nothing to the loss or the gradient. Default -100.
        reduction: 'none', 'mean' or 'sum'. Default 'mean'.
        label_smoothing: :math:`\epsilon` in [0, 1]. Default 0.
        inplace_backward: if True, the backward pass overwrites input with the gradient, which saves the gradient's
            memory and the time to map it. input must be the result of an operation, not a leaf. No other backward pass
            may still need its values: if one does, a second backward pass of this loss included, autograd raises a
            RuntimeError. The option has no effect if the gradient is itself differentiated, if the call is a registered
            op (under the compiler or a dispatch mode), or if the kernels do not compute the loss. Default False.

    Returns:
        A scalar of input's dtype. With 'none', one loss per row, in the shape that class-index targets have. Under
        autocast the result is float32, as in torch; a float64 input still gives float64.

    Raises:
        IndexError: a class index is neither in [0, C) nor ignore_index. This is for the CPU; on CUDA a device-side
            assertion fails, unless `fusedloss.debug` is on.
        ValueError: the batch sizes differ, or reduction is unknown.
        TypeError: an option has the wrong type.
        RuntimeError: another shape, a dtype or a device is wrong; or inplace_backward is True and input is a leaf, is a
            view of a leaf, or has elements that share memory.
        NotImplementedError: input has none of the four dtypes.
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
    r"""Negative log likelihood of class indices: a fused `torch.nn.functional.nll_loss`.

    With log-probabilities :math:`x`, class weights :math:`w` and a class index :math:`y`, the loss of a row, in nats,
    is :math:`-w_y x_y`. Its gradient is :math:`-w_y` for class :math:`y` and 0 for the others. 'mean' divides the sum
    over the rows by :math:`\sum w_y` over the rows that are not ignored.

    Source: the definition of `torch.nn.NLLLoss`.

    Args:
        input: log-probabilities of shape (C), (N, C) or (N, C, d1, …, dK); float32, float64, bfloat16 or float16. The
            backward pass does not read them, so they may be freed or overwritten before it.
        target: class indices of shape (), (N) or (N, d1, …, dK) and of any integer type.
        weight: one weight per class, of shape (C) and input's dtype. Default: 1 for every class.
        size_average, reduce: deprecated; they override reduction.
        ignore_index: the rows of this class index add nothing to the loss or the gradient. Default -100.
        reduction: 'none', 'mean' or 'sum'. Default 'mean'.

    Returns:
        A scalar of input's dtype. With 'none', one loss per row, in the shape of target. Under autocast the result is
        float32, as in torch; a float64 input still gives float64.

    Raises:
        IndexError: a class index is neither in [0, C) nor ignore_index. This is for the CPU; on CUDA a device-side
            assertion fails, unless `fusedloss.debug` is on.
        ValueError: the batch sizes differ, or reduction is unknown.
        RuntimeError: another shape, a dtype or a device is wrong.
        NotImplementedError: input has none of the four dtypes.
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
    """True for an integer of 64 bits. torch decides about every other value: it may accept or refuse it."""
    return isinstance(value, Integral) and not isinstance(value, bool) and INT64[0] <= int(value) <= INT64[1]


def _give_to_torchscript(torchs: Callable[..., Tensor], instead_of: Callable[..., Tensor]) -> None:
    # The attribute that torch.jit.script looks for, which no function is declared to have.
    instead_of.__prepare_scriptable__ = lambda: torchs  # type: ignore[attr-defined]


# TorchScript cannot compile a call into an extension. It compiles torch's functions in place of these.
for _ours, _torchs in {cross_entropy: torch_cross_entropy, nll_loss: torch_nll_loss, **TORCHS}.items():
    _give_to_torchscript(_torchs, instead_of=_ours)
