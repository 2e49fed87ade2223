"""The custom losses that several test files use, the same losses in torch, and where the compiled ones are kept."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedloss
from fusedloss.expression import FUNCTIONS

ROOT = Path(fusedloss.__file__).parent.parent

# ---- the expressions, and the same losses in torch


@dataclass(frozen=True)
class Case:
    expression: str
    torch: Callable[..., Tensor]  # takes input, target, the further tensors, and p, which has the parameters
    tensors: tuple[str, ...] = ()
    positive: tuple[str, ...] = ()  # tensors that are drawn positive
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

# One library serves all functions: the expression computes each of them and selects one by `which`.
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


@pytest.fixture(scope="session")
def custom_loss_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of compiled custom losses, kept between runs. If it is empty, two processes fill it."""
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
    """Random operands. With `halves` they are multiples of 1/2, so that every kink and tie occurs."""
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


# A float32 computation rounds several times. A 16-bit result is computed in float32 and rounded once more at the end.
TOLERANCE = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-12},
    torch.float32: {"rtol": 2e-5, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2**-8 + 2e-5, "atol": 3e-6},
    torch.float16: {"rtol": 2**-11 + 2e-5, "atol": 3e-6},
}


def assert_same(name: str, operands: dict[str, Tensor], reduction: str, **parameters: float) -> None:
    """Value and gradients, for a random upstream gradient, are those of torch in float64."""
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


# ---- a derivative by hand


def by_hand(**options) -> nn.Module:
    return fusedloss.custom_loss(HAND, derivative=GIVEN, **options)
