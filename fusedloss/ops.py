"""The ops as torch's dispatcher knows them: what torch.compile, torch.export, make_fx and dispatch modes see.

An eager call of plain tensors never comes here. It reaches the same C++ functions by pybind11, without the dispatcher
and Python's part in it, which cost more than a small loss.

A backward op has a derivative of its own, composed of torch's operations, for those who differentiate twice.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.functional import cross_entropy as torch_cross_entropy
from torch.nn.functional import nll_loss as torch_nll_loss
from torch.overrides import _get_current_function_mode_stack

from . import _backend, pointwise_losses

MAX_CUDA_CLASSES = 2**30  # kMaxClasses in csrc/kernels/cuda/cross_entropy_cuda.h
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_REDUCTIONS = ("none", "mean", "sum")  # at torch's number for each


# ---- the calls that are the ops' to compute ----

# torch's own function modes that mean nothing to a loss: a default device, and those by which graphs are recorded.
_TRANSPARENT_MODES = (
    "DeviceContext",
    "TorchFunctionMetadataMode",
    "PreDispatchTorchFunctionMode",
    "_NonStrictTorchFunctionHandler",
)


def only_transparent_modes() -> bool:
    """Would the torch function modes that are active let a loss pass unchanged?"""
    return all(
        type(mode).__name__ in _TRANSPARENT_MODES and type(mode).__module__.startswith("torch.")
        for mode in _get_current_function_mode_stack()
    )


def _has_kernels(device_type: str) -> bool:
    return device_type == "cpu" or (device_type == "cuda" and _backend.with_cuda())


# What torch.compiler.assume_constant_result does, but for importing the whole compiler, which takes two seconds.
_has_kernels._dynamo_marked_constant = True


def accepts(*tensors: object) -> bool:
    """Can an op take these? Not where something is active that knows torch's own functions only."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch.jit.is_tracing():
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
    """Is this call the op's? What torch promotes or refuses is left to torch.

    Sizes are not compared here but by the fake kernel: the compiler may not know them before the graph runs.
    """
    if not accepts(input, target, *([] if weight is None else [weight])) or input.dim() == 0:
        return False
    if not torch.compiler.is_compiling():
        classes = input.shape[min(1, input.dim() - 1)]
        if classes == 0 or (input.is_cuda and classes > MAX_CUDA_CLASSES):
            return False
    if weight is not None and (weight.requires_grad or weight.dtype != input.dtype or weight.dim() != 1):
        return False
    if input.dim() == target.dim():
        return target.dtype == input.dtype and not target.requires_grad
    is_index = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    return is_index and target.dim() == len(_rows(input))


def pointwise_covers(operands: Sequence[Tensor]) -> bool:
    """Is this call the op's? What torch broadcasts, promotes or refuses is left to torch."""
    input = operands[0]
    return accepts(*operands) and all(
        operand.shape == input.shape and operand.dtype == input.dtype for operand in operands[1:]
    )


def nll_loss_covers(input: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """Is this call the op's? Where it is cross entropy's of class indices."""
    return cross_entropy_covers(input, target, weight) and target.dim() != input.dim()


def nll_loss(input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int) -> Tensor:
    return torch.ops.fusedloss.nll_loss_forward(input, target, weight, reduction, ignore_index, False)[0]


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    return torch.ops.fusedloss.cross_entropy_forward(
        input, target, weight, reduction, ignore_index, label_smoothing, False
    )[0]


def pointwise(
    operands: Sequence[Tensor], loss: str, parameters: Sequence[float], reduction: int, divisor: int | None
) -> Tensor:
    return torch.ops.fusedloss.pointwise_forward(operands, loss, parameters, reduction, divisor, False)


# ---- their schemas, kernels and fake kernels ----


def _define(name: str, schema: str, kernel: Callable, fake: Callable) -> None:
    torch.library.define(f"fusedloss::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"fusedloss::{name}", ("cpu", "cuda"), kernel)
    torch.library.register_fake(f"fusedloss::{name}", fake)


def _rows(input: Tensor) -> Sequence[int]:
    """The shape of one value a row."""
    return (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()


def _accumulate_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _fake_cross_entropy_forward(input, target, weight, reduction, ignore_index, label_smoothing, autocast):
    rows, accumulate_dtype = _rows(input), _accumulate_dtype(input)
    expected = input.shape if target.dim() == input.dim() else rows
    for given, size in zip(target.shape, expected, strict=True):
        torch._check(given == size, lambda: f"target must have shape {list(expected)}, got {list(target.shape)}")
    if weight is not None:
        classes = input.shape[min(1, input.dim() - 1)]
        torch._check(weight.shape[0] == classes, lambda: f"weight must have {classes} elements, got {weight.shape[0]}")
    sums_weights = weight is not None and label_smoothing > 0 and target.dim() != input.dim()
    reduction = _REDUCTIONS[reduction]
    scalars = int(reduction == "mean") + int(sums_weights)
    return (
        input.new_empty(rows if reduction == "none" else (), dtype=accumulate_dtype if autocast else input.dtype),
        input.new_empty((2 * math.prod(rows) + scalars,), dtype=accumulate_dtype),
    )


def _fake_pointwise_forward(operands, loss, parameters, reduction, divisor, autocast):
    input = operands[0]
    dtype = _accumulate_dtype(input) if autocast else input.dtype
    return (
        torch.empty_like(input, dtype=dtype) if _REDUCTIONS[reduction] == "none" else input.new_empty((), dtype=dtype)
    )


def _pointwise_backward(grad_output, operands, loss, parameters, reduction, divisor, wanted):
    mask = sum(is_wanted << k for k, is_wanted in enumerate(wanted))
    grads = _backend.extension().pointwise_backward(
        grad_output, pointwise_losses.number_of(loss), operands, parameters, reduction, divisor, mask
    )
    return [grad for grad, is_wanted in zip(grads, wanted, strict=True) if is_wanted]


_define(
    "cross_entropy_forward",
    "(Tensor input, Tensor target, Tensor? weight, int reduction, int ignore_index, float label_smoothing,"
    " bool autocast) -> (Tensor loss, Tensor statistics)",
    lambda *args: _backend.extension().cross_entropy_forward(*args),
    _fake_cross_entropy_forward,
)
_define(
    "cross_entropy_backward",
    "(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor statistics, int reduction,"
    " int ignore_index, float label_smoothing) -> Tensor",
    lambda *args: _backend.extension().cross_entropy_backward(*args),
    lambda grad_output, input, *_: torch.empty_like(input),
)
_define(
    "pointwise_forward",
    "(Tensor[] operands, str loss, float[] parameters, int reduction, SymInt? divisor, bool autocast) -> Tensor",
    lambda operands, loss, *args: _backend.extension().pointwise_forward(
        pointwise_losses.number_of(loss), operands, *args
    ),
    _fake_pointwise_forward,
)
_define(  # the gradients of the operands that are wanted
    "pointwise_backward",
    "(Tensor grad_output, Tensor[] operands, str loss, float[] parameters, int reduction, SymInt? divisor,"
    " bool[] wanted) -> Tensor[]",
    _pointwise_backward,
    lambda grad_output, operands, *options: [torch.empty_like(operands[0]) for wanted in options[-1] if wanted],
)


def _fake_nll_loss_forward(input, target, weight, reduction, ignore_index, autocast):
    loss, statistics = _fake_cross_entropy_forward(input, target, weight, reduction, ignore_index, 0.0, autocast)
    return loss, statistics.new_empty((int(_REDUCTIONS[reduction] == "mean"),))


def _empty_like(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: Any) -> Tensor:
    """torch.empty_like of an input that is known by these."""
    return torch.empty_like(torch.empty_strided(size, stride, dtype=dtype, device=device))


def _nll_loss_backward(grad_output, target, weight, total_weight, size, stride, dtype, *options):
    stride = _empty_like(size, stride, dtype, "meta").stride()
    return _backend.extension().nll_loss_backward(
        grad_output, target, weight, total_weight, size, stride, dtype, *options
    )


_define(
    "nll_loss_forward",
    "(Tensor input, Tensor target, Tensor? weight, int reduction, int ignore_index, bool autocast)"
    " -> (Tensor loss, Tensor total_weight)",
    lambda *args: _backend.extension().nll_loss_forward(*args),
    _fake_nll_loss_forward,
)
_define(  # size, stride and dtype: the input's, whose values are not needed
    "nll_loss_backward",
    "(Tensor grad_output, Tensor target, Tensor? weight, Tensor total_weight, SymInt[] size, SymInt[] stride,"
    " ScalarType dtype, int reduction, int ignore_index) -> Tensor",
    _nll_loss_backward,
    lambda grad_output, target, weight, total_weight, size, stride, dtype, *_: _empty_like(
        size, stride, dtype, grad_output.device
    ),
)


# ---- under autocast ----
#
# It is the dispatcher that knows of it, as for torch's own ops: a graph that was recorded without autocast obeys it
# where it runs.


def _obey_autocast(name: str, autocast_position: int) -> None:
    op = getattr(torch.ops.fusedloss, name).default
    for key in ("AutocastCPU", "AutocastCUDA"):
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(*args: Any, keys: torch._C.DispatchKeySet = keys) -> Any:
            input = args[0] if isinstance(args[0], Tensor) else args[0][0]
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(*args[:autocast_position], input.dtype != torch.float64)

        _library.impl(name, kernel, key)


_library = torch.library.Library("fusedloss", "FRAGMENT")
_obey_autocast("cross_entropy_forward", 6)
_obey_autocast("pointwise_forward", 5)
_obey_autocast("nll_loss_forward", 5)


# ---- their derivatives ----


def _composed_gradients(
    function: Callable[..., Tensor | Sequence[Tensor]], inputs: Sequence[Tensor], grad: Tensor | Sequence[Tensor]
) -> list[Tensor | None]:
    """grad times the derivative of function(*inputs) by each input that requires one, as torch's operations have it.

    Taken at views: the graph behind the inputs belongs to the backward pass that is under way.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        views = [input.view_as(input) for input in inputs]
        wanted = [view for view in views if view.requires_grad]
        found = iter(torch.autograd.grad(function(*views), wanted, grad, create_graph=create_graph, allow_unused=True))
    return [next(found) if input.requires_grad else None for input in inputs]


def _gradient(loss: Callable[[Tensor], Tensor], input: Tensor, grad_output: Tensor) -> Tensor:
    """grad_output times the derivative of loss(input), itself differentiable."""
    at = input if input.requires_grad else input.detach().requires_grad_()
    (grad,) = torch.autograd.grad(loss(at.to(grad_output.dtype)), at, grad_output, create_graph=True)
    return grad


def _save_cross_entropy_forward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    input, target, weight, *ctx.options, _ = inputs
    ctx.save_for_backward(input, target, weight, output[1])


def _cross_entropy_forward_gradients(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple:
    input, target, weight, statistics = ctx.saved_tensors
    if any(ctx.needs_input_grad[1:3]):
        raise NotImplementedError("fusedloss::cross_entropy_forward has no gradient for target and weight")
    grad = torch.ops.fusedloss.cross_entropy_backward(grad_output, input, target, weight, statistics, *ctx.options)
    return grad, *(None,) * 6


def _save_cross_entropy_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    grad_output, input, target, weight, _, *ctx.options = inputs
    ctx.save_for_backward(grad_output, input, target, weight)


def _cross_entropy_backward_gradients(ctx: Any, grad: Tensor) -> tuple:
    grad_output, input, target, weight = ctx.saved_tensors
    if any(ctx.needs_input_grad[2:4]):
        raise NotImplementedError("fusedloss::cross_entropy_backward has no gradient for target and weight")
    reduction, ignore_index, label_smoothing = ctx.options
    dtype = grad_output.dtype  # float32 where the forward pass ran under autocast

    def loss(x: Tensor) -> Tensor:
        return torch_cross_entropy(
            x,
            target.to(dtype if target.is_floating_point() else torch.int64),
            None if weight is None else weight.to(dtype),
            ignore_index=ignore_index,
            reduction=_REDUCTIONS[reduction],
            label_smoothing=label_smoothing,
        )

    grads = _composed_gradients(lambda g, x: _gradient(loss, x, g), (grad_output, input), grad)
    return *grads, *(None,) * 6


def _no_gradients(arguments: Sequence) -> list:
    """Nothing for each argument, in the structure that torch sees in it: of lists, only in empty ones or of tensors."""
    return [[] if isinstance(argument, list) and not argument else None for argument in arguments]


def _is_batch(grad_output: Tensor) -> bool:
    """Of either vmap; the older one's key, that of is_grads_batched, has no name in Python."""
    return "Batched" in repr(torch._C._dispatch_keys(grad_output))


def _save_pointwise_forward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    operands, *ctx.options, _ = inputs
    ctx.nothing = _no_gradients(inputs[1:])
    ctx.save_for_backward(*operands)


def _pointwise_forward_gradients(ctx: Any, grad_output: Tensor) -> tuple:
    wanted = list(ctx.needs_input_grad[0])
    operands = list(ctx.saved_tensors)
    if _is_batch(grad_output):  # torch makes no rule for an op of lists
        found = _pointwise_gradients(operands, wanted, ctx.options, grad_output, create_graph=False)
    else:
        found = torch.ops.fusedloss.pointwise_backward(grad_output, operands, *ctx.options, wanted)
    grads = iter(found)
    return [next(grads) if each else None for each in wanted], *ctx.nothing


def _save_pointwise_backward(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    grad_output, operands, *ctx.options, ctx.wanted = inputs
    ctx.nothing = _no_gradients(inputs[2:])
    ctx.save_for_backward(grad_output, *operands)


def _pointwise_backward_gradients(ctx: Any, grads: Sequence[Tensor]) -> tuple:
    def gradients(grad_output: Tensor, *operands: Tensor) -> Sequence[Tensor]:
        return _pointwise_gradients(operands, ctx.wanted, ctx.options, grad_output, create_graph=True)

    of_grad_output, *of_operands = _composed_gradients(gradients, ctx.saved_tensors, grads)
    return of_grad_output, of_operands, *ctx.nothing


def _pointwise_gradients(
    operands: Sequence[Tensor], wanted: Sequence[bool], options: Sequence, grad_output: Tensor, create_graph: bool
) -> Sequence[Tensor]:
    """grad_output times the derivatives of the loss by the operands that are wanted, as torch's operations have it."""
    loss, *others = options
    with torch.enable_grad():
        at = [operand if operand.requires_grad else operand.detach().requires_grad_() for operand in operands]
        of = pointwise_losses.composed(loss, [x.to(grad_output.dtype) for x in at], *others)
    by = [x for x, is_wanted in zip(at, wanted, strict=True) if is_wanted]
    # 0 where the loss has no derivative: by a mask, or by what has none among those given by hand.
    return torch.autograd.grad(of, by, grad_output, create_graph=create_graph, materialize_grads=True)


def _nll_loss_by_torch(target: Tensor, weight: Tensor | None, dtype: torch.dtype, options: tuple) -> Callable:
    """As a function of the input. dtype: the loss's, float32 where the forward pass ran under autocast."""
    reduction, ignore_index = options
    weight = None if weight is None else weight.to(dtype)
    target = target.to(torch.int64)
    return lambda x: torch_nll_loss(x, target, weight, ignore_index=ignore_index, reduction=_REDUCTIONS[reduction])


def _save_nll_loss_forward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    input, target, weight, *ctx.options, _ = inputs
    ctx.save_for_backward(input, target, weight, output[1])


def _nll_loss_forward_gradients(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple:
    input, target, weight, total_weight = ctx.saved_tensors
    if ctx.needs_input_grad[2]:
        raise NotImplementedError("fusedloss::nll_loss_forward has no gradient for weight")
    if torch.is_grad_enabled():  # the backward op does not know input, whose second derivative is 0 and not None
        loss = _nll_loss_by_torch(target, weight, grad_output.dtype, ctx.options)
        return _gradient(loss, input.view_as(input), grad_output), *(None,) * 5
    grad = torch.ops.fusedloss.nll_loss_backward(
        grad_output, target, weight, total_weight, input.shape, input.stride(), input.dtype, *ctx.options
    )
    return grad, *(None,) * 5


def _save_nll_loss_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    grad_output, target, weight, *_, reduction, ignore_index = inputs
    ctx.save_for_backward(target, weight)
    ctx.dtype, ctx.options = grad_output.dtype, (reduction, ignore_index)


def _nll_loss_backward_gradients(ctx: Any, grad: Tensor) -> tuple:
    """The gradient is linear in grad_output: what goes back is the loss of what comes in."""
    loss = _nll_loss_by_torch(*ctx.saved_tensors, ctx.dtype, ctx.options)
    return loss(grad.to(ctx.dtype)), *(None,) * 8


for _name, _gradients, _save in (
    ("cross_entropy_forward", _cross_entropy_forward_gradients, _save_cross_entropy_forward),
    ("cross_entropy_backward", _cross_entropy_backward_gradients, _save_cross_entropy_backward),
    ("pointwise_forward", _pointwise_forward_gradients, _save_pointwise_forward),
    ("pointwise_backward", _pointwise_backward_gradients, _save_pointwise_backward),
    ("nll_loss_forward", _nll_loss_forward_gradients, _save_nll_loss_forward),
    ("nll_loss_backward", _nll_loss_backward_gradients, _save_nll_loss_backward),
):
    torch.library.register_autograd(f"fusedloss::{_name}", _gradients, setup_context=_save)
