"""The losses under dispatch modes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.draws import REDUCTIONS
from helpers.graphs import (
    CE,
    CE_BACKWARD,
    CLASSES,
    KINDS,
    MSE,
    MSE_BACKWARD,
    assert_step,
    doubled,
    functions,
    given,
    is_loss,
    step,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedloss
import fusedloss.functional as fused
from fusedloss import _dispatch, reference

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Looking(TorchDispatchMode):
    """A mode that records the calls and passes them on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function).removesuffix(".default"))
        return function(*args, **(kwargs or {}))

    def losses(self) -> list[str]:
        return list(filter(is_loss, self.seen))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_dispatch_mode_sees_the_ops(kind, reduction, device):
    forward, backward = (MSE, MSE_BACKWARD) if kind == "mse" else (CE, CE_BACKWARD)
    input, target, options = given(kind, device)
    ours, _ = functions(kind)

    def looked_at(input: Tensor, target: Tensor, **options) -> Tensor:
        with Looking() as mode:
            loss = doubled(ours)(input, target, **options)
        assert mode.losses() == [forward]
        return loss

    assert_step(kind, looked_at, input, target, reduction=reduction, **options)
    with Looking() as mode:
        loss, grad, upstream = step(ours, input, target, reduction=reduction, **options)
    assert mode.losses() == [forward, backward]
    eager_loss, eager_grad, _ = step(ours, input, target, upstream, reduction=reduction, **options)
    assert torch.equal(loss, eager_loss) and torch.equal(grad, eager_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mode_that_looks_at_the_backward_pass_only(kind, device):
    """The mode is active in the backward pass of an eager loss."""
    input, target, options = given(kind, device)
    ours, _ = functions(kind)
    _, eager, upstream = step(ours, input, target, **options)
    leaf = input.requires_grad_()
    loss = ours(leaf, target, **options)
    with Looking() as mode:
        (grad,) = torch.autograd.grad(loss, leaf, upstream)
    assert mode.losses() == [MSE_BACKWARD if kind == "mse" else CE_BACKWARD]
    assert torch.equal(grad, eager)


NO_CLASSES = """
import torch, torch.nn.functional as F
import fusedloss.functional as fused
from torch.utils._python_dispatch import TorchDispatchMode

class Looking(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))

for shape in ((2, 0), (0, 0), (0,), (2, 0, 3)):
    for reduction in ("none", "mean", "sum"):
        found = []
        for loss in (fused.cross_entropy, F.cross_entropy):
            input = torch.zeros(shape, requires_grad=True)
            with Looking():
                value = loss(input, torch.zeros(shape), reduction=reduction)
                value.sum().backward()
            found.append((value.detach().nan_to_num(123).tolist(), input.grad.tolist()))
        print(shape, reduction, found[0] == found[1], found)
"""


def test_a_custom_loss_without_kernels_for_the_device(monkeypatch):
    """Without kernels, as on CUDA without nvcc, the loss is composed of torch's operations, also under a mode."""
    criterion = fusedloss.custom_loss("log(cosh(input - target))")
    input, target = torch.randn(3, 4), torch.randn(4)
    expected = criterion(input, target)
    for is_compiled in (True, False):
        monkeypatch.setattr(_dispatch, "is_compiled_for", lambda name, device_type, answer=is_compiled: answer)
        with Looking() as looking:
            torch.testing.assert_close(criterion(input, target), expected)
        assert ("fusedloss.pointwise_forward" in looking.seen) == is_compiled


def test_logits_without_classes():
    """This runs in a process of its own, since a wrong call would read memory that does not exist."""
    finished = subprocess.run(
        [sys.executable, "-c", NO_CLASSES],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr or finished.returncode
    lines = finished.stdout.splitlines()
    assert len(lines) == 12 and all(" True [" in line for line in lines), finished.stdout


@pytest.mark.parametrize("require", [(True, True), (False, True)], ids=str)
def test_mse_targets_under_a_dispatch_mode(require, device):
    pair = [torch.randn(5, CLASSES, device=device) for _ in range(2)]
    upstream = torch.randn(5, CLASSES, device=device)
    grads = []
    for loss in (fused.mse_loss, reference.mse_loss):
        leaves = [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(pair, require, strict=True)]
        with Looking():
            value = loss(*leaves, reduction="none")
            grads.append(
                torch.autograd.grad(value, [leaf for leaf in leaves if leaf.requires_grad], upstream.to(value.dtype))
            )
    for mine, exact in zip(*grads, strict=True):
        torch.testing.assert_close(mine, exact)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_under_a_dispatch_mode(kind, reduction, device):
    """The registered ops have derivatives, first and second."""
    input, target, options = given(kind, device, 2, 3, dtype=torch.float64)
    inputs = (input.requires_grad_(), target.requires_grad_()) if kind == "mse" else (input.requires_grad_(),)

    def loss(input: Tensor, target: Tensor = target) -> Tensor:
        return functions(kind)[0](input, target, reduction=reduction, **options)

    with Looking() as mode:
        assert torch.autograd.gradcheck(loss, inputs)
        assert torch.autograd.gradgradcheck(loss, inputs)
    assert (MSE_BACKWARD if kind == "mse" else CE_BACKWARD) in mode.seen


def test_a_second_derivative_under_a_dispatch_mode_walks_the_graph_once(device):
    """Only the outer pass goes through the graph behind the inputs, hooks included, also if target depends on input."""
    values = torch.randn(5, dtype=torch.float64, device=device)
    for pair_of in (lambda x: (x, 2 * x), lambda x: (x * 3, x), lambda x: (x, x.sin())):
        results = []
        for loss in (fused.mse_loss, reference.mse_loss):
            x = values.clone().requires_grad_()
            x.register_hook(lambda grad: grad * 2)
            with Looking():
                (grad,) = torch.autograd.grad(loss(*pair_of(x * 1)), x, create_graph=True)
                results.append((grad.detach(), torch.autograd.grad(grad.pow(3).sum(), x)[0]))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_gradients(kind, device):
    """With no mode, a mode in both passes, and one in the backward pass. The gradients are composed, as under vmap."""
    input, target, options = given(kind, device)
    options["reduction"] = "none"
    ours, expected = functions(kind)
    leaf = input.requires_grad_()
    exact = expected(leaf, target, **options)
    upstream = torch.randn(3, *exact.shape, device=device)
    (exact_grads,) = torch.autograd.grad(exact, leaf, upstream.double(), is_grads_batched=True)
    no_mode = torch.enable_grad
    for of_forward, of_backward in ((no_mode, no_mode), (Looking, Looking), (no_mode, Looking)):
        with of_forward():
            loss = ours(leaf, target, **options)
        with of_backward():
            (grads,) = torch.autograd.grad(loss, leaf, upstream, is_grads_batched=True)
        torch.testing.assert_close(grads, exact_grads)
