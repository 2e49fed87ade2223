"""What the tests of modes at run time share: a step of a loss, and how its results are judged.

The arguments of the losses come from graphs.py.

Values are compared with the float64 reference or torch's own loss. They are compared bitwise with the plain call where
the same kernel runs.
"""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedloss.functional as fused
from helpers import graphs
from helpers.oracle import assert_exact

ROOT = Path(__file__).parent.parent.parent
TORCHS = {"cross_entropy": F.cross_entropy, "mse_loss": F.mse_loss}  # torch's own, also while F is patched


def functions(kind: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    """The fused loss, torch's and the reference."""
    ours, expected = graphs.functions(kind)
    return ours, TORCHS[ours.__name__], expected


def step(loss: Callable[..., Tensor], input: Tensor, target: Tensor, upstream: Tensor | None = None, **options):
    """The loss, its gradient, and the upstream gradient, which is drawn if it is not given."""
    leaf = input.detach().requires_grad_()
    value = loss(leaf * 1, target, **options)
    upstream = torch.randn_like(value) if upstream is None else upstream.to(value.dtype)
    value.backward(upstream)
    return value.detach(), leaf.grad, upstream


def send_one() -> None:
    """Send an upstream gradient of 1, as training does. On the CPU, later forward passes then compute the gradient."""
    fused.cross_entropy(torch.zeros(1, 2, requires_grad=True), torch.zeros(1, dtype=torch.int64)).backward()


def assert_step(kind: str, under: Callable[..., Tensor], input: Tensor, target: Tensor, **options) -> None:
    """Steps of `under`, the fused loss in some mode, bitwise equal the plain ones and agree with the reference."""
    ours, _, expected = functions(kind)
    for upstream in (None, torch.ones_like(ours(input, target, **options))):
        if upstream is not None:
            send_one()
        plain_loss, plain_grad, upstream = step(ours, input, target, upstream, **options)
        loss, grad, _ = step(under, input, target, upstream, **options)
        assert torch.equal(loss, plain_loss) and torch.equal(grad, plain_grad)
        exact_loss, exact_grad, _ = step(expected, input.double(), target, upstream, **options)
        assert_exact(loss, exact_loss, scale=max(1.0, exact_loss.abs().sum().item()), what="loss")
        assert_exact(grad, exact_grad, scale=4 * max(1.0, upstream.double().abs().max().item()), what="gradient")


def is_fused(loss: Tensor) -> bool:
    return "fusedloss" in loss.grad_fn.name()


def run_python(script: str, **environment: str) -> list[str]:
    """The words that a fresh process prints. If the script hangs or crashes, the test process survives."""
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.split()
