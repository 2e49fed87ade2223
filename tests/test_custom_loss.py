"""Losses of one's own: compiled expressions against the same written in torch, wherever a loss can be called from."""

import copy
import io
import itertools
import math
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.draws import DTYPES, REDUCTIONS
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fusedloss
from fusedloss import _backend, custom, jit, ops
from fusedloss.expression import FUNCTIONS

ROOT = Path(fusedloss.__file__).parent.parent

# ---- the expressions, and the same in torch


@dataclass(frozen=True)
class Case:
    expression: str
    torch: Callable[..., Tensor]  # of input, target, the further tensors, and p, which has the parameters
    tensors: tuple[str, ...] = ()
    positive: tuple[str, ...] = ()  # tensors that are positive
    parameters: dict[str, float] = field(default_factory=dict)


CASES = {
    "absolute": Case("abs(input - target)", lambda i, t, p: (i - t).abs()),
    "squared": Case("weight * (input - target) ** 2", lambda i, t, w, p: w * (i - t) ** 2, ("weight",)),
    "log-cosh": Case("log(cosh(input - target))", lambda i, t, p: torch.log(torch.cosh(i - t))),
    "log-cosh, stable": Case(
        "abs(input - target) + softplus(-2 * abs(input - target)) - log(2)",
        lambda i, t, p: (i - t).abs() + F.softplus(-2 * (i - t).abs()) - math.log(2),
    ),
    "quantile": Case(
        "maximum(q * (target - input), (q - 1) * (target - input))",
        lambda i, t, p: torch.maximum(p.q * (t - i), (p.q - 1) * (t - i)),
        parameters={"q": 0.9},
    ),
    "charbonnier": Case(
        "sqrt(square(input - target) + eps ** 2)",
        lambda i, t, p: torch.sqrt((i - t) ** 2 + p.eps**2),
        parameters={"eps": 1e-2},
    ),
    "focal": Case(
        "-target * alpha * (1 - sigmoid(input)) ** gamma * logsigmoid(input)"
        " - (1 - target) * (1 - alpha) * sigmoid(input) ** gamma * logsigmoid(-input)",
        lambda i, t, p: (
            -t * p.alpha * (1 - torch.sigmoid(i)) ** p.gamma * F.logsigmoid(i)
            - (1 - t) * (1 - p.alpha) * torch.sigmoid(i) ** p.gamma * F.logsigmoid(-i)
        ),
        parameters={"alpha": 0.25, "gamma": 2.0},
    ),
    "cauchy": Case(
        "scale ** 2 / 2 * log1p(square((input - target) / scale))",
        lambda i, t, p: p.scale**2 / 2 * torch.log1p(((i - t) / p.scale) ** 2),
        parameters={"scale": 0.7},
    ),
    "welsch": Case("1 - exp(-0.5 * square(input - target))", lambda i, t, p: 1 - torch.exp(-0.5 * (i - t) ** 2)),
    "tukey": Case(
        "where(abs(input - target) <= c, c ** 2 / 6 * (1 - (1 - ((input - target) / c) ** 2) ** 3), c ** 2 / 6)",
        lambda i, t, p: torch.where(
            (i - t).abs() <= p.c, p.c**2 / 6 * (1 - (1 - ((i - t) / p.c) ** 2) ** 3), torch.full_like(i, p.c**2 / 6)
        ),
        parameters={"c": 1.5},
    ),
    "huber": Case(
        "where(abs(input - target) < delta, (input - target) ** 2 / 2, delta * (abs(input - target) - delta / 2))",
        lambda i, t, p: F.huber_loss(i, t, reduction="none", delta=p.delta),
        parameters={"delta": 0.5},
    ),
    "hinge": Case("relu(1 - target * input)", lambda i, t, p: torch.relu(1 - t * i)),
    "insensitive": Case(
        "clamp(abs(input - target) - eps, min=0)",
        lambda i, t, p: torch.clamp((i - t).abs() - p.eps, min=0),
        parameters={"eps": 0.5},
    ),
    "clipped": Case(
        "min(square(clamp(input, -1, 1) - target), limit) * weight",
        lambda i, t, w, p: torch.minimum((i.clamp(-1, 1) - t) ** 2, torch.full_like(i, p.limit)) * w,
        ("weight",),
        parameters={"limit": 1.0},
    ),
    "cross entropy": Case(
        "weight * (maximum(input, 0) - input * target + log1p(exp(-abs(input))))",
        lambda i, t, w, p: w * (torch.maximum(i, torch.zeros_like(i)) - i * t + torch.log1p(torch.exp(-i.abs()))),
        ("weight",),
    ),
    "poisson": Case("exp(input) - target * input", lambda i, t, p: torch.exp(i) - t * i),
    "gaussian": Case(
        "0.5 * (log(var) + square(input - target) / var) + log(2 * pi) / 2",
        lambda i, t, v, p: F.gaussian_nll_loss(i, t, v, full=True, eps=0, reduction="none"),
        ("var",),
        ("var",),
    ),
    "divergence": Case(
        "xlogy(target, target) - target * log(input)",
        lambda i, t, p: torch.special.xlogy(t, t) - t * torch.log(i),
        positive=("input", "target"),
    ),
    "wing": Case(
        "where(abs(input - target) < width, width * log1p(abs(input - target) / curve),"
        " abs(input - target) - width + width * log1p(width / curve))",
        lambda i, t, p: torch.where(
            (i - t).abs() < p.width,
            p.width * torch.log1p((i - t).abs() / p.curve),
            (i - t).abs() - p.width + p.width * math.log1p(p.width / p.curve),
        ),
        parameters={"width": 1.0, "curve": 0.5},
    ),
    "expectile": Case(
        "where(input > target, 1 - tau, tau) * square(input - target)",
        lambda i, t, p: torch.where(i > t, 1 - p.tau, p.tau) * (i - t) ** 2,
        parameters={"tau": 0.25},
    ),
    "power": Case(
        "(0.1 + abs(input - target)) ** p",
        lambda i, t, p: (0.1 + (i - t).abs()) ** p.p,
        parameters={"p": 1.3},
    ),
    "masked": Case(
        "where(mask, weight * abs(input - target), 0)",
        lambda i, t, w, m, p: torch.where(m != 0, w * (i - t).abs(), 0.0),
        ("weight", "mask"),
    ),
    "circular": Case(
        "1 - cos(input - target) + tan(0.1 * input)", lambda i, t, p: 1 - torch.cos(i - t) + (0.1 * i).tan()
    ),
    "bounded": Case(
        "atan(square(input - target)) + erf(abs(input)) * tanh(target) + rsqrt(1 + input ** 2)",
        lambda i, t, p: torch.atan((i - t) ** 2) + torch.erf(i.abs()) * torch.tanh(t) + torch.rsqrt(1 + i**2),
    ),
    "no target": Case("sinh(input) * sign(input)", lambda i, p: torch.sinh(i) * i.sign()),
}

GIVEN = {"input": "2 * weight * (input - target)", "weight": "square(input - target)"}

# One library for all functions: each is computed, and one chosen.
FUNCTIONS_OF_ONE = [name for name, function in FUNCTIONS.items() if function.arguments == 1]
FUNCTIONS_OF_TWO = ["pow(input, target)", "xlogy(input, target)", "input / target", "input ** 3", "input ** -2"]
CHOICES = [*(f"{name}(input)" for name in FUNCTIONS_OF_ONE), *FUNCTIONS_OF_TWO]
EVERYTHING = "0 * (input + target)"
for number, choice in enumerate(CHOICES):
    EVERYTHING = f"where(which == {number}, {choice}, {EVERYTHING})"

PRECOMPILE = """
import sys, fusedloss
fusedloss.custom_loss(EVERYTHING, which=0) if sys.argv[1] == "0" else fusedloss.custom_loss(*HAND, derivative=GIVEN)
for expression, tensors, parameters in CASES[int(sys.argv[1]) :: 2]:
    fusedloss.custom_loss(expression, tensors=tensors, **parameters)
"""
HAND = "weight * square(input - target)"


@pytest.fixture(scope="session", autouse=True)
def cache_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What is compiled here is kept, by its contents. The first time, two processes compile."""
    cache = getattr(request.config, "cache", None)
    folder = cache.mkdir("custom_loss") if cache else tmp_path_factory.mktemp("custom_loss")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSEDLOSS_CACHE_DIR", str(folder))
        if not any(folder.iterdir()):
            cases = [(case.expression, case.tensors, case.parameters) for case in CASES.values()]
            code = f"EVERYTHING, CASES, HAND, GIVEN = {(EVERYTHING, cases, [HAND], GIVEN)!r}\n{PRECOMPILE}"
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            processes = [subprocess.Popen([sys.executable, "-c", code, str(i)], env=environment) for i in range(2)]
            assert [process.wait() for process in processes] == [0, 0]
        yield folder


def made(name: str, reduction: str = "mean", **parameters: float) -> nn.Module:
    case = CASES[name]
    return fusedloss.custom_loss(
        case.expression, reduction=reduction, tensors=case.tensors, **(case.parameters | parameters)
    )


def by_torch(name: str, operands: dict[str, Tensor], reduction: str = "none", **parameters: float) -> Tensor:
    losses = CASES[name].torch(*operands.values(), SimpleNamespace(**CASES[name].parameters | parameters))
    return losses if reduction == "none" else getattr(losses, reduction)()


def drawn(
    name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, halves: bool = False
) -> dict[str, Tensor]:
    """Random operands. `halves`: multiples of 1/2, so that every kink and tie is met."""
    case = CASES[name]
    names = ["input", *(["target"] if "target" in case.expression else []), *case.tensors]
    operands = {}
    for one in names:
        values = torch.randint(-4, 5, shape).double() / 2 if halves else torch.randn(shape, dtype=torch.float64)
        if one in case.positive:
            values = values.abs() + 0.5
        if one == "mask":
            values = (torch.rand(shape) < 0.5).double()
        operands[one] = values.to(dtype).requires_grad_(one != "mask")
    return operands


def gradients(loss: Tensor, operands: dict[str, Tensor], upstream: Tensor | None = None, **options) -> list[Tensor]:
    wanted = [x for x in operands.values() if x.requires_grad]
    return list(torch.autograd.grad(loss, wanted, upstream, **options))


# Of float32's own rounding there are some; a 16-bit result is rounded once more, at the end.
TOLERANCE = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-12},
    torch.float32: {"rtol": 2e-5, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2**-8 + 2e-5, "atol": 3e-6},
    torch.float16: {"rtol": 2**-11 + 2e-5, "atol": 3e-6},
}


def assert_same(name: str, operands: dict[str, Tensor], reduction: str, **parameters: float) -> None:
    """Value and gradients, with a random upstream, against torch in float64."""
    dtype = operands["input"].dtype
    wide = {key: x.detach().double().requires_grad_(x.requires_grad) for key, x in operands.items()}
    expected = by_torch(name, wide, reduction, **parameters)
    loss = made(name, reduction, **parameters)(**operands)
    assert loss.dtype == dtype and loss.shape == expected.shape
    torch.testing.assert_close(loss.double(), expected, **TOLERANCE[dtype])
    if loss.numel() == 0 and reduction == "mean":
        return
    upstream = torch.randn(expected.shape, dtype=torch.float64).to(dtype)
    ours, theirs = gradients(loss, operands, upstream), gradients(expected, wide, upstream.double())
    for (key, x), our, their in zip(
        ((k, x) for k, x in operands.items() if x.requires_grad), ours, theirs, strict=True
    ):
        assert our.shape == x.shape and our.dtype == x.dtype
        torch.testing.assert_close(our.double(), their, **TOLERANCE[dtype], msg=lambda text, key=key: f"{key}: {text}")


# ---- values and gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_torch(name, dtype):
    for reduction in REDUCTIONS:
        assert_same(name, drawn(name, (7, 113), dtype), reduction)
    assert_same(name, drawn(name, (1500,), dtype, halves=True), "none")


@pytest.mark.parametrize("name", ["absolute", "squared", "masked"])
def test_sizes(name):
    """Around the sizes of a vector, of a block and of a chunk, which one thread takes."""
    for size, dtype in itertools.product((0, 1, 15, 16, 17, 511, 512, 513, 8193, 40_000), DTYPES[:3]):
        for reduction in REDUCTIONS if size else ("none", "sum"):
            assert_same(name, drawn(name, (size,), dtype), reduction)
    assert made(name)(**drawn(name, (0, 3))).isnan()
    assert_same(name, drawn(name, ()), "mean")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype):
    def assert_same_of(**layouts):
        operands = drawn("clipped", (6, 8, 10), dtype)
        changed = {k: layouts.get(k, lambda x: x)(x.detach()).requires_grad_() for k, x in operands.items()}
        for reduction in REDUCTIONS:
            assert_same("clipped", changed, reduction)

    transposed = lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0)  # noqa: E731
    assert_same_of(input=transposed)
    assert_same_of(input=transposed, target=transposed, weight=transposed)
    assert_same_of(target=lambda x: torch.stack([x, x])[1])
    assert_same_of(weight=lambda x: x.repeat_interleave(2, -1)[..., ::2])
    assert_same_of(input=lambda x: x[:, ::2].repeat_interleave(2, 1), target=lambda x: x.flip(0))


@pytest.mark.parametrize("shape", [(), (1,), (10,), (6, 1), (1, 10), (3, 1, 1), (3, 6, 10)], ids=str)
@pytest.mark.parametrize("name", ["squared", "masked"])
def test_broadcasting(name, shape):
    """Gradients have the shape of what they are of; the mean is over the broadcast shape."""
    for reduction, small in itertools.product(REDUCTIONS, ("weight", "target", "input")):
        operands = drawn(name, (6, 10)) | {small: torch.randn(shape, dtype=torch.float64).requires_grad_()}
        assert_same(name, operands, reduction)
    with pytest.raises(RuntimeError, match=r"must have shapes that broadcast, got \[6\], \[7\]"):
        made("absolute")(torch.randn(6), torch.randn(7))


@pytest.mark.parametrize("name", CASES)
def test_special_values(name):
    """NaN, infinities and zeros of both signs, each with each: NaN where torch has it, of values and gradients.

    Of gradients at kinks only what is finite is compared: autograd goes from the loss to input, and makes 0 of a NaN
    that it meets before a kink; the kernels go the other way.
    """
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -2.0, 0.5, 1e-30])
    grid = torch.cartesian_prod(special, special, torch.tensor([1.0, math.nan, math.inf, 0.0]))
    values = {"input": grid[:, 0], "target": grid[:, 1], "weight": grid[:, 2], "var": grid[:, 2], "mask": grid[:, 2]}
    operands = {key: values[key].clone().requires_grad_(key != "mask") for key in drawn(name, (1,))}
    ours, theirs = made(name, "none")(**operands), by_torch(name, operands)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours[ours.isinf()], theirs[ours.isinf()])
    has_kink = re.search(r"where|clamp|max|min|relu", CASES[name].expression)
    compared = grid.isfinite().all(1) if has_kink else torch.ones(len(grid), dtype=torch.bool)
    for a, b in zip(gradients(ours.sum(), operands), gradients(theirs.sum(), operands), strict=True):
        assert torch.equal(a.isnan()[compared], b.isnan()[compared])


@pytest.mark.parametrize(
    "types",
    [
        {"target": torch.int64},
        {"target": torch.uint8, "mask": torch.bool},
        {"mask": torch.bool},
        {"mask": torch.int32},
        {"target": torch.float64},
        {"input": torch.bfloat16},
        {"input": torch.bfloat16, "target": torch.float16},
        {"input": torch.float16, "weight": torch.float64},
        {"input": torch.int64, "target": torch.int32, "weight": torch.int16},
    ],
    ids=str,
)
def test_mixed_types(types):
    drawn_ = {key: x.detach().abs() * 3 for key, x in drawn("masked", (70,), torch.float32).items()}
    operands = {key: x.to(types.get(key, x.dtype)) for key, x in drawn_.items()}
    operands = {key: x.requires_grad_(x.is_floating_point() and key != "mask") for key, x in operands.items()}
    floating = [x.dtype for x in operands.values() if x.is_floating_point() and x.dtype != torch.bool]
    common = torch.float32
    if floating:
        common = floating[0]
        for other in floating[1:]:
            common = torch.promote_types(common, other)
    loss, expected = made("masked")(**operands), by_torch("masked", operands, "mean")
    assert loss.dtype == common
    torch.testing.assert_close(loss, expected.to(common), **TOLERANCE[torch.float32])
    if not loss.requires_grad:
        return
    for ours, theirs in zip(gradients(loss, operands), gradients(expected, operands), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(
            ours, theirs, **TOLERANCE[min((torch.float32, ours.dtype), key=lambda t: t.itemsize)]
        )


@pytest.mark.parametrize("types", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)], ids=str)
def test_a_value_of_no_dimension_does_not_widen(types):
    wide = torch.tensor(0.25, dtype=types[1])
    operands = {key: x.detach().to(types[0]) for key, x in drawn("squared", (7,), torch.float32).items()}
    for name in ("target", "weight"):
        given = {**operands, name: wide}
        assert made("squared")(**given).dtype == by_torch("squared", given, "mean").dtype == types[0]
    assert made("squared")(**{key: x[0] for key, x in operands.items()} | {"weight": wide}).dtype == types[1]
    integers = {**{key: x.to(torch.int64) for key, x in operands.items()}, "weight": wide}
    assert made("squared")(**integers).dtype == types[1]


def test_other_devices():
    input = torch.ones(3, 2, device="meta", requires_grad=True)
    loss = made("squared", "none")(input=input, target=input, weight=torch.ones(2, device="meta"))
    assert loss.is_meta and loss.shape == (3, 2)


def test_clamp_at_its_bounds():
    """Between numbers and between tensors, in whatever order, torch's own."""
    grid = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=3)), dtype=torch.float64)
    for text, torchs in {
        "clamp(input, target, weight)": torch.clamp,
        "clamp(input, min=target)": lambda x, low, _: torch.clamp(x, low),
        "clamp(input, max=target)": lambda x, high, _: torch.clamp(x, max=high),
        "clamp(input, low, high)": lambda x, *_: torch.clamp(x, -1, 1),
        "clamp(input, min=low)": lambda x, *_: torch.clamp(x, min=-1),
        "clamp(input, max=high)": lambda x, *_: torch.clamp(x, max=1),
    }.items():
        names = {name: value for name, value in {"low": -1.0, "high": 1.0}.items() if name in text}
        criterion = fusedloss.custom_loss(text, reduction="none", **names)
        of_torch = [column.clone().requires_grad_() for column in grid.T]
        wanted = torch.autograd.grad(torchs(*of_torch).sum(), of_torch, materialize_grads=True)
        for call in (criterion, lambda criterion=criterion, **xs: torch.func.vmap(lambda ys: criterion(**ys))(xs)):
            leaves = dict(zip(("input", "target", "weight"), (x.clone().requires_grad_() for x in grid.T), strict=True))
            given = {name: x for name, x in leaves.items() if name in text}
            loss = call(**given)
            assert torch.equal(loss, torchs(*of_torch)), text
            grads = torch.autograd.grad(loss.sum(), list(given.values()))
            assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=False)), text


# ---- derivatives of every kind


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    operands = drawn(name, (2, 3))
    keys = list(operands)
    for reduction in REDUCTIONS:
        criterion = made(name, reduction)

        def loss(*tensors, criterion=criterion):
            return criterion(**dict(zip(keys, tensors, strict=True)))

        assert torch.autograd.gradcheck(loss, tuple(operands.values()), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(loss, tuple(operands.values()))


@pytest.mark.parametrize("name", ["squared", "quantile", "focal", "masked", "by hand"])
def test_functional_transforms(name):
    is_by_hand = name == "by hand"  # and has no derivative by target
    name = "squared" if is_by_hand else name
    criterion = by_hand() if is_by_hand else made(name)
    operands = [x.detach() for x in drawn(name, (4, 5)).values()]

    def expected(input, target, *rest):
        target = target.detach() if is_by_hand else target
        return by_torch(name, dict(enumerate((input, target, *rest))), "mean")

    ours = lambda i, t, *rest: criterion(i, t, **dict(zip(CASES[name].tensors, rest, strict=True)))  # noqa: E731
    for transform in (
        torch.func.vmap,
        torch.func.grad,
        lambda f: torch.func.vmap(torch.func.grad(f)),
        lambda f: torch.func.vmap(torch.func.grad(f), in_dims=(0, *[None] * (len(operands) - 1))),
        lambda f: lambda *xs: torch.func.jvp(f, tuple(xs), tuple(torch.ones_like(x) for x in xs)),
        torch.func.jacrev,
        torch.func.hessian,
    ):
        torch.testing.assert_close(transform(ours)(*operands), transform(expected)(*operands))


def test_forward_mode():
    operands = drawn("clipped", (9,), torch.float32)
    with forward_ad.dual_level():
        duals = {key: forward_ad.make_dual(x.detach(), torch.ones_like(x)) for key, x in operands.items()}
        tangents = [
            forward_ad.unpack_dual(f(duals)).tangent
            for f in (lambda xs: made("clipped", "none")(**xs), lambda xs: by_torch("clipped", xs))
        ]
    torch.testing.assert_close(*tangents)


def test_second_backward():
    operands = drawn("focal", (33,))
    loss = made("focal")(**operands)
    first = gradients(loss, operands, retain_graph=True)
    again = gradients(loss, operands)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        gradients(loss, operands)


def test_grad_output():
    """Another than 1, as a loss scale or a weight of this loss is."""
    operands = drawn("huber", (100,), torch.float16)
    (one, _), (many, _) = (
        gradients(made("huber")(**operands), operands),
        gradients(made("huber")(**operands) * 1024, operands),
    )
    assert many.count_nonzero() >= one.count_nonzero()
    wide = {key: x.detach().double().requires_grad_() for key, x in operands.items()}
    (expected, _) = gradients(by_torch("huber", wide, "mean") * 1024, wide)
    torch.testing.assert_close(many, expected.half(), **TOLERANCE[torch.float16])


def test_without_gradients():
    operands = drawn("focal", (20,))
    with torch.no_grad():
        assert not made("focal")(**operands).requires_grad
    with torch.inference_mode():
        assert not made("focal")(**operands).requires_grad
    target_only = {key: x.detach().requires_grad_(key == "target") for key, x in operands.items()}
    (ours,) = gradients(made("focal")(**target_only), target_only)
    (theirs,) = gradients(by_torch("focal", target_only, "mean"), target_only)
    torch.testing.assert_close(ours, theirs)


def test_a_mask_has_no_derivative():
    """It may require one, and gets 0."""
    operands = drawn("masked", (8,))
    operands["mask"].requires_grad_()
    *ours, zero = gradients(made("masked")(**operands), operands)
    assert zero.eq(0).all()
    *theirs, _ = gradients(by_torch("masked", operands, "mean"), operands, allow_unused=True)
    torch.testing.assert_close(ours, theirs)
    *twice, zero = gradients(made("masked")(**operands), operands, create_graph=True)
    assert zero.eq(0).all()
    torch.testing.assert_close(twice, ours)
    batch = gradients(
        made("masked")(**operands), operands, torch.ones(2).double(), is_grads_batched=True, allow_unused=True
    )
    torch.testing.assert_close(batch[0], ours[0].expand(2, -1))
    compiled = torch.compile(made("masked"), fullgraph=True, backend="aot_eager")
    assert gradients(compiled(**operands), operands)[-1].eq(0).all()
    through_op = ops.pointwise(list(operands.values()), made("masked")._name, [], REDUCTIONS.index("mean"), None)
    twice, expected = (
        gradients(
            sum(x.square().sum() for x in gradients(loss, operands, create_graph=True, allow_unused=True)[:-1]),
            operands,
            allow_unused=True,
            materialize_grads=True,
        )
        for loss in (through_op, by_torch("masked", operands, "mean"))
    )
    torch.testing.assert_close(twice, expected)
    mask = {key: x.detach().requires_grad_(key == "mask") for key, x in operands.items()}
    (zero,) = gradients(made("masked")(**mask), mask, create_graph=True)
    assert zero.eq(0).all()


def test_operand_changed_in_place():
    for changed in ("input", "target", "weight"):
        operands = {key: x * 1 for key, x in drawn("squared", (9,)).items()}
        loss = made("squared")(**operands)
        operands[changed].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_checkpointing():
    operands = drawn("cauchy", (40,))
    again = checkpoint(made("cauchy"), operands["input"], operands["target"], use_reentrant=False)
    for ours, theirs in zip(gradients(again, operands), gradients(made("cauchy")(**operands), operands), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)


# ---- a derivative by hand


def by_hand(**options) -> nn.Module:
    return fusedloss.custom_loss(HAND, derivative=GIVEN, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(7,), (3, 1), (5, 3, 7)], ids=str)
def test_derivative_by_hand(shape, reduction):
    """It is what the expression's own is, but for target, which has none."""
    operands = drawn("squared", (3, 7)) | {"weight": torch.rand(shape, dtype=torch.float64).requires_grad_()}
    ours, theirs = by_hand(reduction=reduction)(**operands), made("squared", reduction)(**operands)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn(ours.shape, dtype=torch.float64)
    expected = gradients(theirs, operands, upstream)
    expected[1] = torch.zeros_like(expected[1])
    for a, b in zip(gradients(ours, operands, upstream, retain_graph=True), expected, strict=True):
        torch.testing.assert_close(a, b)
    twice = gradients(ours, operands, upstream, create_graph=True, allow_unused=True)
    assert twice[1].eq(0).all()
    torch.testing.assert_close(twice[::2], expected[::2])

    target = operands["target"].detach()
    wanted = (operands["input"], operands["weight"])
    criterion = by_hand(reduction=reduction)
    loss = lambda i, w: criterion(i, target, weight=w)  # noqa: E731
    assert torch.autograd.gradcheck(loss, wanted, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, wanted)


def test_derivative_by_hand_elsewhere(fresh_compiler):
    operands = drawn("squared", (3, 7))
    expected = gradients(by_hand()(**operands), operands)
    compiled = torch.compile(by_hand(), fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(gradients(compiled(**operands), operands), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    plain = {key: x.detach() for key, x in operands.items()}
    criterion = by_hand()
    torch.jit.trace(lambda input: criterion(**plain | {"input": input}), plain["input"])  # compares with a second call
    with forward_ad.dual_level():  # by what has no derivative
        dual = forward_ad.make_dual(operands["target"].detach(), torch.ones(3, 7).double())
        loss = by_hand()(operands["input"], dual, weight=operands["weight"])
        assert forward_ad.unpack_dual(loss).tangent.eq(0).all()


# ---- TorchScript and torch.fx

SCRIPT = pytest.mark.filterwarnings("ignore:.torch.jit.\\w+. is deprecated:DeprecationWarning")


class Model(nn.Module):
    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 7)
        self.criterion = criterion

    def forward(self, x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return self.criterion(self.layer(x), target, weight=weight)


def assert_does_the_same(found: Callable[..., Tensor], criterion: nn.Module, operands: dict[str, Tensor]) -> None:
    ours, expected = found(**operands), criterion(**operands)
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours.double(), expected.double(), **TOLERANCE[ours.dtype])
    upstream = torch.randn(expected.shape).to(expected.dtype)
    both = zip(*(gradients(loss, operands, upstream, allow_unused=True) for loss in (ours, expected)), strict=True)
    for a, b in both:  # of a mask, or a derivative by hand, None or 0
        shape_of = next(x for x in (a, b, torch.zeros(())) if x is not None)
        a, b = (torch.zeros_like(shape_of) if x is None else x for x in (a, b))
        torch.testing.assert_close(a.double(), b.double(), **TOLERANCE[a.dtype])


@SCRIPT
@pytest.mark.parametrize("name", CASES)
def test_torchscript(name):
    """The expression, composed of torch's operations."""
    for reduction in REDUCTIONS:
        scripted = torch.jit.script(made(name, reduction))
        assert "fusedloss::" not in str(scripted.inlined_graph)
        for _ in range(3):  # the later calls are compiled for what the first ones have seen
            assert_does_the_same(scripted, made(name, reduction), drawn(name, (7, 11)))


@SCRIPT
def test_torchscript_of_each_function():
    everything = fusedloss.custom_loss(EVERYTHING, which=0)
    scripted = torch.jit.script(everything)
    for number, choice in enumerate(CHOICES):
        everything.which, scripted.parameter_0 = number, float(number)
        input, target = torch.rand(2, 9) + 0.5
        assert torch.equal(scripted(input, target), everything._composed([input, target], [number])), choice


@SCRIPT
def test_torchscript_of_types():
    """What is given is promoted, and widened under autocast, as in Python."""
    criterion = made("squared")
    scripted = torch.jit.script(criterion)
    for dtype, autocast in itertools.product(DTYPES, (False, True)):
        with torch.autocast("cpu", enabled=autocast):
            assert_does_the_same(scripted, criterion, drawn("squared", (5, 8), dtype))
    x, integers, one = torch.randn(6), torch.arange(6), torch.tensor(0.3, dtype=torch.float64)
    for tensors in [(x, integers, integers > 2), (integers,) * 3, (x.half(), one, x.half()), (one, x, x.bfloat16())]:
        given = dict(zip(("input", "target", "weight"), tensors, strict=True))
        assert scripted(**given).dtype == criterion(**given).dtype
        torch.testing.assert_close(scripted(**given), criterion(**given))
    with pytest.raises(RuntimeError, match="missing value for argument 'weight'"):
        scripted(x, x)


@SCRIPT
@pytest.mark.parametrize("make", [lambda: made("squared", "sum"), lambda: by_hand(reduction="sum")], ids=["", "hand"])
def test_torchscript_of_a_model(make):
    """It can be stored, and what the model itself is left with computes the same and can be copied."""
    model = Model(make()).double()
    _, target, weight = (x.detach() for x in drawn("squared", (3, 7)).values())
    x = torch.randn(3, 7, dtype=torch.float64)
    loss = model(x, target, weight)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    stored = io.BytesIO()
    torch.jit.save(torch.jit.script(model), stored)
    stored.seek(0)
    for other in (torch.jit.load(stored), model, copy.deepcopy(model)):
        found = other(x, target, weight)
        torch.testing.assert_close(found, loss)
        torch.testing.assert_close(torch.autograd.grad(found, list(other.parameters())), expected)
    assert repr(pickle.loads(pickle.dumps(model.criterion))) == repr(make())


@pytest.mark.parametrize("make", [lambda: made("squared", "none"), lambda: by_hand(reduction="none")], ids=["", "hand"])
def test_fx(make, fresh_compiler):
    """One call is recorded, whichever way it is computed later."""
    model, operands = Model(make()).double(), drawn("squared", (3, 7))
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [custom.custom_loss_of]
    given = tuple(operands.values())
    compiled = torch.compile(graph, backend="aot_eager", fullgraph=True)
    for other in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph)), compiled):
        assert_does_the_same(lambda *, _call=other, **_: _call(*given), lambda **_: model(*given), operands)
    criterion = make()
    itself = torch.fx.symbolic_trace(criterion)
    for other in (itself, pickle.loads(pickle.dumps(itself))):
        assert_does_the_same(other, criterion, operands)


def test_fx_of_parameters_and_buffers():
    criterion = made("power", p=2.5)
    constant = torch.randn(9)
    graphs = [torch.fx.symbolic_trace(lambda x: criterion.forward(x, constant)) for criterion.p in (2.5, 1.5)]
    graphs += [torch.fx.symbolic_trace(lambda x: criterion.forward(constant, x))]
    x = torch.randn(9)
    for graph, p in zip(graphs, (2.5, 1.5, 1.5), strict=True):
        torch.testing.assert_close(graph(x), (0.1 + (x - constant).abs()).pow(p).mean())
    unused = made("no target")
    assert torch.equal(torch.fx.symbolic_trace(unused)(x), unused(x))
    with pytest.raises(TypeError, match="has no tensor 'mask'"):
        torch.fx.symbolic_trace(lambda x: criterion.forward(x, constant, mask=x))


# ---- the compiler, autocast, modules


@pytest.mark.parametrize("name", CASES)
def test_compiled(name, fresh_compiler):
    operands = drawn(name, (5, 8), torch.float32)
    for reduction in ("mean", "none"):
        criterion = made(name, reduction)
        expected = criterion(**operands)
        ours = torch.compile(criterion, fullgraph=True, backend="aot_eager")(**operands)
        assert torch.equal(ours, expected)
        upstream = torch.randn(expected.shape)
        for a, b in zip(gradients(ours, operands, upstream), gradients(expected, operands, upstream), strict=True):
            assert torch.equal(a, b)


def test_compiled_with_changes(fresh_compiler):
    """Of a parameter, of sizes, of types and of what is given; by inductor, within a model."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)
            self.criterion = made("power")
            self.weighted = made("squared")

        def forward(self, x, target, weight):
            x = self.layer(x)
            return self.criterion(x, target) + self.weighted(x, target, weight=weight)

    model = Model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for p, rows, dtype in [
        (1.3, 5, torch.float32),
        (2.0, 5, torch.float32),
        (0.7, 9, torch.float64),
        (3.0, 17, torch.float64),
    ]:
        model.to(dtype)
        model.criterion.p = p
        x, target, weight = (
            torch.randn(rows, 6, dtype=dtype),
            torch.randn(rows, 4, dtype=dtype),
            torch.rand(4, dtype=dtype),
        )
        ours, theirs = compiled(x, target, weight), model(x, target, weight)
        torch.testing.assert_close(ours, theirs)
        y = model.layer(x).detach()
        expected = ((0.1 + (y - target).abs()) ** p).mean() + (weight * (y - target) ** 2).mean()
        torch.testing.assert_close(ours.detach(), expected)
        torch.testing.assert_close(
            torch.autograd.grad(ours, model.layer.weight), torch.autograd.grad(theirs, model.layer.weight)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast(dtype, fresh_compiler):
    """The loss is float32, as torch's are, and gradients are of their tensors' types."""
    operands = drawn("squared", (70,), dtype)
    wide = {key: x.detach().double().requires_grad_() for key, x in operands.items()}
    criterion = made("squared")
    expected = by_torch("squared", wide, "mean")
    for call in (
        criterion,
        torch.compile(criterion, fullgraph=True, backend="aot_eager"),
        lambda **xs: torch.func.vmap(lambda ys: criterion(**ys))({key: x[None] for key, x in xs.items()})[0],
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = call(**operands)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-7)
        for ours, theirs in zip(gradients(loss, operands), gradients(expected, wide, retain_graph=True), strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), theirs, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_composed_of_torch_in_float32_too(dtype):
    """Values that the type cannot square."""
    x, y = torch.full((6,), 300.0, dtype=dtype), torch.zeros(6, dtype=dtype)
    eps = made("charbonnier")
    by_vmap = torch.func.vmap(lambda a, b: eps(a, b))(x.expand(2, -1), y.expand(2, -1))
    assert by_vmap.dtype == dtype and torch.equal(by_vmap, eps(x, y).expand(2))
    x.requires_grad_()
    (first,) = torch.autograd.grad(eps(x, y), x)
    (second,) = torch.autograd.grad(eps(x, y), x, create_graph=True)
    assert first.isfinite().all() and torch.equal(first, second)


def test_parameters():
    """Attributes, read at each call; nothing is compiled for a new value."""
    operands = drawn("power", (50,))
    criterion = made("power")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "compiled", lambda *_: pytest.fail("compiled anew"))
        for p in (1.3, 2, 3.5, torch.tensor(0.5), np.float32(1.5)):
            criterion.p = p
            assert criterion.p == float(p) and isinstance(criterion.p, float)
            torch.testing.assert_close(criterion(**operands), by_torch("power", operands, "mean", p=float(p)))
            torch.testing.assert_close(made("power", p=p)(**operands), criterion(**operands))
    for name in ("expression", "tensors", "derivative"):
        with pytest.raises(AttributeError, match=f"{name} is compiled in"):
            setattr(criterion, name, getattr(criterion, name))
    for bad in ("2", None, True, [1.0], torch.ones(2), 1j, 10**400):
        with pytest.raises(TypeError, match="'p' must be a number"):
            criterion.p = bad
        with pytest.raises(TypeError, match="'p' must be a number"):
            made("power", p=bad)
    with pytest.raises(TypeError, match="'p' would get no gradient"):
        criterion.p = nn.Parameter(torch.tensor(1.0))
    assert criterion.p == 1.5


def test_names(monkeypatch):
    """Such as C++ has for itself, or a module."""
    criterion = fusedloss.custom_loss(
        "input * int + INFINITY * V - default * loss + M_PI",
        tensors=("V", "loss"),
        int=2,
        INFINITY=3,
        default=4,
        M_PI=5,
    )
    x, v, loss = torch.randn(3, 9)
    torch.testing.assert_close(criterion(x, V=v, loss=loss), (x * 2 + 3 * v - 4 * loss + 5).mean())
    monkeypatch.setattr(jit, "compiled", lambda *_: pytest.fail("it was compiled"))
    for name in (
        "training",
        "forward",
        "expression",
        "float",
        "_name",
        "_formula",
        "lambda",
        "input",
        "target",
        "exp",
        "pi",
    ):
        if name == "expression":
            continue  # Python refuses it
        with pytest.raises(ValueError, match=f"parameter '{name}' (is|must)"):
            fusedloss.custom_loss(f"input * {name}", **{name: 1.0})
    with pytest.raises(ValueError, match="tensor 'self' cannot be"):
        fusedloss.custom_loss("input * self", tensors=("self",))
    with pytest.raises(TypeError, match="must be a sequence of names, not the str 'abc'"):
        fusedloss.custom_loss("input * abc", tensors="abc")


def test_missing_tensors():
    criterion, (x, y, m) = made("masked"), torch.randn(3, 4)
    for call, says in [
        (lambda: criterion(x, y, weight=x), "needs the tensor 'mask', which is not given"),
        (lambda: criterion(x, weight=x, mask=m), "needs the tensor 'target'"),
        (lambda: criterion(x, y, weight=None, mask=m), "needs the tensor 'weight'"),
        (lambda: criterion(x, y, weight=x, mask=m, var=x), "has no tensor 'var', expected input, target, weight, mask"),
        (lambda: criterion(x, 1.0, weight=x, mask=m), "'target' must be a tensor, got float"),
        (lambda: criterion(None, y, weight=x, mask=m), "needs the tensor 'input'"),
    ]:
        with pytest.raises(TypeError, match=re.escape(says)):
            call()
    unused = made("no target")
    assert torch.equal(unused(x, y), unused(x))  # a loss like any other for who calls it


def test_module():
    criterion = made("power", "sum")
    criterion.p = 2.5
    x, y = torch.randn(2, 30)
    stored = io.BytesIO()
    torch.save(criterion, stored)
    stored.seek(0)
    copies = [copy.copy(criterion), copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))]
    for other in [*copies, torch.load(stored, weights_only=False)]:
        assert torch.equal(other(x, y), criterion(x, y)) and str(other) == str(criterion)
        other.p = 1.0
    assert criterion.p == 2.5 and not criterion.state_dict() and not list(criterion.parameters())
    assert str(criterion) == "CustomLoss('(0.1 + abs(input - target)) ** p', reduction='sum', p=2.5)"
    model = nn.ModuleDict({"layer": nn.Linear(3, 3), "criterion": criterion}).to(torch.float64).half().eval()
    assert model["criterion"](x.half(), y.half()).dtype == torch.float16
    criterion.reduction = "none"
    assert criterion(x, y).shape == (30,)
    criterion.reduction = "median"
    with pytest.raises(ValueError, match="median"):
        criterion(x, y)
    with pytest.raises(ValueError, match="median"):
        made("power", "median")


def test_training():
    """The same steps as with torch's own operations."""
    found = []
    for loss in (made("charbonnier"), lambda i, t: by_torch("charbonnier", {"input": i, "target": t}, "mean")):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        x = torch.randn(64, 4, dtype=torch.float64)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            value = loss(model(x), x.sum(1, keepdim=True))
            value.backward()
            optimizer.step()
            losses.append(value.item())
        found.append(losses)
    assert found[0][-1] < found[0][0] / 4
    assert found[0] == pytest.approx(found[1], rel=1e-9)


# ---- each function over its whole domain

# In units in the last place of a normal result, of its value and its derivative. torch's own are up to 0.9, and up to
# 64 of some derivatives, or all of it where they are a difference: 1 - tanh(x)^2, expm1(x) + 1, s (1 - s).
ULPS = {"rsqrt": (2, 6), "tan": (6, 9), "tanh": (4, 6), "sinh": (5, 5), "cosh": (5, 5)}
USUAL_ULPS = (4.5, 4.5)


def numbers_of(dtype: torch.dtype) -> Tensor:
    """Of all exponents, and more where functions bend, branch or overflow."""
    count = 3000
    if dtype == torch.float32:
        bits = torch.randint(-(2**31), 2**31, (4 * count,)).to(torch.int32).view(dtype)
    else:
        bits = (torch.randint(-(2**31), 2**31, (4 * count,)) << 32 | torch.randint(2**32, (4 * count,))).view(dtype)
    ranges = [(2 * torch.rand(count, dtype=torch.float64) - 1) * scale for scale in (1, 3, 10, 40, 110, 800)]
    near_one = [sign * (1 + other * torch.exp(-40 * torch.rand(count))) for sign in (1, -1) for other in (1.0, -1.0)]
    logarithmic = torch.exp(torch.randn(count, dtype=torch.float64) * 20)
    limits = [torch.finfo(dtype).max, torch.finfo(dtype).tiny / 8]
    near_zero = [0, 0.35, 0.5, 1, 1.5, 4, 9.2, 10, 20, 25, 30]
    far = [87.4, 88.72283, 88.8, 89.5, 100, 103, 104, 354, 709.782712893384, 710, 745, 746, math.inf, math.nan]
    branches = torch.tensor([*near_zero, *far, *limits], dtype=torch.float64)
    branches = torch.cat([branches, branches.nextafter(torch.tensor(0.0)), branches.nextafter(torch.tensor(math.inf))])
    multiples = torch.arange(400, dtype=torch.float64) * (math.pi / 2)
    signed = torch.cat([logarithmic, branches, multiples])
    return torch.cat([bits, *(x.to(dtype) for x in (*ranges, *near_one, signed, -signed))])


def exact(name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Value and derivative in long double, which has 11 bits more than float64 on x86. But for erf, which it lacks."""
    tail = np.exp(-np.abs(x))
    zero, one = np.zeros_like(x), np.ones_like(x)
    return {
        "abs": lambda: (np.abs(x), np.sign(x)),
        "sign": lambda: (np.where(np.isnan(x), zero, np.sign(x)), zero),
        "square": lambda: (x * x, 2 * x),
        "sqrt": lambda: (np.sqrt(x), 0.5 / np.sqrt(x)),
        "rsqrt": lambda: (1 / np.sqrt(x), -0.5 / np.sqrt(x) / x),
        "exp": lambda: (np.exp(x), np.exp(x)),
        "expm1": lambda: (np.expm1(x), np.exp(x)),
        "log": lambda: (np.log(x), 1 / x),
        "log1p": lambda: (np.log1p(x), 1 / (1 + x)),
        "sin": lambda: (np.sin(x), np.cos(x)),
        "cos": lambda: (np.cos(x), -np.sin(x)),
        "tan": lambda: (np.tan(x), 1 / np.cos(x) ** 2),
        "sinh": lambda: (np.sinh(x), np.cosh(x)),
        "cosh": lambda: (np.cosh(x), np.sinh(x)),
        "tanh": lambda: (np.tanh(x), 4 * tail**2 / (1 + tail**2) ** 2),
        "atan": lambda: (np.arctan(x), 1 / (1 + x * x)),
        "erf": lambda: (
            torch.erf(torch.from_numpy(x.astype(np.float64))).numpy().astype(x.dtype),
            2 / np.sqrt(np.arctan(x.dtype.type(1)) * 4) * np.exp(-x * x),
        ),
        "sigmoid": lambda: (np.where(x < 0, tail, one) / (1 + tail), tail / (1 + tail) ** 2),
        "logsigmoid": lambda: (np.minimum(x, 0) - np.log1p(tail), np.where(x < 0, one, tail) / (1 + tail)),
        "softplus": lambda: (np.maximum(x, 0) + np.log1p(tail), np.where(x < 0, tail, one) / (1 + tail)),
        "relu": lambda: (np.maximum(x, 0), np.where(np.isnan(x), x, x > 0)),
    }[name]()


def assert_within(ulps: float, found: Tensor, expected: np.ndarray, at: Tensor, what: str) -> None:
    info = torch.finfo(found.dtype)
    found = found.detach().numpy()
    with np.errstate(all="ignore"):
        nan = np.isnan(expected)
        assert (np.isnan(found) == nan).all(), f"{what}: NaN at {at[torch.from_numpy(np.isnan(found) != nan)][:5]}"
        error = np.abs(found.astype(expected.dtype) - expected) / np.ldexp(info.eps, np.frexp(np.abs(expected))[1] - 1)
        is_normal = (np.abs(expected) >= info.tiny) & (np.abs(expected) <= info.max * (1 - 8 * info.eps))
        error = np.where(is_normal, error, 0)
        worst = int(error.argmax())
        assert error[worst] <= ulps, f"{what}({at[worst].item()!r}): {found[worst]!r}, expected {expected[worst]!r}"
        over = np.abs(expected) > info.max * (1 + 8 * info.eps)
        assert (found[over] == np.sign(expected[over]) * np.inf).all(), what
        assert (np.abs(found[np.abs(expected) < info.tiny * (1 - 8 * info.eps)]) <= info.tiny).all(), what


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS_OF_ONE)
def test_function(name, dtype):
    everything = fusedloss.custom_loss(EVERYTHING, reduction="none", which=CHOICES.index(f"{name}(input)"))
    x = numbers_of(dtype).requires_grad_()
    value = everything(x, x.detach())
    (slope,) = torch.autograd.grad(value.sum(), x)
    x = x.detach()
    with np.errstate(all="ignore"):
        expected = exact(name, x.numpy().astype(np.longdouble))
    by_value, by_slope = ULPS.get(name, USUAL_ULPS)
    assert_within(by_value, value, expected[0], x, name)
    ours = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0], dtype=dtype, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    found, wanted = everything(ours, ours.detach()), FUNCTIONS[name].torch(theirs)
    slopes = [torch.autograd.grad(y.sum(), x)[0] for y, x in ((found, ours), (wanted, theirs))]
    torch.testing.assert_close(found, wanted, equal_nan=True)
    torch.testing.assert_close(*slopes, equal_nan=True)
    if name not in ("relu", "logsigmoid"):  # of which torch's zeros have another sign
        assert torch.equal(found.signbit()[:2], wanted.signbit()[:2])
    agrees = torch.from_numpy(~np.isnan(expected[1])) & x.ne(0)  # at 0 and where there is none, as torch: above
    assert_within(by_slope, slope[agrees], expected[1][agrees.numpy()], x[agrees], f"{name}'")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("choice", FUNCTIONS_OF_TWO)
def test_function_of_two(choice, dtype):
    """Of ordinary numbers within some units of float64's; of special ones as torch in the same type."""
    functions = {
        "pow(input, target)": torch.pow,
        "xlogy(input, target)": torch.special.xlogy,
        "input / target": torch.div,
        "input ** 3": lambda a, b: a**3 + 0 * b,
        "input ** -2": lambda a, b: a**-2.0 + 0 * b,
    }
    everything = fusedloss.custom_loss(EVERYTHING, reduction="none", which=CHOICES.index(choice))

    def both(a: Tensor, b: Tensor, reference: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        ours, theirs = ([x.to(t, copy=True).requires_grad_() for x in (a, b)] for t in (dtype, reference))
        values = everything(*ours), functions[choice](*theirs)
        slopes = [torch.autograd.grad(y.sum(), xs) for y, xs in zip(values, (ours, theirs), strict=True)]
        return [values, *zip(*slopes, strict=True)]

    a = torch.exp(torch.randn(20_000, dtype=torch.float64) * 3).to(dtype)
    b = (torch.randn(20_000, dtype=torch.float64) * 3).abs().to(dtype)
    for found, wanted in both(a, b, torch.float64):
        info = torch.finfo(dtype)
        kept = wanted.abs() < info.max / 2
        torch.testing.assert_close(found.double()[kept], wanted[kept], rtol=8 * info.eps, atol=info.tiny)

    special = torch.tensor(
        [0, -0.0, math.inf, -math.inf, math.nan, 1, -1, 0.5, -0.5, 2, -2, 3, -3, 1.5, 7, -7.5]
    ).double()
    a, b = torch.cartesian_prod(special, special).T
    if choice == "pow(input, target)":
        kept = ~((a == -1) & b.isinf())  # whose power has no parity: torch's slope is of one sign, ours of the other
        a, b = a[kept], b[kept]
    for found, wanted in both(a, b, dtype):
        if choice.startswith("input **"):
            kept = b.isfinite()  # which torch's own is given only to be used
            found, wanted = found[kept], wanted[kept]
        torch.testing.assert_close(found, wanted, equal_nan=True, rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_each_instruction_set(cache_folder):
    """What looks at numbers, in processes that are told to use a lesser one, side by side."""
    known = ["portable", "avx2", "avx512"]
    lesser = known[: known.index(_backend.extension().cpu_capability())]
    if not lesser:
        pytest.skip("this machine, or process, has no lesser one")
    tests = ["test_function", "test_function_of_two", "test_against_torch", "test_special_values"]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", *(f"{__file__}::{name}" for name in tests)]
    runs = {}
    for capability in lesser:
        environment = {**os.environ, "FUSEDLOSS_CPU": capability}
        runs[capability] = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    output = {capability: run.communicate()[0] for capability, run in runs.items()}
    for capability, run in runs.items():
        assert run.returncode == 0, f"{capability}: {output[capability][-3000:]}"


# ---- bad input, and compiling

BAD = [
    ("abs(input - targte)", "unknown name 'targte'"),
    ("mean(input)", "unknown function 'mean'"),
    ("input; import os", "invalid syntax"),
    ("__import__('os').system('true')", "attributes are not available"),
    ("input.__class__", "attributes are not available"),
    ('input); system("true"', "unmatched"),
    ("input /* */ * 1", "invalid syntax"),
    ("input // 1", "//"),
    ("input\n#include <x>\n + 1", ""),
    ("[input for _ in input]", "can stand here"),
    ("(lambda: input)()", "can stand here"),
    ("input if input else 1", "where(condition, a, b)"),
    ("input > 0", "a number is expected"),
    ("target", "does not use 'input'"),
    ("", "is empty"),
    ("-" * 9000 + "input", ""),
    ("(" * 3000 + "input" + ")" * 3000, ""),
    ("input" + " + input" * 2000, "longer than 10,000"),
    ("abs(" * 150 + "input" + ")" * 150, "more than 100 levels"),
]


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("expression", "says"), BAD, ids=lambda text: ascii(text[:30]))
def test_bad_expressions(expression, says, monkeypatch):
    """They are refused before anything is compiled: as a loss, and as a derivative by hand."""
    monkeypatch.setattr(jit, "compiled", lambda *_: pytest.fail("it was compiled"))
    monkeypatch.setattr(custom, "make_plan", lambda *_, **__: pytest.fail("a compiler was looked for"))
    calls = [lambda: fusedloss.custom_loss(expression, alpha=1.0)]
    if expression != "target":
        calls.append(lambda: fusedloss.custom_loss("abs(input)", derivative={"input": expression}))
    for call in calls:
        with pytest.raises(ValueError) as raised:
            call()
        message, shown, caret, functions = str(raised.value).split("\n")
        assert message.startswith("custom_loss: ") and says in message
        assert shown.strip() in expression and caret.strip() == "^"
        assert functions == "functions: " + ", ".join(FUNCTIONS)


def test_bad_options(monkeypatch):
    monkeypatch.setattr(jit, "compiled", lambda *_: pytest.fail("it was compiled"))
    for expected, options in [
        (r"derivative by 'x', which is no tensor", {"derivative": {"x": "1"}}),
        (r"derivative by 'p', which is no tensor", {"derivative": {"p": "1"}, "p": 1.0}),
        (r"derivative is empty", {"derivative": {}}),
        (r"is not a valid value for reduction", {"reduction": "batchmean"}),
        (r"'2x' must be an identifier", {"tensors": ("2x",)}),
        (r"'input' is there twice|is the name of a tensor", {"input": 1.0}),
    ]:
        with pytest.raises(ValueError, match=expected):
            fusedloss.custom_loss("abs(input)", **options)
    many = [f"t{i}" for i in range(8)]
    with pytest.raises(ValueError, match="got 9 tensors and 0 parameters, expected at most 8 and 16"):
        fusedloss.custom_loss(" + ".join(["input", *many]), tensors=many)
    with pytest.raises(ValueError, match="several lines need parentheses around them"):
        fusedloss.custom_loss("input\n  - target")
    with pytest.raises(TypeError, match="derivative must map names to expressions, got str"):
        fusedloss.custom_loss("input", derivative="1")
    for text in (None, b"input", 3):
        with pytest.raises(TypeError, match="the expression must be a str"):
            fusedloss.custom_loss(text)


@pytest.mark.parametrize("compiler", ["nonexistent-c++", "false", "sh -c 'echo g++ 9; test $# -eq 0' sh"])
def test_no_compiler(compiler, monkeypatch, tmp_path):
    """What is not yet compiled cannot be, and the reason is told."""
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(custom, "_libraries", {})
    with pytest.raises(RuntimeError, match=r"there is no C\+\+ compiler|compiling failed"):
        fusedloss.custom_loss("abs(input) + 0.123")
    assert not list(tmp_path.glob("*/done.json"))


def compile_all(expressions: list[str], folder: Path, **environment: str) -> subprocess.Popen:
    code = (
        "import sys, threading, torch, fusedloss\n"
        "def make(text): sys.stdout.write(f'{fusedloss.custom_loss(text)(torch.ones(3), torch.zeros(3)).item()}\\n')\n"
        "threads = [threading.Thread(target=make, args=(text,)) for text in sys.argv[1:]]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FUSEDLOSS_CACHE_DIR": str(folder), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code, *expressions],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_threads_and_processes(tmp_path):
    """Two processes, of two threads each, that want the same: it is compiled once."""
    same = "abs(input - target) * 2"
    running = [compile_all([same, same], tmp_path) for _ in range(2)]
    output = [process.communicate(timeout=120) for process in running]
    assert all(printed.split() == ["2.0"] * 2 for printed, _ in output), output
    assert sum(told.count("fusedloss: compiling") for _, told in output) == 1
    assert len(list(tmp_path.glob("*/done.json"))) == 1


def test_threads():
    """Different and same losses, made and used at once."""
    failures, operands = [], {name: drawn(name, (300,)) for name in list(CASES)[:6]}

    def work(name):
        try:
            for _ in range(20):
                ours = made(name)(**operands[name])
                torch.testing.assert_close(ours, by_torch(name, operands[name], "mean"))
                gradients(ours, operands[name])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in [*operands, *operands]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_unwritable_cache(tmp_path):
    """It is compiled for this process alone."""
    (tmp_path / "file").touch()
    printed, told = compile_all(["input * 3"], tmp_path / "file" / "cache").communicate(timeout=120)
    assert printed.split() == ["3.0"] and "cannot be written" in told
