"""Custom losses for TorchScript, composed of torch's operations: it cannot compile a call into an extension.

TorchScript compiles the source text of functions, so `scriptable_class` writes such a text for each formula.
"""

import linecache
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import _reduction

from .expression import Expression, to_torchscript


class Scriptable(nn.Module):
    """What TorchScript compiles in place of a custom loss. `scriptable_class` makes its subclasses."""

    def __init__(self, name: str, reduction: str, parameters: Sequence[float], remake: tuple[Any, ...]) -> None:
        super().__init__()
        self.name = name
        self.reduction = _reduction.get_enum(reduction)
        for i, value in enumerate(parameters):
            setattr(self, f"parameter_{i}", value)
        self.remake = remake

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy it as the custom loss: torch.jit.script leaves this module in the model that it was given."""
        return self.remake

    def elementwise(self, operands: list[Tensor]) -> Tensor:
        """The loss of each element. A subclass whose derivative is not given by hand overrides it."""
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
        """The loss computed by the registered op. torch's operations would not have the derivative given by hand."""
        common = common_dtype(operands)
        operands = torch.ops.aten.broadcast_tensors([operand.to(common) for operand in operands])
        loss: Tensor = torch.ops.fusedloss.pointwise_forward(
            operands, self.name, parameters, self.reduction, None, False
        )
        return loss


def _loss_dtype(zero: Tensor) -> torch.dtype:
    """The dtype of torch's own loss of such a tensor, which is float32 under autocast.

    In TorchScript, asking for autocast itself is not possible: a call of is_autocast_cpu_enabled ends in a segmentation
    fault.
    """
    loss: Tensor = torch.ops.aten.mse_loss(zero, zero)
    return loss.dtype


def common_dtype(operands: list[Tensor]) -> torch.dtype:
    """The dtype to which torch promotes these operands.

    A 0-dim operand does not widen the others. Integers and bool count only if all operands have such a type: the result
    is then the default dtype.
    """
    common = torch.empty([], device="cpu").dtype  # the default dtype; TorchScript has no function for it
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
    """A subclass of `Scriptable` for this expression. by_hand: its derivative is given by hand."""
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
    linecache.cache[text_of] = (len(source), None, source.splitlines(keepends=True), text_of)  # where TorchScript looks
    names: dict[str, Any] = {"Tensor": Tensor, **functions}
    exec(compile(source, text_of, "exec"), names)
    methods: dict[str, Any] = {key: names[key] for key in ("elementwise", "forward") if key in names}
    return type("ScriptableLoss", (Scriptable,), methods)
