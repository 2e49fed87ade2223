"""The forward pass may compute the gradient for the backward pass. Results are identical; only the time differs."""

import pytest
import torch
import torch.nn.functional as F
from helpers.draws import DTYPES
from helpers.oracle import assert_exact
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fusedloss.functional as fused
from fusedloss import reference

WITH_GRAD = "fusedloss::{}_forward_with_grad"
BACKWARD = "fusedloss::{}_backward"
SHAPES = [(7, 10), (40, 600), (3, 5000), (2, 140_000), (2, 6, 300), (4, 3, 5, 6), (2, 1, 300), (1, 40, 300), (9,)]


def send_back_one(device: str) -> None:
    logits = torch.zeros(1, 2, device=device, requires_grad=True)
    fused.cross_entropy(logits, torch.tensor([0], device=device)).backward()
    fused.mse_loss(logits, torch.ones(1, 2, device=device)).backward()
    if device == "cuda":
        torch.cuda.synchronize()  # the kernel's report to the host has arrived


@pytest.fixture(autouse=True)
def grad_output_was_one(request: pytest.FixtureRequest) -> None:
    """Make the library expect an upstream gradient of 1 on the device under test."""
    send_back_one(request.getfixturevalue("device") if "device" in request.fixturenames else "cpu")


def events(run) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return {event.name for event in profiler.events()}


def cases(shape: tuple[int, ...], dtype: torch.dtype, device: str):
    classes = shape[min(1, len(shape) - 1)]
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    weight = (torch.rand(classes) + 0.1).to(device, dtype)
    indices = torch.randint(0, classes, rows, device=device)
    if rows:
        indices.view(-1)[0] = -100
    yield indices, {}
    yield indices, {"weight": weight}
    yield indices, {"weight": weight, "label_smoothing": 0.1}
    yield (
        torch.rand(shape).softmax(min(1, len(shape) - 1)).to(device, dtype),
        {"weight": weight, "label_smoothing": 0.1},
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_same_gradient_bit_for_bit(shape, dtype, reduction, device):
    for target, options in cases(shape, dtype, device):
        x = (torch.randn(shape) * 3).to(device, dtype).requires_grad_()
        loss = fused.cross_entropy(x, target, reduction=reduction, **options)
        (handed_over,) = torch.autograd.grad(loss, x, retain_graph=True)
        (computed,) = torch.autograd.grad(loss, x)
        assert torch.equal(handed_over, computed) and handed_over.data_ptr() != computed.data_ptr()
        exact = x.detach().double().requires_grad_()
        reference.cross_entropy(exact, target, reduction=reduction, **options).backward()
        assert exact.grad is not None
        # The scale is several times the largest entry: over 140,000 classes the float64 reference has an error too.
        # If one class has nearly all of the probability, entries are small differences of terms of about 1 / rows.
        rows = 1 if reduction == "sum" else max(x.numel() // max(x.shape[min(1, x.dim() - 1)], 1), 1)
        scale = max(4 * exact.grad.abs().max().item(), 0.1 / rows)
        assert_exact(handed_over, exact.grad, scale=scale, what="gradient")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("size", [1, 37, 8192, 100_003])
def test_mse_too(size, wanted, dtype, reduction):
    pair = [torch.randn(size).to(dtype).requires_grad_(wants) for wants in wanted]
    leaves = [tensor for tensor in pair if tensor.requires_grad]
    loss = fused.mse_loss(*pair, reduction=reduction)
    handed_over = torch.autograd.grad(loss, leaves, retain_graph=True)
    computed = torch.autograd.grad(loss, leaves)
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in pair]
    F.mse_loss(*exact, reduction=reduction).backward()
    of_exact = [tensor.grad for tensor in exact if tensor.requires_grad]
    for mine, again, right in zip(handed_over, computed, of_exact, strict=True):
        assert torch.equal(mine, again) and mine.data_ptr() != again.data_ptr()
        assert_exact(mine, right, what="gradient")


@pytest.mark.parametrize("name", ["cross_entropy", "mse_loss"])
def test_the_way_that_is_taken(name):
    def loss() -> Tensor:
        target = torch.zeros(4, dtype=torch.int64) if name == "cross_entropy" else torch.randn(4, 5)
        return getattr(fused, name)(torch.randn(4, 5, requires_grad=True), target)

    with_grad, backward = WITH_GRAD.format(name), BACKWARD.format(name)
    assert events(lambda: loss().backward()) & {with_grad, backward} == {with_grad}
    # A grad_output other than 1: the gradient is computed again, and the next forward pass does not compute it.
    assert events(lambda: (loss() * 2).backward()) & {with_grad, backward} == {with_grad, backward}
    assert events(lambda: loss().backward()) & {with_grad, backward} == {backward}
    assert events(lambda: loss().backward()) & {with_grad, backward} == {with_grad}
    with torch.autograd.graph.save_on_cpu():
        assert with_grad not in events(loss)
    with torch.no_grad():
        assert with_grad not in events(loss)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(700, 100), (300, 1000), (200, 5000), (256, 100_000), (4, 21, 30, 30)], ids=str)
def test_the_way_that_is_taken_on_a_gpu(shape, dtype):
    """The backward pass always launches a kernel, but allocates only if the forward pass left no gradient."""
    send_back_one("cuda")
    x = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device="cuda")

    def grows_by_a_gradient(run) -> tuple[Tensor, bool]:
        before = torch.cuda.memory_allocated()
        result = run()
        # A backward pass also releases memory: the tensors that the loss saved, and the previous gradient.
        return result, torch.cuda.memory_allocated() - before >= x.nbytes / 2

    # After a grad_output other than 1, the next forward pass leaves no gradient.
    for grad_output, of_forward in ((1.0, True), (1.0, True), (2.0, True), (1.0, False), (1.0, True)):
        loss, in_forward = grows_by_a_gradient(lambda: fused.cross_entropy(x, target))
        back = torch.full_like(loss, grad_output)
        grad, in_backward = grows_by_a_gradient(lambda loss=loss, back=back: torch.autograd.grad(loss, x, back)[0])
        torch.cuda.synchronize()  # the kernel's report to the host has arrived
        assert (in_forward, in_backward) == (of_forward, not of_forward)
        exact = x.detach().double().requires_grad_()
        reference.cross_entropy(exact, target).backward(back.double())
        scale = max(4 * exact.grad.abs().max().item(), 0.1 * grad_output / target.numel())
        assert_exact(grad, exact.grad, scale=scale, what="gradient")


def test_a_loss_scale_is_applied_before_rounding():
    """With a float16 gradient scaler, autocast keeps the loss in float32. Unscaled, many entries would become 0."""
    x = torch.randn(64, 5000).half().requires_grad_()
    target = torch.randint(0, 5000, (64,))
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = fused.cross_entropy(x, target)
        assert loss.dtype == torch.float32
        (grad,) = torch.autograd.grad(loss * 65536.0, x)
        exact = x.detach().double().requires_grad_()
        (reference.cross_entropy(exact, target) * 65536.0).backward()
        assert_exact(grad, exact.grad, what="gradient")
        assert (grad != 0).float().mean() > 0.99


def test_what_was_handed_over_is_the_callers():
    x = torch.randn(6, 50, requires_grad=True)
    target = torch.randint(0, 50, (6,))
    loss = fused.cross_entropy(x, target)
    loss.backward(retain_graph=True)
    assert x.grad is not None
    once = x.grad.clone()
    x.grad.zero_().add_(3)
    loss.backward()
    assert torch.equal(x.grad, once + 3)


def test_overwritten_logits_are_noticed():
    leaf = torch.randn(6, 50, requires_grad=True)
    logits = leaf * 1
    loss = fused.cross_entropy(logits, torch.randint(0, 50, (6,)))
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_each_op_remembers_by_itself_what_was_sent_back(device):
    target, other = torch.randint(0, 5, (4,), device=device), torch.randn(4, 5, device=device)

    def step() -> None:
        x = torch.randn(4, 5, device=device, requires_grad=True)
        (fused.cross_entropy(x, target) + 0.5 * fused.mse_loss(x, other)).backward()
        if device == "cuda":
            torch.cuda.synchronize()  # the kernels' reports to the host have arrived

    step()  # from now on 1 is expected for one of them, and another value for the other
    for _ in range(2):
        seen = events(step)
        assert WITH_GRAD.format("cross_entropy") in seen
        assert WITH_GRAD.format("mse_loss") not in seen and BACKWARD.format("mse_loss") in seen


def test_several_losses_of_one_graph():
    x = torch.randn(6, 50, requires_grad=True)
    target = torch.randint(0, 50, (6,))
    (fused.cross_entropy(x, target) + fused.cross_entropy(x * 2, target) * 0.5).backward()
    y = x.detach().requires_grad_()
    (F.cross_entropy(y, target) + F.cross_entropy(y * 2, target) * 0.5).backward()
    torch.testing.assert_close(x.grad, y.grad)
