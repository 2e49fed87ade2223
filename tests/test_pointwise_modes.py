"""The pointwise losses with autograd's and the compiler's means, under autocast, as modules, with mixed types."""

import copy
import inspect
import io
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from helpers.draws import DTYPES, REDUCTIONS
from helpers.graphs import losses_in
from helpers.oracle import assert_exact
from helpers.pointwise import CASES, Case, every_case, leaves, reductions
from torch import Tensor, nn
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.autograd import gradcheck, gradgradcheck

import fusedloss
import fusedloss.functional as fused

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides", "ignore:Using a target size")

MODULES = {
    "l1_loss": "L1Loss",
    "smooth_l1_loss": "SmoothL1Loss",
    "huber_loss": "HuberLoss",
    "binary_cross_entropy_with_logits": "BCEWithLogitsLoss",
    "kl_div": "KLDivLoss",
    "poisson_nll_loss": "PoissonNLLLoss",
    "gaussian_nll_loss": "GaussianNLLLoss",
    "soft_margin_loss": "SoftMarginLoss",
}


def away_from_kinks(case: Case, shape: tuple[int, ...], device: str) -> dict[str, Tensor]:
    """In float64, where finite differences see a derivative."""
    operands = case.draw(shape, torch.float64, device)
    if "probability" in case.operands.values():
        operands["target"] = operands["target"].clamp(0.05, 0.95)
    if "count" in case.operands.values():
        operands["target"] = operands["target"] + 0.3
    if "logit" in case.operands.values():
        operands["input"] = operands["input"] / 4
    if "var" in operands:
        operands["var"] = operands["var"] + case.options.get("eps", 0)
    for kink in (0, 0.3, 1, 1.7):
        distance = (operands["input"] - operands["target"]).abs() - kink
        operands["input"] = torch.where(distance.abs() < 1e-2, operands["input"] + 0.03, operands["input"])
    return operands


@every_case
def test_finite_differences(name, device):
    case = CASES[name]
    for reduction in reductions(case):
        operands = away_from_kinks(case, (2, 3), device)
        for wanted in (tuple(operands), ("input",))[: 1 + bool(case.not_torchs)]:
            given = leaves(operands, but=[operand for operand in operands if operand not in wanted])

            def loss(*args: Tensor, names: tuple = tuple(operands), reduction: str = reduction) -> Tensor:
                return case.ours(dict(zip(names, args, strict=True)), reduction=reduction)

            args = tuple(given.values())
            by_torch = not set(case.not_torchs) & set(wanted)
            checks = {"check_batched_grad": True, "check_forward_ad": by_torch, "check_batched_forward_grad": by_torch}
            if case.function == "gaussian_nll_loss":
                checks["check_batched_forward_grad"] = False  # looks at var, which no batch allows
            assert gradcheck(loss, args, **checks), f"{name}, {reduction}, {wanted}"
            assert gradgradcheck(loss, args, check_batched_grad=True), f"{name}, {reduction}, {wanted}"


def first_and_second(loss: Tensor, given: dict[str, Tensor]) -> list[Tensor]:
    wanted = [leaf for leaf in given.values() if leaf.requires_grad]
    grads = torch.autograd.grad(loss.sum(), wanted, create_graph=True)
    of = sum((grad * grad).sum() for grad in grads)
    seconds = torch.autograd.grad(of, wanted, allow_unused=True, materialize_grads=True) if of.requires_grad else []
    return [*(grad.detach() for grad in grads), *seconds]


@every_case
def test_a_differentiable_gradient_is_the_kernels(name, device):
    """Composed, for those who differentiate twice; in 16 bits rounded as once. And its derivative is torch's."""
    case = CASES[name]
    for dtype, reduction in itertools.product(DTYPES, reductions(case)):
        operands = case.draw((7, 11), dtype, device)
        given = leaves(operands)
        kernels = torch.autograd.grad(case.ours(given, reduction=reduction).sum(), list(given.values()))
        found = first_and_second(case.ours(given, reduction=reduction), given)
        for operand, grad, composed in zip(operands, kernels, found, strict=False):
            what, grad = f"{name}, {dtype}, {reduction}: {operand}", grad.double()
            size = grad.nan_to_num().abs().max().item()  # in 16 bits each is rounded
            assert_exact(composed, grad, 1 + (size if dtype.itemsize > 2 else 1e3 * size), what)
        if dtype == torch.float16:
            continue  # overflows
        ours, torchs = leaves(operands, but=case.not_torchs), leaves(operands, torch.float64, but=case.not_torchs)
        found = first_and_second(case.ours(ours, reduction=reduction), ours)
        expected = first_and_second(case.torchs(torchs, reduction=reduction), torchs)
        assert len(found) == len(expected)
        for mine, right in zip(found, expected, strict=True):
            known = ~right.isnan()
            tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-1}[dtype]
            torch.testing.assert_close(
                mine.double()[known], right[known], rtol=tolerance, atol=tolerance * (1 + right[known].abs().max()),
                msg=lambda text, what=f"{name} {dtype} {reduction}": f"{what}: {text}",
            )  # fmt: skip


@every_case
def test_transforms_are_torchs(name, device):
    case = CASES[name]
    operands = case.draw((4, 6), device=device)
    tangent = torch.randn(4, 6, device=device)
    for reduction in reductions(case):

        def results(function: Callable[..., Tensor], reduction: str = reduction) -> dict[str, Tensor | type]:
            def of(input: Tensor, *others: Tensor) -> Tensor:
                given = dict(zip(operands, (input, *(others or list(operands.values())[1:])), strict=True))
                return function(given, reduction=reduction)

            def summed(*args: Tensor) -> Tensor:
                return of(*args).sum()

            found: dict[str, Any] = {}
            for what, call in {
                "jvp": lambda: torch.func.jvp(of, (operands["input"],), (tangent,))[1],
                "grad": lambda: torch.func.grad(summed)(operands["input"]),
                "vmap": lambda: torch.func.vmap(of)(*operands.values()),
                "vmap of the input": lambda: torch.func.vmap(of, (0, *(None,) * (len(operands) - 1)))(
                    operands["input"], *(operand[0] for operand in list(operands.values())[1:])
                ),
                "gradients of samples": lambda: torch.func.vmap(torch.func.grad(summed))(*operands.values()),
                "hessian": lambda: torch.func.hessian(summed)(operands["input"]),
                "jacrev": lambda: torch.func.jacrev(of)(operands["input"]),
                "functionalize": lambda: torch.func.functionalize(of)(operands["input"]),
            }.items():
                try:
                    found[what] = call()
                except Exception as error:
                    found[what] = type(error)
            with fwAD.dual_level():
                dual = fwAD.make_dual(operands["input"], tangent)
                found["dual"] = fwAD.unpack_dual(of(dual)).tangent
            return found

        ours, torchs = results(case.ours), results(case.torchs)
        for what, expected in torchs.items():
            if isinstance(expected, type):
                assert ours[what] is expected, f"{name}, {reduction}, {what}: {ours[what]}, torch {expected}"
            else:
                assert isinstance(ours[what], Tensor), f"{name}, {reduction}, {what}: {ours[what]}"
                torch.testing.assert_close(
                    ours[what], expected, equal_nan=True,
                    msg=lambda text, what=f"{name}, {reduction}, {what}": f"{what}: {text}",
                )  # fmt: skip


@every_case
def test_several_backward_passes(name, device):
    case = CASES[name]
    for reduction in REDUCTIONS:
        given = leaves(case.draw((5, 33), device=device))
        loss = case.ours(given, reduction=reduction)
        passes = [torch.autograd.grad(loss.sum() * k, list(given.values()), retain_graph=True) for k in (1, 1, 3, 1)]
        for first, second, tripled, last in zip(*passes, strict=True):
            assert torch.equal(first.nan_to_num(), last.nan_to_num()) and torch.equal(
                *(x.isnan() for x in (first, last))
            )
            torch.testing.assert_close(second, first, equal_nan=True)
            torch.testing.assert_close(tripled, 3 * first, equal_nan=True)
        loss.sum().backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.sum().backward()


@every_case
def test_operands_that_were_written_to(name, device):
    case = CASES[name]
    for reduction, value in itertools.product(REDUCTIONS, (1, 3)):  # a gradient of the forward pass, or of the backward
        for written in case.operands:
            given = leaves(case.draw((5, 33), device=device))
            used = {operand: leaf * 1 for operand, leaf in given.items()}
            loss = case.ours(used, reduction=reduction).sum() * value
            used[written].zero_()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


@every_case
def test_operands_of_inference_mode(name, device):
    """They cannot be saved for the backward pass; some losses of torch's do without."""
    case = CASES[name]
    operands = case.draw((5, 33), device=device)
    for reduction in REDUCTIONS:
        found = []
        for loss in (case.ours, case.torchs):
            with torch.inference_mode():
                given = {operand: values.clone() for operand, values in operands.items()}
            given["input"] = operands["input"].clone().requires_grad_()
            try:
                loss(given, reduction=reduction).sum().backward()
                found.append(given["input"].grad)
            except RuntimeError as error:
                found.append(error)
        if isinstance(found[1], Tensor):
            torch.testing.assert_close(*found)
        assert case.function != "l1_loss" or isinstance(found[1], Tensor)


def test_an_operand_of_inference_mode_under_autocast(device):
    with torch.inference_mode():
        target = torch.randn(5, device=device, dtype=torch.bfloat16)
    input = torch.randn(5, device=device, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        losses = [module.l1_loss(input, target) for module in (fused, F)]
    assert losses[0].dtype == losses[1].dtype == torch.float32
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, input)[0] for loss in losses))


@every_case
def test_threads_do_not_change_a_bit(name):
    case = CASES[name]
    before = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        operands = case.draw((100_003,), dtype)
        found = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                given = leaves(operands)
                loss = case.ours(given)
                found.append((loss.detach(), *torch.autograd.grad(loss * 0.5, list(given.values()))))
        finally:
            torch.set_num_threads(before)
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                assert torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan()), name


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
            ):  # of which autocast on the CPU does not know; mixed
                assert torch.equal(loss, torchs), what
                continue
            torch.testing.assert_close(
                loss.double(), exact, rtol=1e-4, atol=1e-4, msg=lambda text, w=what: f"{w}: {text}"
            )
            if of_target is None:  # torch's own huber_loss has no gradients of mixed types
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


# ---- modules ----


def module_of(case: Case, library: Any, operands: dict[str, Tensor], **options: Any) -> nn.Module:
    weights = {operand: x for operand, x in operands.items() if operand in ("weight", "pos_weight")}
    return getattr(library, MODULES[case.function])(**weights, **case.options, **options)


def of_module(operands: dict[str, Tensor]) -> list[Tensor]:
    return [x for operand, x in operands.items() if operand not in ("weight", "pos_weight")]


@every_case
def test_modules(name, device):
    case = CASES[name]
    for reduction in reductions(case):
        operands = case.draw((4, 3), device=device)
        ours, torchs = (module_of(case, library, operands, reduction=reduction) for library in (fusedloss, nn))
        assert isinstance(ours, type(torchs)) and repr(ours) == repr(torchs)
        assert list(ours.state_dict()) == list(torchs.state_dict())
        ours.load_state_dict(torchs.state_dict())
        assert inspect.signature(type(ours)) == inspect.signature(type(torchs))
        assert list(inspect.signature(ours.forward).parameters) == list(inspect.signature(torchs.forward).parameters)
        args = of_module(operands)
        expected = case.ours(operands, reduction=reduction)
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        for module in (
            ours,
            copy.deepcopy(ours),
            pickle.loads(pickle.dumps(ours)),
            torch.load(file, weights_only=False),
        ):
            assert type(module) is type(ours)
            assert torch.equal(module(*args), expected), f"{name}: {module}"
        torch.testing.assert_close(torchs(*args), expected)
        double = copy.deepcopy(ours).double()
        assert double(*(x.double() for x in args)).dtype == torch.float64


@every_case
def test_torchscript_gives_torchs(name):
    case = CASES[name]
    operands = case.draw((4, 3))
    ours, torchs = (module_of(case, library, operands) for library in (fusedloss, nn))
    args = of_module(operands)
    torch.testing.assert_close(torch.jit.trace(ours, args, check_trace=False)(*args), torchs(*args))
    try:
        scripted = torch.jit.script(torchs)
    except Exception as error:  # gaussian_nll_loss, of some versions
        with pytest.raises(type(error)):
            torch.jit.script(ours)
        return
    torch.testing.assert_close(torch.jit.script(ours)(*args), scripted(*args))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = ours

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return self.loss(input, target)

    if len(args) == 2:
        torch.testing.assert_close(torch.jit.script(Model())(*args), torchs(*args))


@every_case
def test_patch(name, device):
    case = CASES[name]
    operands = case.draw((4, 3), device=device)
    module, args = module_of(case, nn, operands), of_module(operands)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, fusedloss.patch():
        module(*args)
        case.torchs(operands)
        # What differentiates twice is composed of torch's own, also while they are replaced.
        given = leaves(operands)
        torch.autograd.grad(case.torchs(given).sum(), list(given.values()), create_graph=True)
    counts = {event.key: event.count for event in profile.key_averages() if event.key.startswith("fusedloss::")}
    assert counts.pop("fusedloss::pointwise_composed_gradients") == 1 and sum(counts.values()) == 3, counts


# ---- graphs ----


COMPILED = [
    ("l1", "none"), ("smooth l1, beta 0.3", "sum"), ("huber, delta 1.7", "mean"), ("bce", "mean"),
    ("bce, both weights", "none"), ("kl_div", "mean"), ("kl_div, log_target", "batchmean"),
    ("poisson, rate, full", "mean"), ("gaussian, full", "none"), ("soft margin", "mean"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "reduction"), COMPILED)
def test_compiled(name, reduction, device, fresh_compiler):
    """fullgraph, so that nothing breaks it; bitwise the eager call's, also where the size varies."""
    case = CASES[name]
    recorded = AotEagerAndRecordGraphs()
    operands = case.draw((6, 5), device=device)
    module = module_of(case, fusedloss, operands, reduction=reduction)
    compiled = torch.compile(module, backend=recorded, fullgraph=True)
    for rows in (6, 9, 11) if reduction == "batchmean" else (6,):
        args = [x.requires_grad_() for x in of_module(case.draw((rows, 5), device=device))]
        steps = []
        for call in (compiled, module):
            loss = call(*args)
            steps.append((loss.detach(), *torch.autograd.grad(loss, args, torch.full_like(loss, 0.7))))
        for a, b in zip(*steps, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), rows
    names = losses_in(*recorded.fw_graphs, *recorded.bw_graphs)
    assert names == {"fusedloss.pointwise_forward", "fusedloss.pointwise_backward"}, names


@pytest.mark.parametrize("name", ["bce, pos_weight", "gaussian, full"])
def test_compiled_by_inductor(name, device, fresh_compiler):
    case = CASES[name]
    operands = case.draw((6, 50), device=device)
    compiled = torch.compile(lambda **given: case.ours(given), fullgraph=True)
    steps = []
    for call in (compiled, lambda **given: case.ours(given)):
        given = leaves(operands)
        loss = call(**given)
        steps.append((loss.detach(), *torch.autograd.grad(loss, list(given.values()))))
    for a, b in zip(*steps, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_with_a_negative_variance(fresh_compiler):
    operands = CASES["gaussian"].draw((6, 5))
    compiled = torch.compile(fusedloss.GaussianNLLLoss(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**operands), fusedloss.GaussianNLLLoss()(**operands))
    with pytest.raises(RuntimeError, match="var has negative entry/entries"):
        compiled(operands["input"], operands["target"], -operands["var"])
