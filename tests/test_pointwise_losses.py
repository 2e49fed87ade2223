"""Values, gradients and options of the pointwise losses, compared with the float64 reference and torch's own losses.

The squared error is in test_mse_loss.py.
"""

import itertools
import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.draws import DTYPES, REDUCTIONS
from helpers.oracle import assert_exact
from helpers.pointwise import CASES, Case, bce, every_case, leaves, reductions
from torch import Tensor

import fusedloss.functional as fused

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides", "ignore:Using a target size")


def terms(operands: dict[str, Tensor]) -> Tensor:
    """A rough size of the terms that are added up for each element."""
    size = torch.ones((), dtype=torch.float64)
    for name, operand in operands.items():
        magnitude = operand.detach().double().abs()
        size = size / magnitude.clamp(min=0.1) if name == "var" else size * (1 + magnitude)
    return size


# How much larger the error is if autograd adds up a gradient, and not the kernels in their accumulate type.
SUMMED = {torch.float32: 1, torch.float64: 1, torch.bfloat16: 2**-8 / 3e-6, torch.float16: 2**-11 / 3e-6}


def assert_right(case: Case, operands: dict[str, Tensor], what: str, reduction: str) -> None:
    """Value and gradients agree with the reference, and the reference agrees with torch in float64."""
    ours, exact = leaves(operands), leaves(operands, torch.float64)
    double = leaves(operands, torch.float64, but=case.not_torchs)
    loss, expected = case.ours(ours, reduction=reduction), case.reference(exact, reduction=reduction)
    of_torch = case.torchs(double, reduction=reduction)
    in_its_dtype = case.torchs(leaves(operands, but=operands), reduction=reduction)
    what = f"{what}, {reduction}, {loss.dtype}, {[tuple(x.shape) for x in operands.values()]}"
    assert (loss.dtype, loss.shape, loss.device) == (in_its_dtype.dtype, in_its_dtype.shape, in_its_dtype.device), what
    close = {"rtol": 1e-8, "atol": 1e-9, "equal_nan": True}
    torch.testing.assert_close(of_torch, expected, **close, msg=f"{what}: torch and the reference differ")

    of_element = terms(operands)
    if reduction == "none":
        share, of_loss = 1.0, of_element
    else:
        batch = operands["input"].shape[0] if operands["input"].dim() > 0 else 1
        parts = {"mean": of_element.numel(), "sum": 1, "batchmean": batch}[reduction]
        share, of_loss = 1 / parts, of_element.sum().item() / parts
    assert_exact(loss, expected, scale=of_loss, what=what)
    assert torch.equal(loss.detach(), case.ours(leaves(operands, but=operands), reduction=reduction)), what

    upstream = torch.randn(loss.shape, dtype=torch.float64).to(loss)
    grads = torch.autograd.grad(loss, list(ours.values()), upstream)
    right = torch.autograd.grad(expected, list(exact.values()), upstream.double())
    known = [leaf for leaf in double.values() if leaf.requires_grad]
    torchs = iter(torch.autograd.grad(of_torch, known, upstream.double()))
    scale = of_element * upstream.double().abs() * share
    for name, kind in case.operands.items():
        if kind == "variance" or (name, kind) == ("input", "rate"):  # the loss divides by it
            scale = scale / operands[name].double()
    for (name, leaf), grad, exact_grad in zip(ours.items(), grads, right, strict=True):
        assert (grad.dtype, grad.shape) == (leaf.dtype, leaf.shape), what
        if leaf.shape == of_element.shape:
            assert_exact(grad, exact_grad, scale=scale, what=f"{what}: gradient of {name}")
        else:  # autograd adds it up, also in 16 bits
            assert_exact(grad, exact_grad, scale=scale.sum().item() * SUMMED[leaf.dtype], what=f"{what}: {name}")
        if name not in case.not_torchs:
            theirs = next(torchs)
            given = ~theirs.isnan()  # torch's gradient is NaN for a count of 0 with the constant term
            torch.testing.assert_close(theirs[given], exact_grad[given], **close, msg=f"{what}: torch, {name}")


# Odd sizes, and just below, at and above a vector, a block of elements and several of them, and more than one chunk.
SIZES = [1, 2, 3, 15, 16, 17, 511, 512, 513, 8191, 8193, 100_003]


@every_case
def test_sizes(name, device):
    case = CASES[name]
    for dtype in DTYPES:
        for size in SIZES:
            assert_right(case, case.draw((size,), dtype, device), name, random.choice(REDUCTIONS))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "every second element": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
    "odd storage offset": lambda x: torch.cat([x.new_full((3,), torch.nan), x.flatten()])[3:].view(x.shape),
    "sliced": lambda x: F.pad(x, (2, 3, 1, 1), value=torch.nan)[..., 1:-1, 2:-3],
    "expanded rows": lambda x: x[:1].expand(x.shape),
    "expanded columns": lambda x: x[..., :1].expand(x.shape),
    "one value": lambda x: x[:1, :1, :1, :1].expand(x.shape),
}


def laid_out(operands: dict[str, Tensor], of_input: str, of_others: str) -> dict[str, Tensor]:
    return {name: LAYOUTS[of_input if name == "input" else of_others](x) for name, x in operands.items()}


@every_case
def test_layouts(name, device):
    case = CASES[name]
    for reduction in reductions(case):
        for layouts in itertools.product(LAYOUTS, repeat=2):
            operands = laid_out(case.draw((2, 5, 3, 4), random.choice(DTYPES), device), *layouts)
            assert_right(case, operands, f"{name}, {layouts}", reduction)


@every_case
def test_the_loss_is_laid_out_as_input(name, device):
    case = CASES[name]
    for layouts in itertools.product(("contiguous", "transposed", "channels last"), LAYOUTS):
        operands = laid_out(case.draw((2, 5, 3, 4), device=device), *layouts)
        assert case.ours(operands, reduction="none").stride() == operands["input"].stride(), f"{name}, {layouts}"


BROADCASTS = [
    ((4, 1), (4,)), ((3,), (2, 3)), ((2, 3), (3,)), ((5, 1, 2), (3, 1)), ((), (2, 2)), ((2, 2), ()), ((1,), ()),
]  # fmt: skip


@every_case
def test_broadcasting(name, device):
    case = CASES[name]
    for (input_shape, target_shape), dtype in itertools.product(BROADCASTS, DTYPES):
        operands = case.draw(input_shape, dtype, device)
        operands["target"] = case.draw(target_shape, dtype, device)["target"]
        expands = torch.broadcast_shapes(input_shape, target_shape) == torch.Size(input_shape)
        for reduction in reductions(case):
            if case.function.startswith("binary") or (case.function == "soft_margin_loss" and not expands):
                with pytest.raises((ValueError, RuntimeError)) as expected:
                    case.torchs(operands, reduction=reduction)
                with pytest.raises(expected.type) as raised:
                    case.ours(operands, reduction=reduction)
                assert str(raised.value) == str(expected.value), name
            else:
                assert_right(case, operands, name, reduction)


@pytest.mark.parametrize("names", [("weight",), ("pos_weight",), ("weight", "pos_weight")], ids="+".join)
def test_weights_that_expand(names, device):
    case = bce(*names)
    for dtype in DTYPES:
        for shape in ((3,), (4, 1), (1, 1), (1,), (), (4, 3), (1, 3)):
            operands = case.draw((4, 3), dtype, device)
            operands |= {name: case.draw(shape, dtype, device)[name] for name in random.sample(names, 1)}
            for reduction in REDUCTIONS:
                assert_right(case, operands, f"{names} {shape}", reduction)


def test_weights_of_other_shapes_are_torchs(device):
    input, target = torch.randn(4, 3, device=device), torch.rand(4, 3, device=device)
    for given, shape, reduction in itertools.product(
        ("weight", "pos_weight"), ((2, 4, 3), (4,), (2,), (1, 1, 4, 3), (0,)), REDUCTIONS
    ):
        options = {given: torch.rand(shape, device=device), "reduction": reduction}
        assert_same(
            lambda f, o=options: f.binary_cross_entropy_with_logits(input, target, **o), f"{given} {shape} {reduction}"
        )


@every_case
def test_no_dimensions_and_no_elements(name, device):
    case = CASES[name]
    for dtype, reduction in itertools.product(DTYPES, reductions(case)):
        assert_right(case, case.draw((), dtype, device), name, reduction)
        for shape in ((0,), (3, 0), (0, 3)):
            given = leaves(case.draw(shape, dtype, device), but=case.not_torchs)
            loss, expected = (f(given, reduction=reduction) for f in (case.ours, case.torchs))
            torch.testing.assert_close(loss, expected, equal_nan=True, msg=f"{name} {shape} {reduction}")
            grads = torch.autograd.grad(loss.sum(), [leaf for leaf in given.values() if leaf.requires_grad])
            assert all(grad.shape == shape for grad in grads)


def last_grad_output_was(value: float, device: str) -> None:
    """Sets the last upstream gradient, which decides whether the next forward pass computes the gradient."""
    leaf = torch.ones(3, device=device, requires_grad=True)
    (fused.mse_loss(leaf, torch.zeros_like(leaf)) * value).backward()


@every_case
def test_only_the_wanted_gradients(name, device):
    case = CASES[name]
    for dtype, reduction, value in itertools.product((torch.float32, torch.bfloat16), REDUCTIONS, (1, 3)):
        operands = case.draw((5, 107), dtype, device)
        last_grad_output_was(value, device)
        every = leaves(operands)
        grads = torch.autograd.grad(case.ours(every, reduction=reduction).sum() * value, list(every.values()))
        expected = dict(zip(operands, grads, strict=True))
        for count in range(1, len(operands)):
            for wanted in itertools.combinations(operands, count):
                given = leaves(operands, but=[operand for operand in operands if operand not in wanted])
                loss = case.ours(given, reduction=reduction).sum() * value
                grads = torch.autograd.grad(loss, [given[operand] for operand in wanted])
                for operand, grad in zip(wanted, grads, strict=True):  # NaN for kl_div's targets of 0
                    right = expected[operand].nan_to_num()
                    assert torch.equal(grad.nan_to_num(), right), f"{name}: {operand}, {wanted}"


@every_case
def test_either_pass_gives_the_same_bits(name, device):
    case = CASES[name]
    for dtype, reduction in itertools.product(DTYPES, ("mean", "sum")):
        operands, found = case.draw((5000,), dtype, device), []
        for value in (1, 3):  # computed by the forward pass, and by the backward pass
            last_grad_output_was(value, device)
            given = leaves(operands)
            loss = case.ours(given, reduction=reduction)
            found.append((loss.detach(), *torch.autograd.grad(loss, list(given.values()))))
        for what, *pair in zip(("loss", *operands), *found, strict=True):
            assert torch.equal(*(x.nan_to_num() for x in pair)), f"{name}: {what}, {dtype}"


@every_case
def test_strided_grad_output(name, device):
    case = CASES[name]
    operands = case.draw((6, 5), device=device)
    for upstream in (
        torch.randn(5, 6, device=device).t(),
        torch.randn(5, device=device).expand(6, 5),
        torch.randn((), device=device).expand(6, 5),
        torch.randn(6, 10, device=device)[:, ::2],
    ):
        ours, exact = leaves(operands), leaves(operands, torch.float64)
        case.ours(ours, reduction="none").backward(upstream)
        case.reference(exact, reduction="none").backward(upstream.double())
        for operand, leaf in ours.items():
            assert_exact(leaf.grad, exact[operand].grad, 100.0, f"{name}: gradient of {operand}")


@every_case
def test_no_worse_than_torch(name, device):
    """The largest relative error of an element is no larger than torch's, for inputs of all sizes."""
    case = CASES[name]
    operands = case.draw((20_000,), device=device)
    operands["input"] = operands["input"] * 10 ** torch.empty(20_000, device=device).uniform_(-6, 0)

    def assert_no_worse(what: str, ours: Tensor, torchs: Tensor, exact: Tensor) -> None:
        known = ~exact.isnan()
        # The error of a small difference of large terms is a matter of chance, for both.
        is_difference = case.function in ("poisson_nll_loss", "gaussian_nll_loss", "kl_div") or (
            name == "bce, both weights" and what.endswith("target")
        )
        size = exact.abs().clamp(min=1e-1 if is_difference else 1e-30)
        of_ours, of_torch = (((x.double() - exact).abs() / size)[known].nan_to_num().max() for x in (ours, torchs))
        assert of_ours <= 4 * of_torch + 3e-6, f"{what}: {of_ours}, torch {of_torch}"

    found = []
    for function, dtype in ((case.ours, None), (case.torchs, None), (case.reference, torch.float64)):
        given = leaves(operands, dtype, but=case.not_torchs)
        loss = function(given, reduction="none")
        wanted = {operand: leaf for operand, leaf in given.items() if leaf.requires_grad}
        grads = torch.autograd.grad(loss.sum(), list(wanted.values()))
        found.append({"loss": loss.detach(), **dict(zip(wanted, grads, strict=True))})
    for what in found[0]:
        assert_no_worse(f"{name}: {what}", *(each[what] for each in found))


# ---- options, kinks and extremes ----


def outcome(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """The call's result or error, and the files that its warnings point at."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = call()
        except Exception as error:
            result = error
    return result, [warning.filename for warning in caught if issubclass(warning.category, UserWarning)]


def assert_same(call: Callable[[Any], Any], what: str, **close: Any) -> None:
    """call(fused) has the result or type of error of call(torch.nn.functional), and as many warnings."""
    (ours, given), (torchs, expected) = outcome(lambda: call(fused)), outcome(lambda: call(F))
    if isinstance(torchs, Exception):
        assert type(ours) is type(torchs), f"{what}: {ours!r}, torch {torchs!r}"
        return
    if isinstance(ours, Exception):
        raise AssertionError(f"{what}: {ours!r}, torch gives {torchs}") from ours
    torch.testing.assert_close(ours, torchs, equal_nan=True, msg=lambda text: f"{what}: {text}", **close)
    assert len(given) == len(expected), f"{what}: warnings in {given}, torch {expected}"


def test_what_the_docstrings_say_of_corners():
    """Ours and torch's functions do what the docstrings state about corner cases."""
    inf, nan = math.inf, math.nan
    for library in (fused, F):
        x, t = torch.tensor([0.5, -inf, inf, nan]), torch.tensor([0.0, 0.0, 0.0, 0.0])
        assert str(library.kl_div(x, t, reduction="none").tolist()) == "[0.0, nan, nan, nan]"
        of_log = library.kl_div(x, t - inf, reduction="none", log_target=True)
        assert of_log.isnan().all()
        x = torch.tensor([1.0, inf, nan], requires_grad=True)
        (grad,) = torch.autograd.grad(library.l1_loss(x, torch.tensor([1.0, inf, 1.0]), reduction="sum"), x)
        assert grad.tolist() == [0, 0, 0]
        with torch.autocast("cpu"):
            assert library.mse_loss(x.double(), x.double()).dtype == torch.float64
            assert library.mse_loss(x.bfloat16(), x.bfloat16()).dtype == torch.float32


THRESHOLDS = [0, 0.0, -0.0, -1, -0.5, math.nan, math.inf, 1, True, 1e-3, 1e-50, 1e30, 1e300]


@pytest.mark.parametrize(("function", "option"), [("smooth_l1_loss", "beta"), ("huber_loss", "delta")])
def test_thresholds(function, option, device):
    input = torch.tensor([0.0, 1.0, 5.0, -3e5, 1e-45, 2.0], device=device)
    target = torch.tensor([0.0, 1.0, 4.0, 0.0, 0.0, -1.0], device=device)
    others: list[Any] = [torch.tensor(0.5), torch.tensor(0.5, requires_grad=True), torch.tensor([0.5]), None, "1", 1j]
    for value, reduction in itertools.product(THRESHOLDS + others, ("none", "mean")):
        if isinstance(value, str | complex) or value is None:
            with pytest.raises(TypeError):
                getattr(fused, function)(input, target, **{option: value})
            continue

        # torch computes on the CPU here, since its CUDA kernel divides 0 by a beta that is 0 in float32.
        def step(module: Any, value: Any = value, reduction: str = reduction) -> tuple[Tensor, ...]:
            where = device if module is fused else "cpu"
            x, t = (leaf.to(where, copy=True).requires_grad_() for leaf in (input, target))
            loss = getattr(module, function)(x, t, reduction=reduction, **{option: value})
            return tuple(result.cpu() for result in (loss, *torch.autograd.grad(loss.sum(), (x, t))))

        assert_same(step, f"{option} {value!r} {reduction}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_beta_whose_inverse_overflows(dtype, device):
    beta = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny / 8
    distance = torch.tensor([0.0, beta / 4, -beta / 2, beta, 1.0, math.inf, math.nan], dtype=torch.float64).to(dtype)
    input, target = distance.to(device).requires_grad_(), torch.zeros_like(distance, device=device).requires_grad_()
    loss = fused.smooth_l1_loss(input, target, beta=beta, reduction="none")
    grads = torch.autograd.grad(loss, (input, target), torch.full_like(loss, 3))
    exact = distance.double() / beta  # small distances are 0 in float16
    slope = 3 * exact.clamp(-1, 1)
    for grad, expected in zip(grads, (slope, -slope), strict=True):
        torch.testing.assert_close(grad.cpu(), expected.to(dtype), rtol=1e-2, atol=0, equal_nan=True)
    torch.testing.assert_close(loss[4:].cpu(), distance[4:].abs(), equal_nan=True)
    assert loss[:4].abs().max() <= beta


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients_whose_slope_overflows(dtype, device):
    """The slope overflows, but the gradients are finite, for every reduction."""
    largest = torch.finfo(dtype).max
    input = (torch.tensor([0.9, -0.8, 0.6, 0.3], dtype=torch.float64) * largest).to(dtype).to(device)
    for function, options, slope in (
        ("mse_loss", {}, 2),
        ("huber_loss", {"delta": 0.95 * largest}, 1),
    ):
        for reduction, grad_output in (("mean", 1.0), ("mean", 0.75), ("sum", 0.25), ("none", 0.125)):
            x, t = input.clone().requires_grad_(), torch.zeros_like(input).requires_grad_()
            loss = getattr(fused, function)(x, t, reduction=reduction, **options)
            upstream = torch.full_like(loss, grad_output)
            grads = torch.autograd.grad(loss, (x, t), upstream)
            factor = slope * grad_output / (len(input) if reduction == "mean" else 1)
            for grad, sign in zip(grads, (1, -1), strict=True):
                torch.testing.assert_close(grad.double(), input.double() * (sign * factor), rtol=1e-2, atol=0)


def test_kinks(device):
    """Gradients at exactly |x - t| = beta or delta, and at 0. The distances are exact."""
    target = torch.tensor([0.0, 0.5, -3.0], device=device)[:, None]
    input = target + torch.tensor([-2.0, -0.5, -0.25, 0.0, 0.25, 0.5, 2.0], device=device)
    target = target.expand(input.shape)
    for function, options in (
        ("l1_loss", {}),
        *(("smooth_l1_loss", {"beta": beta}) for beta in (0, 0.25, 0.5, 2.0)),
        *(("huber_loss", {"delta": delta}) for delta in (0.25, 0.5, 2.0)),
    ):
        for dtype in DTYPES:

            def step(module: Any, f: str = function, o: dict = options, dtype: Any = dtype) -> tuple[Tensor, ...]:
                x, t = (leaf.to(dtype).clone().requires_grad_() for leaf in (input, target))
                loss = getattr(module, f)(x, t, reduction="none", **o)
                return loss, *torch.autograd.grad(loss.sum(), (x, t))

            assert_same(step, f"{function} {options} {dtype}", rtol=0, atol=0)


EXTREMES = [0.0, -0.0, 1e-6, 1e-40, 0.5, 1.0, -1.0, 2.0, -3.0, 20.0, -20.0, 88.0, -104.0, 1e4, -1e4, 1e30, -1e30]
SPECIAL: dict[str, list[float]] = {
    "real": [*EXTREMES, math.inf, -math.inf, math.nan],
    "logit": [*EXTREMES, math.inf, -math.inf, math.nan],
    "log-probability": [*EXTREMES, math.inf, -math.inf, math.nan],
    "rate": [0.0, 0.5, 3.0],
    "probability": [0.0, 1e-40, 1e-6, 0.3, 0.5, 1.0],
    "count": [0.0, 0.5, 1.0, 1.0001, 2.0, 7.0, 1e6, math.inf],
    "sign": [1.0, -1.0],
    "variance": [0.0, 1e-40, 1e-7, 0.2, 0.5, 1.0, 100.0, 1e30, math.inf, math.nan],
}


@every_case
def test_extremes(name, device):
    """Finite results are as near to torch in float64 as torch in float32 is. Infinities and NaN are torch's, with two
    exceptions: an element whose loss is a number may have a gradient where torch's is NaN, and a finite loss where
    torch overflows.
    """
    case = CASES[name]
    rows = list(itertools.product(*(SPECIAL[kind] for kind in case.operands.values())))
    columns = [torch.tensor(column, dtype=torch.float64).float().to(device) for column in zip(*rows, strict=True)]
    operands = dict(zip(case.operands, columns, strict=True))
    found = []
    for function, dtype in ((case.ours, None), (case.torchs, None), (case.torchs, torch.float64)):
        given = leaves(operands, dtype, case.not_torchs)
        loss = function(given, reduction="none")
        wanted = {operand: leaf for operand, leaf in given.items() if leaf.requires_grad}
        grads = torch.autograd.grad(loss, list(wanted.values()), torch.ones_like(loss))
        found.append({"loss": loss.detach(), **dict(zip(wanted, grads, strict=True))})
    for what in found[0]:
        ours, torchs, exact = (each[what] for each in found)
        error, of_torch = ((x.double() - exact).abs() for x in (ours, torchs))
        as_torch = (ours == torchs) | (ours.isnan() & torchs.isnan())
        as_good = (error <= of_torch) | (error <= 4e-7 * (1 + exact.abs())) | (ours == exact.float())
        better = ~torchs.isfinite() & ~exact.isfinite() & (ours.isinf() | ~(ours.isnan() | found[0]["loss"].isnan()))
        for i in (~(as_torch | as_good | better)).nonzero()[:, 0].tolist():
            raise AssertionError(f"{name}: {what} at {rows[i]}: {ours[i]}, torch {torchs[i]}, in float64 {exact[i]}")


# Shorter and longer than a block of the CPU's kernels (512), and not divisors of it.
@pytest.mark.parametrize("classes", [1, 2, 3, 17, 511, 512, 513, 1000, 9001])
def test_a_weight_of_classes_serves_all_rows(classes, device):
    """The weight is not expanded to all rows. Chunks (8192 elements) and blocks begin anywhere in it."""
    rows = 20_011 // classes + 3
    for dtype in DTYPES:
        input, target = torch.randn(rows, classes, device=device), torch.rand(rows, classes, device=device)
        weight, pos_weight = torch.rand(2, classes, device=device) + 0.5
        operands = [x.to(dtype) for x in (input, target, weight, pos_weight)]
        upstream, results = torch.randn(rows, classes, device=device), []
        for function, to in ((fused, dtype), (F, torch.float64)):
            x, t, w, p = (operand.detach().to(to) for operand in operands)
            leaves = (x.requires_grad_(), t.requires_grad_())
            losses = function.binary_cross_entropy_with_logits(x, t, w, pos_weight=p, reduction="none")
            results.append([losses, *torch.autograd.grad(losses, leaves, upstream.to(to))])
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)


# Whole blocks and chunks, with a last vector that is not full. Blocks begin anywhere in a period, which is shorter or
# longer than a block.
@pytest.mark.parametrize(("rows", "classes"), [(1, 24_601), (1, 16_384), (631, 39), (17, 1_447)])
def test_sums_over_blocks(rows, classes, device):
    """Sums of operands that are read in place, also from an odd address, and of operands that pass through a buffer."""

    def drawn(*shape):
        memory = torch.rand(3 + math.prod(shape), dtype=torch.float64, device=device)
        return memory, shape

    input, target, weight = drawn(rows, classes), drawn(rows, classes), drawn(classes)
    for dtype in DTYPES:
        found = []
        x, t, w = (memory.to(dtype)[3:].view(shape) for memory, shape in (input, target, weight))
        for function, to in ((fused, dtype), (F, torch.float64)):
            for loss, options in (
                (function.mse_loss, {}),
                (function.binary_cross_entropy_with_logits, {"weight": w.to(to)}),
            ):
                for wanted in ((0,), (0, 1)):
                    # `to` does not copy if the type is the same, so the memory still begins at that address.
                    leaves = [operand.to(to).detach().requires_grad_(i in wanted) for i, operand in enumerate((x, t))]
                    value = loss(*leaves, reduction="sum", **options)
                    grads = torch.autograd.grad(value, [leaves[i] for i in wanted])
                    without = loss(*(leaf.detach() for leaf in leaves), reduction="sum", **options)
                    if device == "cpu" or dtype != torch.float64:
                        assert torch.equal(value, without)
                    else:  # nvcc may fuse a product and a sum in one kernel and not in the other
                        torch.testing.assert_close(value, without, rtol=1e-14, atol=0)
                    found.append((value, *grads))
        half = len(found) // 2
        eps = torch.finfo(dtype).eps
        for mine, theirs in zip(found[:half], found[half:], strict=True):
            for one, other in zip(mine, theirs, strict=True):
                torch.testing.assert_close(one.double(), other, rtol=4 * eps, atol=8 * eps)
