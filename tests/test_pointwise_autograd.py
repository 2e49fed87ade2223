"""Derivatives of the pointwise losses: finite differences, double backward, transforms and saved operands."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from helpers.draws import DTYPES, REDUCTIONS
from helpers.oracle import assert_exact
from helpers.pointwise import CASES, Case, every_case, leaves, reductions
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fusedloss.functional as fused

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides", "ignore:Using a target size")


def away_from_kinks(case: Case, shape: tuple[int, ...], device: str) -> dict[str, Tensor]:
    """float64 operands at which finite differences approximate the derivative."""
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
                checks["check_batched_forward_grad"] = False  # reads the values of var, which vmap does not support
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
    """With create_graph the gradient is composed. It equals the kernel's gradient, and its derivative is torch's."""
    case = CASES[name]
    for dtype, reduction in itertools.product(DTYPES, reductions(case)):
        operands = case.draw((7, 11), dtype, device)
        given = leaves(operands)
        kernels = torch.autograd.grad(case.ours(given, reduction=reduction).sum(), list(given.values()))
        found = first_and_second(case.ours(given, reduction=reduction), given)
        for operand, grad, composed in zip(operands, kernels, found, strict=False):
            what, grad = f"{name}, {dtype}, {reduction}: {operand}", grad.double()
            size = grad.nan_to_num().abs().max().item()  # each 16-bit result is rounded
            assert_exact(composed, grad, 1 + (size if dtype.itemsize > 2 else 1e3 * size), what)
        if dtype == torch.float16:
            continue  # the second derivative overflows
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
    for reduction, value in itertools.product(REDUCTIONS, (1, 3)):  # computed by the forward or backward pass
        for written in case.operands:
            given = leaves(case.draw((5, 33), device=device))
            used = {operand: leaf * 1 for operand, leaf in given.items()}
            loss = case.ours(used, reduction=reduction).sum() * value
            used[written].zero_()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


@every_case
def test_operands_of_inference_mode(name, device):
    """They cannot be saved for the backward pass, but some of torch's losses do not need them."""
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
