"""Registers the ops with torch's dispatcher. torch.compile, torch.export, make_fx and dispatch modes see these ops.

The forward pass of an eager call with plain tensors does not use them. It calls the same C++ functions through
pybind11, because the dispatcher and its Python part cost more time than a small loss.

Each loss has a forward and a backward op, which call the extension. A third op composes the gradient of torch's
operations. It is used when the gradient is differentiated, and for batches of gradients.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _backend, pointwise_registry

# torch's own functions, read here before `patch` can replace them.
torch_cross_entropy = F.cross_entropy
torch_nll_loss = F.nll_loss

_REDUCTIONS = ("none", "mean", "sum")  # the index is torch's number for the reduction


# ---- the losses as ops ----


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    loss: Tensor = torch.ops.fusedloss.cross_entropy_forward(
        input, target, weight, reduction, ignore_index, label_smoothing, False
    )[0]
    return loss


def nll_loss(input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int) -> Tensor:
    loss: Tensor = torch.ops.fusedloss.nll_loss_forward(input, target, weight, reduction, ignore_index, False)[0]
    return loss


def pointwise(
    operands: Sequence[Tensor], loss: str, parameters: Sequence[float], reduction: int, divisor: int | None
) -> Tensor:
    result: Tensor = torch.ops.fusedloss.pointwise_forward(operands, loss, parameters, reduction, divisor, False)
    return result


# ---- their schemas, kernels and fake kernels ----

_Kernel = Callable[..., Tensor | Sequence[Tensor]]


def _define(name: str, schema: str, kernel: _Kernel, fake: _Kernel) -> None:
    torch.library.define(f"fusedloss::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"fusedloss::{name}", ("cpu", "cuda"), kernel)
    torch.library.register_fake(f"fusedloss::{name}", fake)


def _rows(input: Tensor) -> Sequence[int]:
    """The shape of a tensor with one value per row."""
    return (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()


def _accumulate_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _fake_cross_entropy_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    autocast: bool,
) -> tuple[Tensor, Tensor]:
    torch._check(input.dim() > 0, lambda: "input must have a dimension of classes")
    rows, accumulate_dtype = _rows(input), _accumulate_dtype(input)
    has_probabilities = target.dim() == input.dim()
    expected = input.shape if has_probabilities else rows
    if has_probabilities:
        torch._check(
            target.dtype == input.dtype,
            lambda: f"target must have the dtype of input, {input.dtype}, got {target.dtype}",
        )
    for given, size in zip(target.shape, expected, strict=True):
        torch._check(given == size, lambda: f"target must have shape {list(expected)}, got {list(target.shape)}")
    if weight is not None:
        classes = input.shape[min(1, input.dim() - 1)]
        torch._check(weight.shape[0] == classes, lambda: f"weight must have {classes} elements, got {weight.shape[0]}")
    named = _REDUCTIONS[reduction]
    numel = _backend.extension().cross_entropy_statistics_numel(
        math.prod(rows), named == "mean", weight is not None, label_smoothing, not has_probabilities
    )
    return (
        input.new_empty(rows if named == "none" else (), dtype=accumulate_dtype if autocast else input.dtype),
        input.new_empty((numel,), dtype=accumulate_dtype),
    )


def _fake_pointwise_forward(
    operands: Sequence[Tensor],
    loss: str,
    parameters: Sequence[float],
    reduction: int,
    divisor: int | None,
    autocast: bool,
) -> Tensor:
    input = operands[0]
    dtype = _accumulate_dtype(input) if autocast else input.dtype
    return (
        torch.empty_like(input, dtype=dtype) if _REDUCTIONS[reduction] == "none" else input.new_empty((), dtype=dtype)
    )


def _pointwise_backward(
    grad_output: Tensor,
    operands: Sequence[Tensor],
    loss: str,
    parameters: Sequence[float],
    reduction: int,
    divisor: int | None,
    wanted: Sequence[bool],
) -> list[Tensor]:
    bits = sum(is_wanted << k for k, is_wanted in enumerate(wanted))
    grads = _backend.extension().pointwise_backward(
        grad_output, pointwise_registry.number_of(loss), operands, parameters, reduction, divisor, bits
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
        pointwise_registry.number_of(loss), operands, *args
    ),
    _fake_pointwise_forward,
)
_define(  # returns the gradients of the wanted operands only
    "pointwise_backward",
    "(Tensor grad_output, Tensor[] operands, str loss, float[] parameters, int reduction, SymInt? divisor,"
    " bool[] wanted) -> Tensor[]",
    _pointwise_backward,
    lambda grad_output, operands, *options: [torch.empty_like(operands[0]) for wanted in options[-1] if wanted],
)


def _fake_nll_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, autocast: bool
) -> tuple[Tensor, Tensor]:
    loss, statistics = _fake_cross_entropy_forward(input, target, weight, reduction, ignore_index, 0.0, autocast)
    return loss, statistics.new_empty((int(_REDUCTIONS[reduction] == "mean"),))


def _empty_like(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """torch.empty_like of an input of which only these attributes are known."""
    return torch.empty_like(torch.empty_strided(size, stride, dtype=dtype, device=device))


def _nll_loss_backward(
    grad_output: Tensor,
    target: Tensor,
    weight: Tensor | None,
    total_weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
    reduction: int,
    ignore_index: int,
) -> Tensor:
    stride = _empty_like(size, stride, dtype, "meta").stride()
    grad: Tensor = _backend.extension().nll_loss_backward(
        grad_output, target, weight, total_weight, size, stride, dtype, reduction, ignore_index
    )
    return grad


_define(
    "nll_loss_forward",
    "(Tensor input, Tensor target, Tensor? weight, int reduction, int ignore_index, bool autocast)"
    " -> (Tensor loss, Tensor total_weight)",
    lambda *args: _backend.extension().nll_loss_forward(*args),
    _fake_nll_loss_forward,
)
_define(  # size, stride and dtype are those of input; its values are not needed
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
# The dispatcher applies autocast, as it does for torch's own ops. So a graph that was recorded without autocast obeys
# it if it runs under autocast.


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

# What register_autograd expects: a gradient or None for each argument, and a list of these for a list of tensors.
_Gradients = tuple[Tensor | Sequence[Tensor | None] | None, ...]


def _gradients(
    function: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor],
    wanted: Sequence[bool],
    grad_output: Tensor | Sequence[Tensor],
) -> Sequence[Tensor]:
    """grad_output times the derivatives of function(*inputs) with respect to the wanted inputs.

    They are composed of torch's operations, and differentiable themselves if gradients are enabled.

    The derivatives are taken at views of the inputs, because the graph behind the inputs belongs to the backward pass
    that is running. At the inputs themselves, the hooks of that graph would run twice, and if one input depends on
    another, that dependence would be counted twice.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        at = [input.view_as(input) if input.requires_grad else input.detach().requires_grad_() for input in inputs]
        value = function(*at)
    by = [x for x, is_wanted in zip(at, wanted, strict=True) if is_wanted]
    # The gradient is 0 where the function has no derivative: for a mask, or for a tensor without one given by hand.
    return torch.autograd.grad(value, by, grad_output, create_graph=create_graph, materialize_grads=True)


def _define_composed_gradient(name: str, schema: str, kernel: _Kernel) -> None:
    """Define an op that is made of torch's operations under every dispatch key.

    So a dispatch mode sees each operation, autograd differentiates it, and vmap (FuncTorchBatched) and is_grads_batched
    (Batched) vectorise it.
    """
    torch.library.define(f"fusedloss::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CompositeImplicitAutograd", "FuncTorchBatched", "Batched"):
        _library.impl(name, kernel, key)


def _second_derivative(
    composed_gradient: _Kernel, inputs: Sequence[Tensor], grad: Tensor | Sequence[Tensor]
) -> list[Tensor | None]:
    """grad times the derivatives of composed_gradient(*inputs) for the inputs that require one; None for the others."""
    wanted = [input.requires_grad for input in inputs]
    found = iter(_gradients(composed_gradient, inputs, wanted, grad))
    return [next(found) if is_wanted else None for is_wanted in wanted]


def _no_gradients(arguments: Sequence[object]) -> list[list[Tensor] | None]:
    """None for each argument, but [] for an empty list: torch takes only empty lists and lists of tensors for lists."""
    return [[] if isinstance(argument, list) and not argument else None for argument in arguments]


def _refuse_gradients(name: str, *wanted: bool) -> None:
    if any(wanted):
        raise NotImplementedError(f"fusedloss::{name} has no gradient for target and weight")


def _cross_entropy_composed_gradient(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    dtype = grad_output.dtype  # float32 where the forward pass ran under autocast
    target = target.to(dtype if target.is_floating_point() else torch.int64)
    weight = None if weight is None else weight.to(dtype)

    def loss(x: Tensor) -> Tensor:
        return torch_cross_entropy(
            x.to(dtype),
            target,
            weight,
            ignore_index=ignore_index,
            reduction=_REDUCTIONS[reduction],
            label_smoothing=label_smoothing,
        )

    return _gradients(loss, [input], [True], grad_output)[0]


def _save_cross_entropy_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, target, weight, *ctx.options, _ = inputs
    ctx.save_for_backward(input, target, weight, output[1])


def _cross_entropy_forward_gradients(ctx: Any, grad_output: Tensor, _: Tensor) -> _Gradients:
    _refuse_gradients("cross_entropy_forward", *ctx.needs_input_grad[1:3])
    grad = torch.ops.fusedloss.cross_entropy_backward(grad_output, *ctx.saved_tensors, *ctx.options)
    return grad, *(None,) * 6


def _save_cross_entropy_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, input, target, weight, _, *ctx.options = inputs
    ctx.save_for_backward(grad_output, input, target, weight)


def _cross_entropy_backward_gradients(ctx: Any, grad: Tensor) -> _Gradients:
    _refuse_gradients("cross_entropy_backward", *ctx.needs_input_grad[2:4])
    grad_output, input, target, weight = ctx.saved_tensors
    grads = _second_derivative(
        lambda g, x: _cross_entropy_composed_gradient(g, x, target, weight, *ctx.options), (grad_output, input), grad
    )
    return *grads, *(None,) * 6


def _pointwise_composed_gradients(
    grad_output: Tensor,
    operands: Sequence[Tensor],
    loss: str,
    parameters: Sequence[float],
    reduction: int,
    divisor: int | None,
    wanted: Sequence[bool],
) -> Sequence[Tensor]:
    dtype = grad_output.dtype  # float32 where the forward pass ran under autocast

    def composed(*operands: Tensor) -> Tensor:
        wide = [operand.to(dtype) for operand in operands]
        return pointwise_registry.composed(loss, wide, parameters, reduction, divisor)

    return _gradients(composed, operands, wanted, grad_output)


def _save_pointwise_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    operands, *ctx.options, _ = inputs
    ctx.nothing = _no_gradients(inputs[1:])
    ctx.save_for_backward(*operands)


def _pointwise_forward_gradients(ctx: Any, grad_output: Tensor) -> _Gradients:
    wanted = list(ctx.needs_input_grad[0])
    operands = list(ctx.saved_tensors)
    grads = iter(torch.ops.fusedloss.pointwise_backward(grad_output, operands, *ctx.options, wanted))
    return [next(grads) if is_wanted else None for is_wanted in wanted], *ctx.nothing


def _save_pointwise_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad_output, operands, *ctx.options = inputs
    ctx.nothing = _no_gradients(inputs[2:])
    ctx.save_for_backward(grad_output, *operands)


def _pointwise_backward_gradients(ctx: Any, grads: Sequence[Tensor]) -> _Gradients:
    of_grad_output, *of_operands = _second_derivative(
        lambda g, *operands: _pointwise_composed_gradients(g, operands, *ctx.options), ctx.saved_tensors, grads
    )
    return of_grad_output, of_operands, *ctx.nothing


def _nll_loss_of_input(
    target: Tensor, weight: Tensor | None, dtype: torch.dtype, options: Sequence[int]
) -> Callable[[Tensor], Tensor]:
    """The loss in this dtype, as a function of the input.

    The input is made contiguous, because torch cannot differentiate this loss of a channels-last input.
    """
    reduction, ignore_index = options
    weight = None if weight is None else weight.to(dtype)
    target = target.to(torch.int64)
    return lambda x: torch_nll_loss(
        x.to(dtype).contiguous(), target, weight, ignore_index=ignore_index, reduction=_REDUCTIONS[reduction]
    )


def _nll_loss_composed_gradient(
    grad_output: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> Tensor:
    loss = _nll_loss_of_input(target, weight, grad_output.dtype, (reduction, ignore_index))
    return _gradients(loss, [input], [True], grad_output)[0]


def _save_nll_loss_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, target, weight, *ctx.options, _ = inputs
    ctx.save_for_backward(input, target, weight, output[1])


def _nll_loss_forward_gradients(ctx: Any, grad_output: Tensor, _: Tensor) -> _Gradients:
    _refuse_gradients("nll_loss_forward", ctx.needs_input_grad[2])
    input, target, weight, total_weight = ctx.saved_tensors
    if torch.is_grad_enabled():  # the backward op lacks input, whose second derivative must be 0, not None
        grad = torch.ops.fusedloss.nll_loss_composed_gradient(grad_output, input, target, weight, *ctx.options)
    else:
        grad = torch.ops.fusedloss.nll_loss_backward(
            grad_output, target, weight, total_weight, input.shape, input.stride(), input.dtype, *ctx.options
        )
    return grad, *(None,) * 5


def _save_nll_loss_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, target, weight, *_, reduction, ignore_index = inputs
    ctx.save_for_backward(target, weight)
    ctx.dtype, ctx.options = grad_output.dtype, (reduction, ignore_index)


def _nll_loss_backward_gradients(ctx: Any, grad: Tensor) -> _Gradients:
    """The gradient is linear in grad_output, so the derivative for grad_output is the loss, with grad as its input."""
    target, weight = ctx.saved_tensors
    loss = _nll_loss_of_input(target, weight, ctx.dtype, ctx.options)
    return loss(grad), *(None,) * 8


_define_composed_gradient(
    "cross_entropy_composed_gradient",
    "(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, int reduction, int ignore_index,"
    " float label_smoothing) -> Tensor",
    _cross_entropy_composed_gradient,
)
_define_composed_gradient(
    "pointwise_composed_gradients",
    "(Tensor grad_output, Tensor[] operands, str loss, float[] parameters, int reduction, SymInt? divisor,"
    " bool[] wanted) -> Tensor[]",
    _pointwise_composed_gradients,
)
_define_composed_gradient(
    "nll_loss_composed_gradient",
    "(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, int reduction, int ignore_index) -> Tensor",
    _nll_loss_composed_gradient,
)
# torch makes no batching rule for an op that takes lists.
for _key in ("FuncTorchBatched", "Batched"):
    _library.impl("pointwise_backward", _pointwise_composed_gradients, _key)

for _name, _derivative, _save in (
    ("cross_entropy_forward", _cross_entropy_forward_gradients, _save_cross_entropy_forward),
    ("cross_entropy_backward", _cross_entropy_backward_gradients, _save_cross_entropy_backward),
    ("pointwise_forward", _pointwise_forward_gradients, _save_pointwise_forward),
    ("pointwise_backward", _pointwise_backward_gradients, _save_pointwise_backward),
    ("nll_loss_forward", _nll_loss_forward_gradients, _save_nll_loss_forward),
    ("nll_loss_backward", _nll_loss_backward_gradients, _save_nll_loss_backward),
):
    torch.library.register_autograd(f"fusedloss::{_name}", _derivative, setup_context=_save)
