"""A custom loss for TorchScript, which compiles no call into an extension: the same, composed of torch's operations.

TorchScript compiles the text of functions, so that a text is printed for each formula.
"""

import linecache
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import _reduction

from .expression import Expression, to_torchscript


class Scriptable(nn.Module):
    """What TorchScript is given in the place of a custom loss. Its subclasses are made by `scriptable_class`."""

    def __init__(self, name: str, reduction: str, parameters: Sequence[float], remake: tuple[Any, ...]) -> None:
        super().__init__()
        self.name = name
        self.reduction = _reduction.get_enum(reduction)
        for i, value in enumerate(parameters):
            setattr(self, f"parameter_{i}", value)
        self.remake = remake

    def __reduce__(self) -> tuple[Any, ...]:
        """torch.jit.script leaves it in the model it was given; a copy of that has the custom loss again."""
        return self.remake

    def elementwise(self, operands: list[Tensor]) -> Tensor:
        """The loss of each element, without reduction. Each subclass has its own."""
        raise NotImplementedError

    def reduced(self, operands: list[Tensor]) -> Tensor:
        common = common_dtype(operands)
        wide = torch.float32 if common in (torch.bfloat16, torch.float16) else common
        operands = [operand.to(common).to(wide) for operand in operands]
        loss = self.elementwise(operands)
        if self.reduction == 1:
            loss = loss.mean()
        elif self.reduction == 2:
            loss = loss.sum()
        return loss.to(_loss_dtype(operands[0].new_zeros([], dtype=common)))

    def by_kernels(self, operands: list[Tensor], parameters: list[float]) -> Tensor:
        """By the registered op, since a derivative by hand is not that of any of torch's operations."""
        common = common_dtype(operands)
        operands = torch.ops.aten.broadcast_tensors([operand.to(common) for operand in operands])
        loss: Tensor = torch.ops.fusedloss.pointwise_forward(
            operands, self.name, parameters, self.reduction, None, False
        )
        return loss


def _loss_dtype(zero: Tensor) -> torch.dtype:
    """The type of torch's own loss of such a tensor: float32 under autocast, which TorchScript cannot be asked about (a
    call of is_autocast_cpu_enabled ends in a segmentation fault)."""
    loss: Tensor = torch.ops.aten.mse_loss(zero, zero)
    return loss.dtype


def common_dtype(operands: list[Tensor]) -> torch.dtype:
    """As torch promotes float types: one value of no dimension does not widen the others. Integers and bool take part
    only where there is no other."""
    common = torch.empty([], device="cpu").dtype  # the default one, for which TorchScript has no function
    rank = -1
    for operand in operands:
        if operand.is_floating_point() or operand.is_complex():
            own = min(operand.dim(), 1)
            if own > rank:
                common, rank = operand.dtype, own
            elif own == rank:
                common = torch.promote_types(common, operand.dtype)
    return common


_ELEMENTWISE = """\
def elementwise(self, operands: list[Tensor]) -> Tensor:
    {arguments}
    return {formula}

def forward(self, {signature}) -> Tensor:
    return self.reduced([{operands}])
"""

_BY_KERNELS = """\
def forward(self, {signature}) -> Tensor:
    return self.by_kernels([{operands}], [{parameters}])
"""


def scriptable_class(
    name: str, expression: Expression, operands: Sequence[str], parameters: Sequence[str], by_hand: bool
) -> type[Scriptable]:
    """by_hand: its derivative is."""
    own = {key: f"self.parameter_{i}" for i, key in enumerate(parameters)}
    signature = ["input: Tensor", "target: Tensor" if "target" in operands else "target: Tensor | None = None"]
    others = [f"{operand}: Tensor" for operand in operands if operand not in ("input", "target")]
    formula, functions = to_torchscript(expression)
    arguments = [f"argument_{operand} = operands[{i}]" for i, operand in enumerate(operands)]
    arguments += [f"argument_{key} = function_tensor({value}, argument_input)" for key, value in own.items()]
    source = (_BY_KERNELS if by_hand else _ELEMENTWISE).format(
        signature=", ".join([*signature, *(["*", *others] if others else [])]),
        operands=", ".join(operands),
        parameters=", ".join(own.values()),
        arguments="\n    ".join(arguments),
        formula=formula,
    )
    text_of = f"<custom_loss {name.partition('#')[2]}>"
    linecache.cache[text_of] = (len(source), None, source.splitlines(keepends=True), text_of)  # TorchScript reads it
    names: dict[str, Any] = {"Tensor": Tensor, **functions}
    exec(compile(source, text_of, "exec"), names)
    methods: dict[str, Any] = {key: names[key] for key in ("elementwise", "forward") if key in names}
    return type("ScriptableLoss", (Scriptable,), methods)
