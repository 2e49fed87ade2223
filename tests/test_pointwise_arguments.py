"""Mixed types, autocast, warnings, options and variances of the pointwise losses, compared with torch."""

import itertools
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.draws import DTYPES, REDUCTIONS
from helpers.pointwise import CASES, MODULES, Case, every_case, leaves, reductions
from torch import Tensor

import fusedloss.functional as fused

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides", "ignore:Using a target size")


# ---- types ----


TYPES = [*DTYPES, torch.int64, torch.uint8, torch.bool, torch.complex64]


def outcome(call: Callable[[], Any]) -> tuple[Any, list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return call(), [warning for warning in caught if issubclass(warning.category, UserWarning)]
        except Exception as error:
            return error, []


def outcomes(functions: Iterable[Callable], *args: Any, **options: Any) -> list[tuple[Any, list]]:
    return [outcome(partial(function, *args, **options)) for function in functions]


def assert_same_outcome(ours: Any, torchs: Any, what: str, tolerance: float = 1e-4) -> None:
    if isinstance(torchs, Exception):
        assert type(ours) is type(torchs), f"{what}: {ours!r}, torch {torchs!r}"
        return
    assert isinstance(ours, Tensor), f"{what}: {ours!r}, torch {torchs}"
    if torchs.dtype in (torch.bfloat16, torch.float16):
        tolerance = 5e-2
    torch.testing.assert_close(
        ours, torchs, equal_nan=True, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}"
    )


def typed(case: Case, kind: torch.dtype, of_target: torch.dtype, device: str) -> dict[str, Tensor]:
    operands = case.draw((4, 3), torch.float64, device)
    found = {"input": operands["input"].to(kind), "target": operands["target"].to(of_target)}
    return found | {
        operand: x.to(kind if kind.is_floating_point else torch.float32)
        for operand, x in operands.items()
        if operand not in found
    }


@every_case
def test_mixed_types_are_torchs(name, device):
    case = CASES[name]
    for kind, of_target in itertools.product(TYPES, repeat=2):
        if kind == of_target:
            continue
        for reduction in reductions(case):
            operands = typed(case, kind, of_target, device)
            ours, torchs = (found for found, _ in outcomes((case.ours, case.torchs), operands, reduction=reduction))
            assert_same_outcome(ours, torchs, f"{name}, {kind} and {of_target}, {reduction}")


@pytest.mark.parametrize("kind", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("function", MODULES)
def test_types_without_kernels_are_torchs(function, kind, device):
    for case in CASES.values():
        if case.function == function:
            for reduction in REDUCTIONS:
                operands = typed(case, kind, kind, device)
                ours, torchs = (found for found, _ in outcomes((case.ours, case.torchs), operands, reduction=reduction))
                assert_same_outcome(ours, torchs, f"{case}, {kind}, {reduction}")


@every_case
def test_weights_and_variances_of_other_types_are_torchs(name, device):
    case = CASES[name]
    for other in [operand for operand in case.operands if operand not in ("input", "target")]:
        for kind, of_other in itertools.product(DTYPES, [*DTYPES, torch.int64, torch.bool, torch.complex64]):
            operands = case.draw((4, 3), kind, device)
            operands[other] = operands[other].to(of_other)
            ours, torchs = (found for found, _ in outcomes((case.ours, case.torchs), operands))
            assert_same_outcome(ours, torchs, f"{name}, {other}, {kind} and {of_other}")


@every_case
def test_autocast(name, device):
    case = CASES[name]
    for lower, kind, of_target in itertools.product((torch.bfloat16, torch.float16), DTYPES, (None, torch.float32)):
        for reduction in REDUCTIONS:
            operands = typed(case, kind, of_target or kind, device)
            ours, double = (leaves(operands, to, case.not_torchs) for to in (None, torch.float64))
            with torch.autocast(device, dtype=lower):
                loss = case.ours(ours, reduction=reduction)
                torchs = case.torchs(leaves(operands, but=operands), reduction=reduction)
            what = f"{name}, {kind} and {of_target}, {reduction}"
            exact = case.torchs(double, reduction=reduction)
            assert loss.dtype == torchs.dtype, what
            if loss.dtype in (torch.bfloat16, torch.float16) or (
                case.function == "gaussian_nll_loss" and kind not in (of_target or kind, torch.float64)
            ):  # autocast on the CPU does not cover gaussian_nll_loss; mixed dtypes
                assert torch.equal(loss, torchs), what
                continue
            torch.testing.assert_close(
                loss.double(), exact, rtol=1e-4, atol=1e-4, msg=lambda text, w=what: f"{w}: {text}"
            )
            if of_target is None:  # torch's own huber_loss has no gradients for mixed types
                wanted = [operand for operand, leaf in ours.items() if leaf.requires_grad]
                grads = torch.autograd.grad(loss.sum(), [ours[operand] for operand in wanted])
                right = torch.autograd.grad(exact.sum(), [double[operand] for operand in wanted])
                for mine, theirs in zip(grads, right, strict=True):
                    known = ~theirs.isnan()
                    size = 1 + theirs[known].abs().max()
                    torch.testing.assert_close(mine.double()[known], theirs[known], rtol=1e-2, atol=1e-2 * size)


# ---- warnings ----


@pytest.mark.parametrize("function", ["l1_loss", "smooth_l1_loss", "huber_loss"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sizes_that_differ_are_warned_of(function, reduction, device):
    for shapes in (((4, 1), (4,)), ((3,), (2, 3)), ((2, 2), ()), ((3,), (3,))):
        input, target = (torch.randn(shape, device=device, requires_grad=True) for shape in shapes)
        given = [
            caught
            for _, caught in outcomes(
                (getattr(fused, function), getattr(F, function)), input, target, reduction=reduction
            )
        ]
        found, expected = ([(str(w.message), w.filename, w.lineno) for w in each] for each in given)
        assert found == expected and len(found) == (shapes[0] != shapes[1]), shapes


@pytest.mark.parametrize("log_target", [False, True])
def test_the_mean_of_kl_div_is_warned_of(log_target, device):
    input, target = -torch.rand(4, 3, device=device), torch.rand(4, 3, device=device)
    for of_target in (torch.float32, torch.float64, torch.bfloat16):
        for options in (
            {}, *({"reduction": reduction} for reduction in (*REDUCTIONS, "batchmean")),
            *({"size_average": a, "reduce": b} for a, b in itertools.product((None, False, True), repeat=2)),
        ):  # fmt: skip
            given = [
                caught
                for _, caught in outcomes(
                    (fused.kl_div, F.kl_div), input, target.to(of_target), log_target=log_target, **options
                )
            ]
            found, expected = ([str(warning.message) for warning in each] for each in given)
            assert found == expected, options
            if of_target == torch.float32 and "size_average" not in options:
                assert all(warning.filename == __file__ for warning in given[0])


@pytest.mark.parametrize(
    "function", [function for function in MODULES if function not in ("huber_loss", "gaussian_nll_loss")]
)
def test_legacy_options(function, device):
    case = next(case for case in CASES.values() if case.function == function)
    operands = case.draw((4, 3), device=device)
    for size_average, reduce, reduction in itertools.product(
        (None, False, True), (None, False, True), ("mean", "bogus", "batchmean")
    ):
        options = {"size_average": size_average, "reduce": reduce, "reduction": reduction}
        (ours, given), (torchs, expected) = outcomes((case.ours, case.torchs), operands, **options)
        assert_same_outcome(ours, torchs, f"{function} {options}")
        assert len(given) == len(expected), options


@every_case
def test_unknown_reductions(name, device):
    case = CASES[name]
    operands = case.draw((4, 3), device=device)
    for reduction in ("bogus", "", "batchmean"):
        ours, torchs = (found for found, _ in outcomes((case.ours, case.torchs), operands, reduction=reduction))
        assert_same_outcome(ours, torchs, f"{name}, {reduction}")
        if isinstance(torchs, Exception):
            assert str(ours) == str(torchs)


@pytest.mark.parametrize("function", ["poisson_nll_loss", "gaussian_nll_loss"])
def test_eps_of_other_types_is_torchs(function):
    case = next(case for case in CASES.values() if case.function == function)
    operands = case.draw((4, 3))
    for eps in ("a", None, float("nan"), torch.tensor(0.5), True):
        found = []
        for module in (fused, F):
            try:
                found.append(getattr(module, function)(**operands, eps=eps))
            except (TypeError, RuntimeError) as error:
                found.append((type(error), str(error)))
        ours, torchs = found
        if isinstance(torchs, Tensor):
            torch.testing.assert_close(ours, torchs, equal_nan=True)
        else:
            assert ours == torchs, eps


@pytest.mark.parametrize("module", ["huber_loss", "smooth_l1_loss"])
def test_an_infinite_threshold(module):
    input = torch.tensor([2e38, -1e38, 3.0], requires_grad=True)
    option = {"delta" if module == "huber_loss" else "beta": float("inf")}
    losses = [getattr(functions, module)(input, torch.zeros(3), reduction="none", **option) for functions in (fused, F)]
    grads = [torch.autograd.grad(loss.sum(), input)[0] for loss in losses]
    torch.testing.assert_close(*losses, equal_nan=True)
    torch.testing.assert_close(*grads, equal_nan=True)


@every_case
def test_a_subclass_is_asked_once(name):
    asked: list[str] = []

    class Asked(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            asked.append(function.__name__)
            return super().__torch_function__(function, types, args, kwargs or {})

    case = CASES[name]
    operands = case.draw((4, 3))
    operands["input"] = operands["input"].as_subclass(Asked)
    for reduction in (*REDUCTIONS, *(["batchmean"] if case.function == "kl_div" else [])):
        asked.clear()
        assert isinstance(case.ours(operands, reduction=reduction), Asked)
        assert asked == [case.function]


def test_a_sparse_weight_is_torchs():
    input, target, weight = torch.randn(4), torch.rand(4), torch.ones(4).to_sparse()
    ours, torchs = (
        module.binary_cross_entropy_with_logits(input, target, weight, reduction="sum") for module in (fused, F)
    )
    torch.testing.assert_close(ours, torchs)


# ---- var ----


VARIANCES: list[Any] = [
    0.0, 0.5, -1.0, 1, -1, True, float("nan"), float("inf"), None, "x", (5, 4, 3), (5, 4), (5, 4, 1), (5, 1, 3),
    (1, 4, 3), (1, 1, 3), (5, 1, 1), (1,), (), (3,), (4, 3), (5,), (5, 4, 3, 1), (5, 4, 2), (1, 1, 1), (5, 2, 3), (0,),
    (5, 4, 0),
]  # fmt: skip


@pytest.mark.parametrize("full", [False, True])
def test_variances(full, device):
    input, target = torch.randn(5, 4, 3, device=device), torch.randn(5, 4, 3, device=device)
    shapes = [(5, 4, 3), (4, 3), (2, 5, 4, 3)]
    for var, of_target, reduction in itertools.product(VARIANCES, shapes, [*REDUCTIONS, "bogus"]):
        if isinstance(var, tuple):
            var = torch.rand(var, device=device) + 0.1
        t = torch.randn(of_target, device=device) if of_target != (5, 4, 3) else target
        results = []
        for module in (fused, F):
            of = [leaf.clone().requires_grad_() if isinstance(leaf, Tensor) else leaf for leaf in (input, t, var)]

            def step(of: list = of, module: Any = module, reduction: str = reduction) -> Tensor:
                loss = module.gaussian_nll_loss(*of, full=full, reduction=reduction)
                (loss.sum() * 0.7).backward()
                grads = [leaf.grad.flatten() for leaf in of if isinstance(leaf, Tensor)]
                return torch.cat([loss.detach().flatten(), *grads])

            results.append(outcome(step)[0])
        assert_same_outcome(*results, f"{getattr(var, 'shape', var)}, {of_target}, {reduction}")
    one_negative = torch.rand(5, 4, 3)
    one_negative[0, 0, 0], one_negative[4, 3, 2] = float("nan"), -1  # the sum is NaN, not -inf
    integers = torch.full((5, 4, 3), -1, dtype=torch.int64)
    for var in (-torch.rand(5, 4, 3), torch.tensor(-1.0), -torch.rand(7), integers, one_negative):
        for module in (fused, F):
            with pytest.raises(ValueError, match="var has negative entry/entries"):
                module.gaussian_nll_loss(input, target, var.to(device))
