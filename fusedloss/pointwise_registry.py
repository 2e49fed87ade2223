"""The pointwise losses by name: those of csrc/kernels/formulas/pointwise-inl.h, and those of a user's expression.

Graphs refer to a loss by its name. The extension refers to it by a number, which it assigns at the first use.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _backend


@dataclass(frozen=True)
class PointwiseLoss:
    name: str
    # Called with the operands and the parameters; returns each element's loss, composed of torch's operations.
    elementwise: Callable[..., Tensor]
    # Returns the addresses of the formulas for the CPU and for CUDA. Both are 0 if the loss is the extension's own.
    formulas: Callable[[], tuple[int, int]] = lambda: (0, 0)
    operands: tuple[str, ...] = ("input", "target")  # their names, for messages


_losses: dict[str, PointwiseLoss] = {}
_numbers: dict[ModuleType, dict[str, int]] = {}
_without_cuda: set[tuple[ModuleType, str]] = set()  # losses registered without a CUDA formula


def add(loss: PointwiseLoss) -> None:
    _losses[loss.name] = loss


def number_of(name: str) -> int:
    """The number of this loss in the extension in use."""
    extension = _backend.extension()
    numbers = _numbers.get(extension)
    if numbers is None:
        numbers = _numbers.setdefault(extension, {})
    number = numbers.get(name)
    if number is None:
        with _backend.lock:
            number = numbers.get(name)
            if number is None:
                loss = _losses[name]
                on_cpu, on_cuda = loss.formulas()
                if on_cpu != 0 and on_cuda == 0:
                    _without_cuda.add((extension, name))
                number = numbers[name] = extension.add_pointwise_loss(name, loss.operands, on_cpu, on_cuda)
    return number


@_backend.called_by_compiler
def is_compiled_for(name: str, device_type: str) -> bool:
    """True if the loss is compiled for this type of device. Without nvcc or a GPU a custom loss is not, for CUDA."""
    number_of(name)
    return device_type != "cuda" or (_backend.extension(), name) not in _without_cuda


def composed(
    name: str, operands: Sequence[Tensor], parameters: Sequence[float], reduction: int, divisor: int | None
) -> Tensor:
    """The loss, composed of torch's operations. `reduction` is torch's number for it.

    16-bit operands are widened, so that the loss and the gradients are rounded only once.
    """
    dtype = operands[0].dtype
    wide = [operand.float() if operand.dtype in (torch.bfloat16, torch.float16) else operand for operand in operands]
    loss = _losses[name].elementwise(*wide, *parameters)
    if reduction == 1:
        loss = loss.mean() if divisor is None else loss.sum() / divisor
    elif reduction == 2:
        loss = loss.sum()
    return loss.to(dtype)


# ---- the losses of this library
#
# They are composed of torch's own functions, which are read here before `patch` can replace them.


def _torch_elementwise(function: Callable[..., Tensor], *names: str, **options: object) -> Callable[..., Tensor]:
    """The function as one of positional arguments: the operands, then parameters with these names."""

    def elementwise(*arguments: object) -> Tensor:
        operands, parameters = arguments[: len(arguments) - len(names)], arguments[len(arguments) - len(names) :]
        return function(*operands, **dict(zip(names, parameters, strict=True)), **options, reduction="none")

    return elementwise


# torch's own functions for the next losses lack the derivative by some operand, or give NaN where the kernels do not.


def _weighted_bce(input: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor) -> Tensor:
    return -weight * ((1 - target) * F.logsigmoid(-input) + pos_weight * target * F.logsigmoid(input))


def _soft_margin(input: Tensor, target: Tensor) -> Tensor:
    return -F.logsigmoid(target * input)


_poisson = F.poisson_nll_loss


def _full_poisson(input: Tensor, target: Tensor, eps: float, log_input: bool) -> Tensor:
    large = torch.where(target <= 1, 2, target)
    stirling = large * torch.log(large) - large + 0.5 * torch.log(2 * math.pi * large)
    return _poisson(input, target, log_input=log_input, eps=eps, reduction="none") + torch.where(
        target <= 1, 0, stirling
    )


def _gaussian(input: Tensor, target: Tensor, var: Tensor, eps: float, constant_part: float) -> Tensor:
    raised = torch.where(var < eps, eps + (var - var.detach()), var)  # keeps the derivative of var, as torch does
    return 0.5 * (torch.log(raised) + (input - target) ** 2 / raised) + constant_part


_OTHER_OPERANDS = {
    "weighted_binary_cross_entropy_with_logits": ("input", "target", "weight", "pos_weight"),
    "gaussian_nll_loss": ("input", "target", "var"),
}

GAUSSIAN_CONSTANT = 0.5 * math.log(2 * math.pi)

_ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    "mse_loss": _torch_elementwise(F.mse_loss),
    "l1_loss": _torch_elementwise(F.l1_loss),
    "smooth_l1_loss": _torch_elementwise(F.smooth_l1_loss, "beta"),
    "huber_loss": _torch_elementwise(F.huber_loss, "delta"),
    "binary_cross_entropy_with_logits": _torch_elementwise(F.binary_cross_entropy_with_logits),
    "weighted_binary_cross_entropy_with_logits": _weighted_bce,
    "kl_div": _torch_elementwise(F.kl_div),
    "kl_div_log_target": _torch_elementwise(F.kl_div, log_target=True),
    "poisson_nll_loss": _torch_elementwise(F.poisson_nll_loss, "eps"),
    "poisson_nll_loss_full": functools.partial(_full_poisson, log_input=True),
    "poisson_nll_loss_of_rate": _torch_elementwise(F.poisson_nll_loss, "eps", log_input=False),
    "poisson_nll_loss_of_rate_full": functools.partial(_full_poisson, log_input=False),
    "gaussian_nll_loss": _gaussian,
    "soft_margin_loss": _soft_margin,
}
for _name, _elementwise in _ELEMENTWISE.items():
    add(PointwiseLoss(_name, _elementwise, operands=_OTHER_OPERANDS.get(_name, ("input", "target"))))
