"""What autograd is told: the kernels as `torch.autograd.Function`s.

A Function is entered only where a gradient is wanted; otherwise the kernel is called as it is. Where a backward pass
is itself to be differentiated (create_graph), or its gradient is no plain tensor (is_grads_batched, a backward under a
dispatch mode), the gradient is composed of torch's own operations: it is exact, and autograd knows its derivative.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import _backend

_REDUCTIONS = ("none", "mean", "sum")  # by torch's numbers for them


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, label_smoothing: float
) -> Tensor:
    """Cross entropy of arguments that `cross_entropy_covers` admits; reduction is torch's number for it."""
    arguments = (input, target, weight, reduction, ignore_index, label_smoothing)
    if input.requires_grad and torch.is_grad_enabled():
        return CrossEntropy.apply(*arguments)
    return _backend.extension().cross_entropy_forward(*arguments)[0]


class CrossEntropy(Function):
    @staticmethod
    def forward(ctx, input, target, weight, reduction, ignore_index, label_smoothing):
        loss, statistics = _backend.extension().cross_entropy_forward(
            input, target, weight, reduction, ignore_index, label_smoothing
        )
        ctx.save_for_backward(input, target, weight, statistics)
        ctx.options = (reduction, ignore_index, label_smoothing)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        input, target, weight, statistics = ctx.saved_tensors
        reduction, ignore_index, label_smoothing = ctx.options
        if _must_compose(grad_output):
            grad = _composed_cross_entropy_gradient(grad_output, input, target, weight, *ctx.options)
        else:
            grad = _backend.extension().cross_entropy_backward(
                grad_output, input, target, weight, statistics, reduction, ignore_index, label_smoothing
            )
        return grad, None, None, None, None, None


def mse_loss(input: Tensor, target: Tensor, reduction: int) -> Tensor:
    """Squared error of arguments of one shape that `mse_loss_covers` admits; reduction is torch's number for it."""
    if (input.requires_grad or target.requires_grad) and torch.is_grad_enabled():
        return MSELoss.apply(input, target, reduction)
    return _backend.extension().mse_loss_forward(input, target, reduction)


class MSELoss(Function):
    @staticmethod
    def forward(ctx, input, target, reduction):
        ctx.save_for_backward(input, target)
        ctx.reduction = reduction
        return _backend.extension().mse_loss_forward(input, target, reduction)

    @staticmethod
    def backward(ctx, grad_output):
        input, target = ctx.saved_tensors
        if _must_compose(grad_output):
            grad_input, grad_target = _composed_mse_gradients(
                grad_output, input, target, ctx.reduction, ctx.needs_input_grad[:2]
            )
        else:
            grad_input, grad_target = _backend.extension().mse_loss_backward(
                grad_output, input, target, ctx.reduction, *ctx.needs_input_grad[:2]
            )
        return grad_input, grad_target, None


def _must_compose(grad_output: Tensor) -> bool:
    return torch.is_grad_enabled() or not _backend.extension().is_plain(grad_output)


def _gradients(loss: Callable[[], Tensor], of: Sequence[Tensor], grad_output: Tensor) -> tuple[Tensor, ...]:
    """The gradients of torch's loss, themselves differentiable where this backward pass has to be."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        return torch.autograd.grad(loss(), of, grad_output, create_graph=create_graph)


def _composed_cross_entropy_gradient(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    dtype = grad_output.dtype  # float32 where the forward pass ran under autocast

    def loss() -> Tensor:
        return F.cross_entropy(
            input.to(dtype),
            target.to(dtype if target.is_floating_point() else torch.int64),
            None if weight is None else weight.to(dtype),
            ignore_index=ignore_index,
            reduction=_REDUCTIONS[reduction],
            label_smoothing=label_smoothing,
        )

    return _gradients(loss, (input,), grad_output)[0]


def _composed_mse_gradients(
    grad_output: Tensor, input: Tensor, target: Tensor, reduction: int, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    dtype = grad_output.dtype

    def loss() -> Tensor:
        return F.mse_loss(input.to(dtype), target.to(dtype), reduction=_REDUCTIONS[reduction])

    of = [tensor for tensor, is_wanted in zip((input, target), wanted, strict=True) if is_wanted]
    grads = iter(_gradients(loss, of, grad_output))
    grad_input, grad_target = (next(grads) if is_wanted else None for is_wanted in wanted)
    return grad_input, grad_target
