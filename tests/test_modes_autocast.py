"""The losses under autocast and with a gradient scaler."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.draws import DTYPES
from helpers.graphs import CLASSES, KINDS, given
from helpers.modes import functions, step
from helpers.oracle import assert_exact
from torch import Tensor, nn

import fusedloss.functional as fused

# ---- autocast ----

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-10}


def outcome(loss: Callable[..., Tensor], input: Tensor, *others: Tensor, autocast: torch.dtype | None, **options):
    """Loss and gradient, or the type of the error."""
    leaf = input.detach().requires_grad_()
    try:
        with torch.autocast(input.device.type, dtype=autocast, enabled=autocast is not None):
            value = loss(leaf, *others, **options)
        return value.detach(), *torch.autograd.grad(value.sum(), leaf)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16, None], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_gives_torchs_dtypes(dtype, autocast, device):
    """Loss and gradient have torch's dtypes, for every combination of dtypes, and the errors are torch's."""
    input = torch.randn(5, CLASSES, device=device).to(dtype)
    indices = torch.randint(0, CLASSES, (5,), device=device)
    weight, probabilities = torch.rand(CLASSES, device=device), torch.rand(5, CLASSES, device=device)
    cases = [("cross_entropy", (indices,)), ("cross_entropy", (indices.int(),))]
    for other in DTYPES:
        cases.append(("cross_entropy", (indices, weight.to(other))))
        cases.append(("cross_entropy", (probabilities.to(other),)))
        cases.append(("cross_entropy", (probabilities.to(dtype), weight.to(other))))
        cases.append(("mse_loss", (probabilities.to(other),)))
    for name, others in cases:
        for reduction in ("mean", "none"):
            torchs = outcome(getattr(F, name), input, *others, autocast=autocast, reduction=reduction)
            ours = outcome(getattr(fused, name), input, *others, autocast=autocast, reduction=reduction)
            what = f"{name}, {[t.dtype for t in others]}, {reduction}: {ours}, torch's {torchs}"
            if isinstance(torchs, type):
                if others[0].dtype != torch.int32:  # torch does not support such indices
                    assert ours is torchs, what
                continue
            assert [t.dtype for t in ours] == [t.dtype for t in torchs], what
            # On CUDA torch rounds log-probabilities to the input's dtype, although their sum is float32.
            in_float32 = autocast is not None and ours[0].dtype != dtype and device == "cpu"
            tolerance = CLOSE[torch.float32 if in_float32 else dtype]
            torch.testing.assert_close(ours[0], torchs[0], rtol=tolerance, atol=tolerance, msg=lambda m, w=what: w + m)
            tolerance = CLOSE[dtype]
            torch.testing.assert_close(ours[1], torchs[1], rtol=tolerance, atol=tolerance, msg=lambda m, w=what: w + m)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_may_be_switched_off_within(kind, device):
    ours, _, _ = functions(kind)
    input, target, options = given(kind, device, dtype=torch.bfloat16)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert ours(input, target, **options).dtype == torch.float32
        with torch.autocast(device, enabled=False):
            assert ours(input, target, **options).dtype == torch.bfloat16
    assert ours(input, target, **options).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_a_scaled_float16_backward_pass(kind, device):
    """As with a gradient scaler: the scale is float32, and small float16 gradients do not underflow."""
    ours, _, expected = functions(kind)
    input, target, options = given(kind, device, 300, CLASSES, dtype=torch.float16)
    scale = torch.tensor(2.0**12, device=device)
    with torch.autocast(device, dtype=torch.float16):
        loss, grad, _ = step(ours, input, target, scale, **options)
    exact_loss, exact_grad, _ = step(expected, input.double(), target, scale, **options)
    assert loss.dtype == torch.float32 and grad.dtype == torch.float16
    assert_exact(loss, exact_loss)
    assert_exact(grad, exact_grad)
    # With too large a scale the gradient is inf, never NaN or a large number, so that a scaler detects it.
    with torch.autocast(device, dtype=torch.float16):
        grad = step(ours, input, target, torch.tensor(1e9, device=device), reduction="sum", **options)[1]
    exact_grad = step(expected, input.double(), target, torch.tensor(1e9, device=device), reduction="sum", **options)[1]
    too_large = exact_grad.abs() > 65520
    assert too_large.any() and torch.equal(grad.isinf(), too_large) and not grad.isnan().any()


def test_a_gradient_scaler(device):
    """The scaler skips the same steps and sets the same scales as with torch's losses. The parameters are as close."""
    features = torch.randn(32, 6, device=device)
    target, values = torch.randint(0, CLASSES, (32,), device=device), torch.randn(32, CLASSES, device=device)
    start = nn.Linear(6, CLASSES, device=device)
    found = []
    for library in (fused, F):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**24, growth_interval=4)
        scales, losses = [], []
        for _ in range(16):
            optimizer.zero_grad()
            with torch.autocast(device, dtype=torch.float16):
                logits = model(features)
                loss = library.cross_entropy(logits, target) + library.mse_loss(logits, values.half())
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            losses.append(loss.item())
        found.append((scales, losses, model.weight.detach()))
    assert logits.dtype == torch.float16
    (scales, losses, weight), (torchs_scales, torchs_losses, torchs_weight) = found
    assert scales == torchs_scales and min(scales) < 2.0**24 and len(set(scales)) > 2
    assert losses == pytest.approx(torchs_losses, rel=2e-3) and losses[-1] < losses[0]
    torch.testing.assert_close(weight, torchs_weight, rtol=1e-2, atol=1e-3)
