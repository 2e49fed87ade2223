"""Decides where a call goes: directly to the kernels, to the registered op, or to torch's own function.

For plain tensors (csrc/ops/plain.h) the extension decides, in the functions named `…_covers` in csrc/ops/. For every
other call, such as one with fake tensors or one that the compiler traces, and for a call that the extension declines,
this file decides: in `cross_entropy_covers`, in `nll_loss_covers`, and for pointwise losses in `fused`.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn import Parameter, _reduction
from torch.overrides import _get_current_function_mode_stack, handle_torch_function, has_torch_function_variadic

from . import _backend, ops
from .pointwise_registry import is_compiled_for, number_of

NUMBER = (int, float)  # not int | float: Dynamo in torch 2.6 does not support unions
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_eager(tensors: Sequence[Tensor], weight: Tensor | None = None) -> bool:
    """True if the C++ entry point may be called directly. That call may compile the extension, or return None."""
    if torch.compiler.is_compiling():
        return False
    if has_torch_function_variadic(*tensors, weight) and not _only_modes(*tensors, weight):
        return False
    for tensor in tensors:  # a generator expression would take several times as long
        if not isinstance(tensor, Tensor):
            return False
    return (weight is None or isinstance(weight, Tensor)) and (tensors[0].is_cpu or tensors[0].is_cuda)


def _only_modes(*arguments: object) -> bool:
    """True if torch functions are overridden by transparent modes only, and not by a subclass or another mode."""
    plain = all(type(argument) in (Tensor, Parameter, type(None)) for argument in arguments)
    return plain and only_transparent_modes()


def call_torch(function: Callable[..., Tensor], *tensors: Tensor | float | None, **options: Any) -> Tensor:
    """Call torch's own function. A subclass's `__torch_function__` also receives torch's function, not fusedloss's.

    `function` must have been read at import, because `patch` replaces the functions in torch.nn.functional.
    """
    if not torch.compiler.is_compiling() and has_torch_function_variadic(*tensors):
        return handle_torch_function(function, tensors, *tensors, **options)
    return function(*tensors, **options)


def named_reduction(reduction: str, size_average: bool | None, reduce: bool | None) -> str:
    """The reduction in effect: size_average and reduce, which are deprecated, override it, with torch's warning."""
    if size_average is None and reduce is None:
        return reduction
    return _reduction.legacy_get_string(size_average, reduce)


# ---- what the registered ops accept

# torch's own function modes that do not affect a loss: a default device, and the modes that record graphs.
_TRANSPARENT_MODES = (
    "DeviceContext",
    "TorchFunctionMetadataMode",
    "PreDispatchTorchFunctionMode",
    "_NonStrictTorchFunctionHandler",
)


def only_transparent_modes() -> bool:
    """True if no active torch function mode affects a loss."""
    return all(
        type(mode).__name__ in _TRANSPARENT_MODES and type(mode).__module__.startswith("torch.")
        for mode in _get_current_function_mode_stack()
    )


@_backend.called_by_compiler
def _has_kernels(device_type: str) -> bool:
    return device_type == "cpu" or (device_type == "cuda" and _backend.with_cuda())


def accepts(*tensors: Tensor) -> bool:
    """True if a registered op can take these tensors.

    It cannot under functorch, forward-mode AD, torch.jit.trace or a function mode that may affect the loss, because
    these handle torch's own functions only.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    # torch.jit declares neither its exports nor this function's types.
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    if not only_transparent_modes():
        return False
    types = (Tensor, Parameter, FakeTensor, FunctionalTensor)
    if not all(type(tensor) in types and tensor.layout == torch.strided and not tensor.is_nested for tensor in tensors):
        return False
    input, *others = tensors
    return (
        input.dtype in _DTYPES
        and _has_kernels(input.device.type)
        and all(tensor.device == input.device for tensor in others)
    )


def cross_entropy_covers(input: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """True if the registered op computes this call. Calls with dtypes that torch promotes or rejects go to torch.

    The fake kernel checks the sizes, because in a traced call they may be symbolic.
    """
    if not accepts(input, target, *([] if weight is None else [weight])) or input.dim() == 0:
        return False
    if not torch.compiler.is_compiling():
        classes = input.shape[min(1, input.dim() - 1)]
        if classes == 0 or (input.is_cuda and classes > _backend.extension().max_cuda_classes):
            return False
    if weight is not None and (weight.requires_grad or weight.dtype != input.dtype or weight.dim() != 1):
        return False
    if input.dim() == target.dim():
        return target.dtype == input.dtype and not target.requires_grad
    is_index = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    return is_index and target.dim() == max(input.dim() - 1, 0)


def nll_loss_covers(input: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """True if the registered op computes this call. The conditions are those of cross entropy of class indices."""
    return cross_entropy_covers(input, target, weight) and target.dim() != input.dim()


# ---- pointwise losses


def may_be_fused(*operands: Tensor) -> bool:
    """True if `fused` may compute a loss of these operands. If not, the call goes to torch."""
    return is_eager(operands) or accepts(*operands)


def fused(
    name: str,
    operands: Sequence[Tensor],
    reduction: str,
    parameters: Sequence[float] = (),
    divisor: int | None = None,
    warns: bool = False,
    fits: Callable[..., bool] | None = None,
) -> Tensor | None:
    """The pointwise loss of this name, computed by its kernels or the registered op. None if the call goes to torch.

    warns: give torch's warning if input and target have different shapes, which is likely a mistake.
    fits: called if the shapes differ; returns whether the loss may broadcast these operands. Default: always.
    """
    eager = is_eager(operands)
    if not eager and not accepts(*operands):
        return None
    options = (parameters, _reduction.get_enum(reduction), divisor)
    loss = _by_kernels(name, operands, *options) if eager else None
    # Either the kernels have computed the loss, or they have declined and the registered op cannot compute it either.
    if loss is not None or (eager and not accepts(*operands)):
        return loss
    given, shape = operands, operands[0].shape
    have_one_shape = all(operand.shape == shape for operand in operands[1:])
    if not have_one_shape:
        if fits is not None and not fits(*operands):
            return None
        if warns and torch.compiler.is_compiling():
            return None  # torch's function gives the warning, without a graph break
        operands = _broadcast(name, operands)
        loss = _by_kernels(name, operands, *options) if eager else None
    if loss is None and _pointwise_op_covers(name, operands):
        loss = ops.pointwise(operands, name, *options)
    if warns and not have_one_shape and loss is not None:
        input, target = given
        warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=3,
        )
    return loss


def _by_kernels(name: str, operands: Sequence[Tensor], *options: Any) -> Tensor | None:
    loss: Tensor | None = _backend.extension().pointwise(number_of(name), operands, *options)
    return loss


def _pointwise_op_covers(name: str, operands: Sequence[Tensor]) -> bool:
    """True if the registered op computes this call, whose operands have one shape. torch handles type promotion."""
    have_one_dtype = all(operand.dtype == operands[0].dtype for operand in operands[1:])
    return have_one_dtype and _can_be_saved(operands) and is_compiled_for(name, operands[0].device.type)


def _can_be_saved(operands: Sequence[Tensor]) -> bool:
    """False if autograd would have to save an inference tensor, which it refuses.

    Such a call goes to torch, some of whose own functions do not save their operands.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return True
    return not any(operand.requires_grad for operand in operands) or not any(map(Tensor.is_inference, operands))


@_backend.called_by_compiler
def warn(message: str, stacklevel: int) -> None:
    warnings.warn(message, stacklevel=stacklevel + 1)


def _broadcast(name: str, operands: Sequence[Tensor]) -> Sequence[Tensor]:
    try:
        broadcast: Sequence[Tensor] = torch.broadcast_tensors(*operands)
        return broadcast
    except RuntimeError as error:
        shapes = ", ".join(str(list(operand.shape)) for operand in operands)
        who = name.partition("#")[0]  # the name of a custom loss ends with # and a digest
        what = "input and target" if len(operands) == 2 else "the tensors"
        raise RuntimeError(f"{who}: {what} must have shapes that broadcast, got {shapes}: {error}") from None
