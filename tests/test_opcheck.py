"""opcheck: the schema, the fake kernel, the derivative and the AOT dispatch of each registered op."""

from collections.abc import Iterator

import pytest
import torch
from conftest import SEED
from graphs import DTYPES, KINDS, LAYOUTS, OLD, target_for
from torch import Tensor

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def samples(device: str, layouts: list[str], passes: int = 1) -> Iterator[tuple[str, Tensor, str, int, bool]]:
    """(what, input, kind of target, reduction, autocast): each layout, and within a few samples each of the others.

    Which of them meet is another from run to run.
    """
    for i in range(passes * len(layouts)):
        j = i + SEED
        layout, dtype = layouts[i % len(layouts)], DTYPES[(j + i // len(layouts)) % 4]
        kind, reduction, autocast = KINDS[(j + j // 4) % 3], (j + j // 3) % 3, (j + j // 2) % 2 == 1
        what = f"{layout}, {dtype}, {kind}, reduction {reduction}, autocast {autocast}"
        yield what, LAYOUTS[layout](dtype=dtype, device=device).requires_grad_(), kind, reduction, autocast


def cross_entropy_arguments(input: Tensor, kind: str, reduction: int) -> tuple:
    target, options = target_for(kind, input.detach())
    if kind == "indices" and reduction == 0:
        target = target.to(torch.int32)
    weight, ignore_index, smoothing = (
        options.get(n, d) for n, d in (("weight", None), ("ignore_index", -100), ("label_smoothing", 0.0))
    )
    return input, target, weight, reduction, ignore_index, smoothing


def cross_entropy_forward_samples(device: str):
    for what, input, kind, reduction, autocast in samples(device, list(LAYOUTS), passes=2):
        yield what, (*cross_entropy_arguments(input, kind, reduction), autocast)


def cross_entropy_backward_samples(device: str):
    for what, input, kind, reduction, autocast in samples(device, list(LAYOUTS)):
        arguments = cross_entropy_arguments(input, kind, reduction)
        loss, statistics = torch.ops.fusedloss.cross_entropy_forward(
            *(a.detach() if isinstance(a, Tensor) else a for a in arguments), autocast
        )
        input, target, weight, *options = arguments
        yield what, (torch.randn_like(loss).requires_grad_(), input, target, weight, statistics, *options)


def mse_loss_forward_samples(device: str):
    for what, input, _, reduction, autocast in samples(device, list(LAYOUTS)):
        target = torch.randn_like(input).requires_grad_(reduction != 1)
        yield what, (input, target, reduction, autocast)
        yield what + ", contiguous target", (input, target.detach().contiguous(), reduction, autocast)


def mse_loss_backward_samples(device: str):
    for what, input, _, reduction, autocast in samples(device, list(LAYOUTS)):
        target = torch.randn_like(input).requires_grad_(reduction != 1)
        loss = torch.ops.fusedloss.mse_loss_forward(input.detach(), target.detach(), reduction, autocast)
        yield what, (torch.randn_like(loss).requires_grad_(), input, target, reduction)


SAMPLES = {
    "cross_entropy_forward": cross_entropy_forward_samples,
    "cross_entropy_backward": cross_entropy_backward_samples,
    "mse_loss_forward": mse_loss_forward_samples,
    "mse_loss_backward": mse_loss_backward_samples,
}
REGISTERED = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fusedloss::"))


def test_every_registered_op_has_samples():
    assert sorted(f"fusedloss::{name}" for name in SAMPLES) == REGISTERED


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", REGISTERED)
def test_opcheck(name, device):
    name = name.removeprefix("fusedloss::")
    op = getattr(torch.ops.fusedloss, name).default
    for what, arguments in SAMPLES[name](device):
        # An older torch does not trace its own loss of probabilities, the second derivative, for dynamic sizes.
        composes = OLD and name == "cross_entropy_backward"
        try:
            torch.library.opcheck(op, arguments, test_utils=CHECKS[:-1] if composes else CHECKS)
        except Exception as error:
            raise AssertionError(f"{name}: {what}") from error
