"""The losses as functions, with the signatures of `torch.nn.functional`.

A call that the kernels cover goes to them: at once where it is eager, as a registered op where the compiler or a
dispatch mode must see it. Any other (a tensor subclass, a device without kernels, functorch, forward-mode AD, …) goes
to torch's own function, so that it gives what torch gives. docs/coverage.md lists which.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, _reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _backend, ops
from .ops import torch_cross_entropy, torch_mse_loss


def _is_eager(input: object, target: object, weight: object = None) -> bool:
    """May the kernels look at these, or even be compiled to do so? They then decide for themselves."""
    return (
        not torch.compiler.is_compiling()
        and (not has_torch_function_variadic(input, target, weight) or _only_modes(input, target, weight))
        and isinstance(input, Tensor)
        and isinstance(target, Tensor)
        and (weight is None or isinstance(weight, Tensor))
        and (input.is_cpu or input.is_cuda)
    )


def _only_modes(*arguments: object) -> bool:
    plain = all(type(argument) in (Tensor, Parameter, type(None)) for argument in arguments)
    return plain and ops.only_transparent_modes()


def _by_torch(function: Callable[..., Tensor], *tensors: Tensor | None, **options: Any) -> Tensor:
    """torch's own function, also as the one a subclass is asked about: by name it would be ours after `patch`."""
    if not torch.compiler.is_compiling() and has_torch_function_variadic(*tensors):
        return handle_torch_function(function, tensors, *tensors, **options)
    return function(*tensors, **options)


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
            effect where the gradient is itself differentiated, or is not computed by the kernels. Default False.

    Returns:
        A scalar of input's dtype, or with 'none' one loss a row, in the shape of class-index targets. Under autocast
        float32, as torch's.

    Raises:
        IndexError: a class index is neither in [0, C) nor ignore_index (CPU; on CUDA a device-side assertion fails).
        ValueError: the batch sizes differ, or reduction is unknown.
        RuntimeError: another shape, dtype or device is wrong; or inplace_backward, and input is a leaf, a view of one,
            or has elements that share memory.
        NotImplementedError: input is not of one of the four types.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if _is_eager(input, target, weight):
        loss = _backend.extension().cross_entropy(
            input, target, weight, _reduction.get_enum(reduction), ignore_index, label_smoothing, inplace_backward
        )
        if loss is not None:
            return loss
    if ops.cross_entropy_covers(input, target, weight):
        number = _reduction.get_enum(reduction)
        return ops.cross_entropy(input, target, weight, number, ignore_index, label_smoothing)
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    return _by_torch(torch_cross_entropy, input, target, weight, **options)


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
        A scalar of input's dtype, or with 'none' one loss an element, in the broadcast shape. Under autocast float32,
        as torch's.

    Raises:
        ValueError: reduction is unknown.
        RuntimeError: the shapes do not broadcast, or the devices differ.
        NotImplementedError: the dtype is none that squared errors are computed in.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if weight is None and _is_eager(input, target):
        if input.shape != target.shape:
            warnings.warn(
                f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
                "This will likely lead to incorrect results due to broadcasting. "
                "Please ensure they have the same size.",
                stacklevel=2,
            )
            input, target = _broadcast(input, target)
        loss = _backend.extension().mse_loss(input, target, _reduction.get_enum(reduction))
        if loss is not None:
            return loss
    if weight is None and ops.mse_loss_covers(input, target):
        return ops.mse_loss(input, target, _reduction.get_enum(reduction))
    return _by_torch(torch_mse_loss, input, target, reduction=reduction, weight=weight)


def _broadcast(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    try:
        return torch.broadcast_tensors(input, target)
    except RuntimeError as error:
        raise RuntimeError(
            f"mse_loss: target of shape {list(target.shape)} must have, or broadcast with, the shape of input, "
            f"{list(input.shape)}: {error}"
        ) from None


# TorchScript cannot compile a call into an extension. Asked for these functions, or what calls them, it gets torch's.
cross_entropy.__prepare_scriptable__ = lambda: torch_cross_entropy
mse_loss.__prepare_scriptable__ = lambda: torch_mse_loss
