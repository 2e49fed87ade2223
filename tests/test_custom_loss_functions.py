"""The accuracy of each function of the language of custom losses, in float32 and float64."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.custom import CHOICES, EVERYTHING, FUNCTIONS_OF_ONE, FUNCTIONS_OF_TWO
from helpers.draws import DTYPES
from torch import Tensor

import fusedloss
from fusedloss import _backend
from fusedloss.expression import FUNCTIONS

pytestmark = pytest.mark.usefixtures("custom_loss_folder")

ROOT = Path(fusedloss.__file__).parent.parent


# ---- each function over its whole domain

# The allowed errors of the value and of the derivative, in units in the last place of a normal result. torch's own
# errors are up to 0.9, and up to 64 for some derivatives. Derivatives that torch computes as a difference may have no
# correct digit: 1 - tanh(x)^2, expm1(x) + 1, s (1 - s).
ULPS = {"rsqrt": (2, 6), "tan": (6, 9), "tanh": (4, 6), "sinh": (5, 5), "cosh": (5, 5)}
USUAL_ULPS = (4.5, 4.5)


def numbers_of(dtype: torch.dtype) -> Tensor:
    """Numbers of all exponents, with more of them where functions bend, branch or overflow."""
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
    """Value and derivative in long double, 11 bits more than float64 on x86. erf is in float64 for lack of another."""
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
    if name not in ("relu", "logsigmoid"):  # torch's zeros have another sign there
        assert torch.equal(found.signbit()[:2], wanted.signbit()[:2])
    # 0 and points without a derivative are compared with torch above.
    agrees = torch.from_numpy(~np.isnan(expected[1])) & x.ne(0)
    assert_within(by_slope, slope[agrees], expected[1][agrees.numpy()], x[agrees], f"{name}'")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("choice", FUNCTIONS_OF_TWO)
def test_function_of_two(choice, dtype):
    """For ordinary numbers, within a few units of float64. For special ones, torch's results in the same dtype."""
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
        # An infinite power has no parity: torch's slope has one sign, and ours the other.
        kept = ~((a == -1) & b.isinf())
        a, b = a[kept], b[kept]
    for found, wanted in both(a, b, dtype):
        if choice.startswith("input **"):
            kept = b.isfinite()  # torch's version uses b only to have a gradient for it
            found, wanted = found[kept], wanted[kept]
        torch.testing.assert_close(found, wanted, equal_nan=True, rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_each_instruction_set():
    """The numerical tests pass in processes that are told to use a lesser instruction set. They run side by side."""
    known = ["portable", "avx2", "avx512"]
    lesser = known[: known.index(_backend.extension().cpu_capability())]
    if not lesser:
        pytest.skip("this machine, or process, has no lesser one")
    values = Path(__file__).with_name("test_custom_loss.py")
    tests = [
        *(f"{__file__}::{name}" for name in ("test_function", "test_function_of_two")),
        *(f"{values}::{name}" for name in ("test_against_torch", "test_special_values")),
    ]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", *tests]
    runs = {}
    for capability in lesser:
        environment = {**os.environ, "FUSEDLOSS_CPU": capability}
        runs[capability] = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    output = {capability: run.communicate()[0] for capability, run in runs.items()}
    for capability, run in runs.items():
        assert run.returncode == 0, f"{capability}: {output[capability][-3000:]}"
