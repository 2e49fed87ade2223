"""torch's opcheck of each registered op: its schema, fake kernel, derivative and AOT dispatch."""

from collections.abc import Iterator

import pytest
import torch
from conftest import SEED
from helpers.draws import DTYPES
from helpers.graphs import KINDS, LAYOUTS, OLD, target_for
from torch import Tensor

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def samples(device: str, layouts: list[str], passes: int = 1) -> Iterator[tuple[str, Tensor, str, int, bool]]:
    """(what, input, kind of target, reduction, autocast) for each layout.

    A few samples cover all values of the others. Their combinations differ from run to run.
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


def cross_entropy_composed_gradient_samples(device: str):
    for what, (grad_output, input, target, weight, _, *options) in cross_entropy_backward_samples(device):
        yield what, (grad_output, input, target, weight, *options)


# A pointwise loss with a parameter, and one with three operands.
POINTWISE = [("mse_loss", 2, []), ("smooth_l1_loss", 2, [0.5]), ("gaussian_nll_loss", 3, [1e-6, 0.0])]


def pointwise_arguments(device: str):
    for i, (what, input, _, reduction, autocast) in enumerate(samples(device, list(LAYOUTS))):
        loss, count, parameters = POINTWISE[i % len(POINTWISE)]
        others = [torch.rand_like(input).requires_grad_(reduction != 1) for _ in range(count - 1)]
        divisor = 3 if loss == "mse_loss" and reduction == 1 else None
        yield f"{loss}, {what}", ([input, *others], loss, parameters, reduction, divisor), autocast


def pointwise_forward_samples(device: str):
    for what, (operands, *options), autocast in pointwise_arguments(device):
        yield what, (operands, *options, autocast)
        contiguous = [operands[0], *(operand.detach().contiguous() for operand in operands[1:])]
        yield what + ", contiguous others", (contiguous, *options, autocast)


def pointwise_backward_samples(device: str):
    for what, (operands, *options), autocast in pointwise_arguments(device):
        detached = [operand.detach() for operand in operands]
        loss = torch.ops.fusedloss.pointwise_forward(detached, *options, autocast)
        wanted = [operand.requires_grad for operand in operands]
        yield what, (torch.randn_like(loss).requires_grad_(), operands, *options, wanted)


def nll_loss_forward_samples(device: str):
    for what, input, _, reduction, autocast in samples(device, list(LAYOUTS), passes=2):
        kind = ("indices", "smoothed")[autocast]  # the second one has a weight
        input, target, weight, reduction, ignore_index, _ = cross_entropy_arguments(input, kind, reduction)
        yield what, (input, target, weight, reduction, ignore_index, autocast)


def nll_loss_backward_samples(device: str):
    for what, (input, target, weight, *options, autocast) in nll_loss_forward_samples(device):
        loss, total_weight = torch.ops.fusedloss.nll_loss_forward(input.detach(), target, weight, *options, autocast)
        like = (list(input.shape), list(input.stride()), input.dtype)
        yield what, (torch.randn_like(loss).requires_grad_(), target, weight, total_weight, *like, *options)


def nll_loss_composed_gradient_samples(device: str):
    for what, (input, target, weight, *options, autocast) in nll_loss_forward_samples(device):
        loss, _ = torch.ops.fusedloss.nll_loss_forward(input.detach(), target, weight, *options, autocast)
        yield what, (torch.randn_like(loss).requires_grad_(), input, target, weight, *options)


SAMPLES = {
    "cross_entropy_forward": cross_entropy_forward_samples,
    "cross_entropy_backward": cross_entropy_backward_samples,
    "cross_entropy_composed_gradient": cross_entropy_composed_gradient_samples,
    "pointwise_forward": pointwise_forward_samples,
    "pointwise_backward": pointwise_backward_samples,
    "pointwise_composed_gradients": pointwise_backward_samples,
    "nll_loss_forward": nll_loss_forward_samples,
    "nll_loss_backward": nll_loss_backward_samples,
    "nll_loss_composed_gradient": nll_loss_composed_gradient_samples,
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
        # An older torch cannot trace its own loss of class probabilities with dynamic sizes, and these ops call it.
        composes = OLD and name in ("cross_entropy_backward", "cross_entropy_composed_gradient")
        try:
            torch.library.opcheck(op, arguments, test_utils=CHECKS[:-1] if composes else CHECKS)
        except Exception as error:
            raise AssertionError(f"{name}: {what}") from error
