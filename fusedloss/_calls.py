"""Which way a call goes: to the kernels at once, to the registered op, or to torch's own function."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, _reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _backend, ops
from .pointwise_losses import number_of

NUMBER = (int, float)  # not int | float: the compiler of torch 2.6 knows no unions


def is_eager(tensors: Sequence[Tensor], weight: Tensor | None = None) -> bool:
    """May the kernels look at these, or even be compiled to do so? They then decide for themselves."""
    if torch.compiler.is_compiling():
        return False
    if has_torch_function_variadic(*tensors, weight) and not _only_modes(*tensors, weight):
        return False
    for tensor in tensors:  # a generator would take several times as long
        if not isinstance(tensor, Tensor):
            return False
    return (weight is None or isinstance(weight, Tensor)) and (tensors[0].is_cpu or tensors[0].is_cuda)


def _only_modes(*arguments: object) -> bool:
    plain = all(type(argument) in (Tensor, Parameter, type(None)) for argument in arguments)
    return plain and ops.only_transparent_modes()


def by_torch(function: Callable[..., Tensor], *tensors: Tensor | None, **options: Any) -> Tensor:
    """torch's own function, also as the one a subclass is asked about: by name it would be ours after `patch`."""
    if not torch.compiler.is_compiling() and has_torch_function_variadic(*tensors):
        return handle_torch_function(function, tensors, *tensors, **options)
    return function(*tensors, **options)


def named_reduction(reduction: str, size_average: bool | None, reduce: bool | None) -> str:
    """The reduction that is meant: torch's deprecated arguments override it, with torch's warning."""
    if size_average is None and reduce is None:
        return reduction
    return _reduction.legacy_get_string(size_average, reduce)


def covers(*operands: Tensor) -> bool:
    return is_eager(operands) or ops.accepts(*operands)


def fused(
    name: str,
    operands: Sequence[Tensor],
    reduction: str,
    parameters: Sequence[float] = (),
    divisor: int | None = None,
    warns: bool = False,
    fits: Callable[..., bool] | None = None,
) -> Tensor | None:
    """The pointwise loss of this name, as its kernels or the registered op compute it; None where the call is torch's.

    warns: an input and a target of two shapes are likely a mistake, as torch tells.
    fits: whether it broadcasts these operands, which have several shapes; if not given, it broadcasts any.
    """
    eager = is_eager(operands)
    if not eager and not ops.accepts(*operands):
        return None
    options = (parameters, _reduction.get_enum(reduction), divisor)
    loss = _of_one_shape(eager, name, operands, *options)
    shape = operands[0].shape
    if loss is not None or all(operand.shape == shape for operand in operands[1:]):
        return loss
    if not ops.accepts(*operands) or not (fits is None or fits(*operands)):
        return None
    if warns and torch.compiler.is_compiling():
        return None  # the compiler calls torch's function, whose warning it lets through
    loss = _of_one_shape(eager, name, _broadcast(name, operands), *options)
    if warns and loss is not None:
        input, target = operands
        warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=3,
        )
    return loss


def _of_one_shape(eager: bool, name: str, operands: Sequence[Tensor], *options: Any) -> Tensor | None:
    """As `fused`, but None where the operands have several shapes."""
    loss = _backend.extension().pointwise(number_of(name), operands, *options) if eager else None
    if loss is None and ops.pointwise_covers(operands):
        return ops.pointwise(operands, name, *options)
    return loss


def warn(message: str, stacklevel: int) -> None:
    warnings.warn(message, stacklevel=stacklevel + 1)


# The compiler calls it while it records the graph.
warn._dynamo_marked_constant = True


def _broadcast(name: str, operands: Sequence[Tensor]) -> Sequence[Tensor]:
    try:
        return torch.broadcast_tensors(*operands)
    except RuntimeError as error:
        shapes = ", ".join(str(list(operand.shape)) for operand in operands)
        who = name.partition("#")[0]  # without the digest of a custom loss
        what = "input and target" if len(operands) == 2 else "the tensors"
        raise RuntimeError(f"{who}: {what} must have shapes that broadcast, got {shapes}: {error}") from None
