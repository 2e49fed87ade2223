"""A loss of your own: `custom_loss` compiles an expression into a fused kernel.

    criterion = fusedloss.custom_loss("where(abs(input - target) < delta, square(input - target), 0)", delta=1.0)

The expression is translated to a C++ formula like those of csrc/kernels/formulas/pointwise-inl.h. It is compiled once,
with the same kernels around it, and the cache of `fusedloss.jit` keeps the result under a hash of the formula. The
derivatives are computed from the formula as well.
"""

import ctypes
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import _reduction
from torch.overrides import handle_torch_function, has_torch_function

from . import _backend, jit, pointwise_registry
from ._build import BuildError, Plan, make_plan
from ._dispatch import fused
from ._torchscript import Scriptable, common_dtype, scriptable_class
from .expression import Expression, parse, to_cpp, to_torch

# Tensors that an expression may use without naming them in `tensors`.
USUAL_TENSORS = ("input", "target", "weight", "mask")
_SECONDS = {"cpu": 8, "cuda": 40}  # about how long it takes to compile one loss


def custom_loss(
    expression: str,
    *,
    reduction: str = "mean",
    tensors: Sequence[str] = (),
    derivative: Mapping[str, str] | None = None,
    **parameters: float,
) -> "CustomLoss":
    """An `nn.Module` for a loss of your own, computed by a fused kernel that is compiled from `expression`.

    >>> criterion = fusedloss.custom_loss("log(cosh(input - target))")
    >>> criterion = fusedloss.custom_loss("weight * maximum(q * (target - input), (q - 1) * (target - input))", q=0.9)
    >>> loss = criterion(input, target, weight=weight)

    The call compiles the loss for the CPU and, if a CUDA toolkit and a GPU are found, for CUDA. The first time, this
    takes some seconds for the CPU and about 40 for CUDA; afterwards the loss is found in the cache. If the last
    upstream gradient was 1, the forward pass also computes the gradients, and memory is read once; otherwise each pass
    reads it once. Both passes are vectorised and sum in float64. The loss works under autocast,
    `torch.compile(fullgraph=True)`, `torch.func` and forward-mode AD, and with `torch.jit.script` and `torch.fx`. It
    has second derivatives, which are composed of torch's operations.

    Args:
        expression: the loss of one element, in Python's syntax. It may contain `input`, `target`, the further names
            below, numbers, `pi`, `+ - * / **`, comparisons joined by `&`, `|` and `~`, and calls of the functions in
            `fusedloss.expression.FUNCTIONS`: `where(condition, a, b)`, `abs`, `exp`, `log`, `maximum`, `clamp`,
            `softplus`, … These are torch's functions of the same names, with torch's derivatives at kinks: 0 for abs
            at 0, and half for each of two equal arguments of maximum. The derivative of clamp at its bounds is that of
            the installed torch (2.14 changed it). Unlike in torch, the branch that `where` does not choose never
            contributes to the derivative; in torch it gives NaN if its own derivative is infinite.
        reduction: 'none', 'mean' (by the number of elements) or 'sum'. Default 'mean'.
        tensors: names of further tensors. `weight` and `mask` need not be named.
        derivative: derivatives by hand, as an expression for each tensor: `{"input": "sign(input - target)"}`. A tensor
            that is not in it has no derivative then. Default: the derivatives of the expression.
        parameters: named numbers in the expression. They become attributes of the module, which each call reads. They
            are not compiled in: `criterion.q = 0.8` takes effect at once.

    Returns:
        A module, called as `criterion(input, target, weight=…)`. The tensors broadcast. Float types are promoted as
        torch promotes them, and integers and bool are converted to the result of that. The loss is a scalar, or with
        'none' has the broadcast shape. It has the promoted dtype. Under autocast it is float32, but a float64 loss
        stays float64.

    Raises:
        ValueError: the expression contains something that is not allowed, to which the message points; a name cannot be
            used; or reduction is unknown. All of this is checked before a compiler runs.
        TypeError: the expression is not a str, or a parameter is not a number.
        RuntimeError: there is no compiler, or compiling failed.
    """
    return CustomLoss(expression, reduction, tensors, derivative, parameters)


class CustomLoss(nn.Module):
    """The module that `custom_loss` returns. `custom_loss` documents it."""

    parameter_names: tuple[str, ...] = ()
    _formula: "_Formula | None" = None
    _name = ""

    def __init__(
        self,
        expression: str,
        reduction: str,
        tensors: Sequence[str],
        derivative: Mapping[str, str] | None,
        parameters: Mapping[str, float],
    ) -> None:
        super().__init__()
        _reduction.get_enum(reduction)
        if isinstance(tensors, str):
            raise TypeError(f"custom_loss: tensors must be a sequence of names, not the str {tensors!r}")
        self.expression = expression
        self.reduction = reduction
        self.tensors = tuple(tensors)
        if not isinstance(derivative, Mapping | None):
            raise TypeError(f"custom_loss: derivative must map names to expressions, got {type(derivative).__name__}")
        self.derivative = dict(derivative) if derivative is not None else None
        for name in parameters:
            if hasattr(self, name):
                raise ValueError(
                    f"custom_loss: parameter {name!r} is an attribute of every module; choose another name"
                )
        self.parameter_names = tuple(parameters)
        for name, value in parameters.items():
            setattr(self, name, value)
        self._prepare()
        pointwise_registry.number_of(self._name)

    def forward(self, input: Tensor, target: Tensor | None = None, **tensors: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            return self._recorded(input, target, tensors)
        formula = self._formula
        assert formula is not None
        given = {"input": input, **tensors} if target is None else {"input": input, "target": target, **tensors}
        operands = [given[name] for name in formula.operands if isinstance(given.get(name), Tensor)]
        if not len(given) == len(operands) == len(formula.operands):
            self._check_tensors(given)
            if len(operands) < len(formula.operands):
                return self._recorded(input, target, tensors)
        if any(operand.dtype != input.dtype for operand in operands) or not input.dtype.is_floating_point:
            dtype = common_dtype(operands)
            operands = [operand.to(dtype) for operand in operands]
        parameters = [getattr(self, name) for name in formula.parameters]
        loss = fused(self._name, operands, self.reduction, parameters)
        return self._composed(operands, parameters) if loss is None else loss

    def __setattr__(self, name: str, value: Any) -> None:
        if self._formula is not None and name in ("expression", "tensors", "derivative"):
            raise AttributeError(f"custom_loss: {name} is compiled in and cannot be changed; make another module")
        if name in self.parameter_names:
            value = _number(name, value)
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        parameters = "".join(f", {name}={getattr(self, name)}" for name in self.parameter_names)
        return f"{self.expression!r}, reduction={self.reduction!r}{parameters}"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_formula"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._prepare()

    def _prepare(self) -> None:
        self._formula = formula = _formula(self.expression, self.tensors, self.derivative, self.parameter_names)
        self._name = formula.name  # stored, because the compiler cannot trace how it is made
        pointwise_registry.add(
            pointwise_registry.PointwiseLoss(self._name, formula.elementwise, formula.compiled, formula.operands)
        )

    def _check_tensors(self, given: Mapping[str, Tensor | None]) -> None:
        assert self._formula is not None
        known = tuple(dict.fromkeys((*USUAL_TENSORS[:2], *self._formula.operands)))
        for name in given:
            if name not in known:
                raise TypeError(f"custom_loss: {self.expression!r} has no tensor {name!r}, expected {', '.join(known)}")
        for name in self._formula.operands:
            tensor = given.get(name)
            if tensor is None:
                raise TypeError(f"custom_loss: {self.expression!r} needs the tensor {name!r}, which is not given")
            if not isinstance(tensor, Tensor) and not has_torch_function((tensor,)):
                raise TypeError(f"custom_loss: {name!r} must be a tensor, got {type(tensor).__name__}")

    def _recorded(self, input: Tensor, target: Tensor | None, tensors: Mapping[str, Tensor]) -> Tensor:
        """A call with something that stands for a tensor, such as a proxy of torch.fx."""
        if isinstance(tensors, dict):  # it is a proxy if torch.fx traces this module itself
            self._check_tensors({"input": input, **({} if target is None else {"target": target}), **tensors})
        derivative = None if self.derivative is None else tuple(self.derivative.items())
        parameters = tuple((name, getattr(self, name)) for name in self.parameter_names)
        options = (self.expression, self.reduction, self.tensors, derivative, parameters)
        return custom_loss_of(*options, input, target, tensors)

    def __prepare_scriptable__(self) -> Scriptable:
        assert self._formula is not None
        parameters = {name: getattr(self, name) for name in self.parameter_names}
        made = (CustomLoss, (self.expression, self.reduction, self.tensors, self.derivative, parameters))
        used = [parameters[name] for name in self._formula.parameters]
        return self._formula.scriptable(self._name, self.reduction, used, made)

    def _composed(self, operands: list[Tensor], parameters: list[float]) -> Tensor:
        """The loss, composed of torch's operations."""
        input = operands[0]
        device = input.device.type
        if (
            torch.amp.is_autocast_available(device)
            and torch.is_autocast_enabled(device)
            and input.dtype != torch.float64
        ):
            operands = [operand.float() for operand in operands]
        return pointwise_registry.composed(self._name, operands, parameters, _reduction.get_enum(self.reduction), None)


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(
            f"custom_loss: parameter {name!r} would get no gradient; pass what is learned as one of the `tensors`"
        )
    if isinstance(value, bool | str | bytes) or (isinstance(value, Tensor) and value.dim() > 0):
        raise TypeError(f"custom_loss: parameter {name!r} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"custom_loss: parameter {name!r} must be a number, got {type(value).__name__}") from None


_losses: dict[tuple[object, ...], CustomLoss] = {}  # by the options of custom_loss_of


def custom_loss_of(
    expression: str,
    reduction: str,
    tensors: tuple[str, ...],
    derivative: tuple[tuple[str, str], ...] | None,
    parameters: tuple[tuple[str, float], ...],
    input: Tensor,
    target: Tensor | None,
    others: Mapping[str, Tensor],
) -> Tensor:
    """The function that a graph of torch.fx calls for a custom loss."""
    options = (expression, reduction, tensors, derivative, parameters)
    if options not in _losses:
        by_hand = None if derivative is None else dict(derivative)
        _losses[options] = CustomLoss(expression, reduction, tensors, by_hand, dict(parameters))
    given = (input, target, *(others.values() if isinstance(others, dict) else [others]))
    if all(isinstance(tensor, (Tensor, type(None))) for tensor in given):
        return _losses[options].forward(input, target, **others)
    return handle_torch_function(custom_loss_of, given, *options, input, target, others)


# ---- from an expression to a formula


@dataclass(frozen=True)
class _Formula:
    expression: Expression
    operands: tuple[str, ...]  # the tensors that it uses, input first
    parameters: tuple[str, ...]
    slopes: dict[str, Expression] = field(hash=False)  # the derivatives by hand; empty if there are none

    @functools.cached_property
    def name(self) -> str:
        """The name in graphs: the expression, and a digest that differs if anything in the formula differs."""
        return f"custom_loss({self.expression.text.strip()})#{hashlib.sha256(self.cpp().encode()).hexdigest()[:12]}"

    def elementwise(self, *arguments: Any) -> Tensor:
        value, slopes = self._torch_functions
        if not slopes:
            return value(*arguments)
        # torch does not annotate `apply`.
        loss: Tensor = _GivenDerivative.apply(  # type: ignore[no-untyped-call]
            value, slopes, len(self.operands), *arguments
        )
        return loss

    @functools.cached_property
    def _torch_functions(self) -> tuple[Callable[..., Tensor], tuple[Callable[..., Tensor] | None, ...]]:
        """Cached: a traced call must have the same objects as the call before for arguments that are not tensors."""
        names = (*self.operands, *self.parameters)
        slopes = {name: to_torch(slope, names) for name, slope in self.slopes.items()}
        return to_torch(self.expression, names), tuple(slopes.get(name) for name in self.operands if slopes)

    @functools.cached_property
    def scriptable(self) -> type[Scriptable]:
        return scriptable_class(self.name, self.expression, self.operands, self.parameters, bool(self.slopes))

    def cpp(self) -> str:
        """The formula as C++, for a header in place of csrc/kernels/formulas/pointwise-inl.h."""
        names = [*self.operands, *self.parameters]
        types = ", ".join(f"typename T{i}" for i in range(len(names)))
        arguments = ", ".join(f"T{i} argument_{name}" for i, name in enumerate(names))
        return _FORMULA.format(
            operands=len(self.operands),
            parameters=len(self.parameters),
            types=types,
            arguments=arguments,
            body=self._body(names),
        )

    def _body(self, names: Sequence[str]) -> str:
        value = to_cpp(self.expression)
        if not self.slopes:
            return f"return {value};"
        plain = ", ".join(f"auto argument_{name}" for name in names)
        values = ", ".join(f"plain(argument_{name})" for name in names)

        def without_derivative(expression: str) -> str:
            return f"[&]({plain}) {{ return {expression}; }}({values})"

        result = without_derivative(value)
        for name, slope in self.slopes.items():
            result = f"with_slope({result}, {without_derivative(to_cpp(slope))}, argument_{name})"
        return f"return {result};"

    def compiled(self) -> tuple[int, int]:
        """The addresses of the compiled formulas for the CPU and for CUDA, which is 0 without CUDA."""
        cuda = None if _backend.extension().with_cuda else False
        try:
            plan = make_plan(cuda=cuda, needs_gpu=True)
            with _backend.lock:
                return _load(self, plan)
        except BuildError as error:
            raise RuntimeError(f"fusedloss: {self.expression.text!r} cannot be compiled: {error}") from None


def _formula(
    expression: str, tensors: Sequence[str], derivative: Mapping[str, str] | None, parameters: Sequence[str]
) -> _Formula:
    if "self" in tensors:
        raise ValueError("custom_loss: tensor 'self' cannot be passed by name to a module; choose another name")
    known = (*USUAL_TENSORS, *tensors)
    known = tuple(name for name in dict.fromkeys(known) if name not in parameters or name in ("input", "target"))
    loss = parse(expression, known, parameters)
    slopes = {}
    for name, text in (derivative or {}).items():
        if name not in known:
            raise ValueError(
                f"custom_loss: derivative by {name!r}, which is no tensor; the tensors are {', '.join(known)}"
            )
        slopes[name] = parse(text, known, parameters, is_loss=False)
    used = {name for one in (loss, *slopes.values()) for name in one.names} | set(slopes)
    operands = tuple(name for name in known if name in used)
    extension = _backend.extension()
    if len(operands) > extension.max_operands or len(parameters) > extension.max_parameters:
        raise ValueError(
            f"custom_loss: got {len(operands)} tensors and {len(parameters)} parameters, "
            f"expected at most {extension.max_operands} and {extension.max_parameters}"
        )
    if derivative is not None and not slopes:
        raise ValueError("custom_loss: derivative is empty, expected an expression for at least one tensor")
    return _Formula(loss, operands, tuple(name for name in parameters if name in used), slopes)


class _GivenDerivative(torch.autograd.Function):
    """Computes a formula with torch's operations; its derivatives are given by hand."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        value: Callable[..., Tensor],
        slopes: Sequence[Callable[..., Tensor] | None],
        operands: int,
        *arguments: Any,
    ) -> Tensor:
        return value(*torch.broadcast_tensors(*arguments[:operands]), *arguments[operands:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.slopes, operands, *arguments = inputs
        ctx.parameters = arguments[operands:]
        ctx.save_for_backward(*arguments[:operands])
        ctx.save_for_forward(*arguments[:operands])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        operands = ctx.saved_tensors
        grads = [
            None
            if slope is None or not needed
            else (grad_output * slope(*operands, *ctx.parameters)).sum_to_size(operand.shape)
            for slope, operand, needed in zip(ctx.slopes, operands, ctx.needs_input_grad[3:], strict=False)
        ]
        return None, None, None, *grads, *(None for _ in ctx.parameters)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        operands = torch.broadcast_tensors(*ctx.saved_tensors)
        result = torch.zeros_like(operands[0])
        for slope, tangent in zip(ctx.slopes, tangents[3:], strict=False):
            if slope is not None and tangent is not None:
                result = result + tangent * slope(*operands, *ctx.parameters)
        return result


# ---- from a formula to a library

_FORMULA = """\
struct CustomLoss {{
  static constexpr int kOperands = {operands}, kParameters = {parameters};
  template <typename V, {types}>
  static FUSEDLOSS_INLINE auto loss({arguments}) {{
    {body}
  }}
}};
#define FUSEDLOSS_POINTWISE_LOSSES(X) X(custom_loss, CustomLoss)
"""

_HEADER = """\
#include "kernels/formulas/dual_functions-inl.h"

FUSEDLOSS_BEGIN_NAMESPACE
namespace {{
{formula}}}
FUSEDLOSS_END_NAMESPACE
"""

_CPU_SOURCE = """\
#define FUSEDLOSS_FORMULAS "formula-inl.h"
#define FUSEDLOSS_KERNELS "kernels/cpu/pointwise_formula_table-inl.h"
#include "kernels/cpu/foreach_instruction_set.h"

namespace fusedloss::cpu {{
extern "C" __attribute__((visibility("default"))) const PointwiseFormula {symbol};
extern "C" const PointwiseFormula {symbol} = FUSEDLOSS_FORMULA_TABLE(custom_loss);
}}
"""

_CUDA_SOURCE = """\
#include "formula-inl.h"
#include "kernels/cuda/pointwise.cuh"

namespace fusedloss::cuda {{
extern "C" __attribute__((visibility("default"))) const PointwiseFormula {symbol};
extern "C" const PointwiseFormula {symbol} = kPointwise<CustomLoss>;
}}
"""

_libraries: dict[str, tuple[int, int]] = {}


def _load(formula: _Formula, plan: Plan) -> tuple[int, int]:
    header = _HEADER.format(formula=formula.cpp())
    key = jit.cache_key(plan, {"formula-inl.h": header})
    if key not in _libraries:
        symbols = [f"fusedloss_on_{device}_{key}" for device in ("cpu", "cuda")]
        generated = {"formula-inl.h": header, "on_cpu.cpp": _CPU_SOURCE.format(symbol=symbols[0])}
        if plan.toolkit:
            generated["on_cuda.cu"] = _CUDA_SOURCE.format(symbol=symbols[1])
        text = formula.expression.text.strip()
        build = jit.Build(
            plan,
            name=f"fusedloss_custom_{key}",
            folder=jit.cache_directory() / f"custom-{plan.device}-{key}",
            says=text if len(text) <= 60 else f"{text[:57]}...",
            seconds=_SECONDS[plan.device],
            opens=lambda library: _addresses(library, symbols),
            generated=generated,
        )
        _libraries[key] = jit.compiled(build)
    return _libraries[key]


def _addresses(library: Path, symbols: Sequence[str]) -> tuple[int, int]:
    opened = ctypes.CDLL(str(library))  # never closed
    found = []
    for symbol in symbols:
        try:
            found.append(ctypes.addressof(ctypes.c_char.in_dll(opened, symbol)))
        except ValueError:  # compiled without CUDA
            found.append(0)
    return found[0], found[1]
