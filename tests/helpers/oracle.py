"""How results are compared with the float64 reference: the bound allows a single rounding at the end."""

import torch
from torch import Tensor

# Relative error of the computation itself, in the accumulate type. Its sums have up to a few thousand terms, and
# exp(x - max) inherits the error of its argument, about 1e-6 in float32.
COMPUTED = {torch.float32: 3e-6, torch.float64: 3e-14, torch.bfloat16: 3e-6, torch.float16: 3e-6}
# Half a unit in the last place of the result: relative to a normal number, and absolute for a subnormal one.
ROUNDED = {torch.float32: 2**-24, torch.float64: 2**-53, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SMALLEST = {torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 0.0, torch.float16: 2**-25}


def assert_exact(actual: Tensor, expected: Tensor, scale: float | Tensor | None = None, what: str = "result") -> None:
    """`actual` equals `expected` (float64) up to one rounding and the computation's error relative to `scale`.

    The scale is the size of the terms that were added up, and at least the largest result. As a tensor, it has one
    scale for each result, and each is at least that result.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    got, want = actual.detach().double(), expected.detach().double()
    assert torch.equal(got.isnan(), want.isnan()), f"{what}: NaN in other places than expected"
    finite = want.isfinite()
    overflow = want.abs() > torch.finfo(actual.dtype).max
    exact = ~finite | overflow
    assert torch.equal(got[exact & ~want.isnan()].sign(), want[exact & ~want.isnan()].sign()), f"{what}: infinities"
    if isinstance(scale, Tensor):
        scale = scale.expand_as(want)[~exact]
    got, want = got[~exact], want[~exact]
    if got.numel() == 0:
        return
    if isinstance(scale, Tensor):
        scale = torch.maximum(scale, want.abs())
    else:
        scale = max(scale or 0.0, want.abs().max().item())
    allowed = ROUNDED[actual.dtype] * want.abs() * 1.001 + SMALLEST[actual.dtype] + COMPUTED[actual.dtype] * scale
    excess = (got - want).abs() - allowed
    worst = int(excess.argmax())
    assert excess[worst] <= 0, (
        f"{what}: {got[worst].item()!r}, expected {want[worst].item()!r}, "
        f"error {(got - want)[worst].item():.3e}, allowed {allowed[worst].item():.3e}"
    )
