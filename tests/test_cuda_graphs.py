"""On a GPU neither pass of a loss synchronises with the device, and both passes can be captured in a CUDA graph."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import fusedloss.functional as fused

pytestmark = pytest.mark.gpu

# Shapes for every kernel: one with a thread, warp, block, cluster or several blocks for a row, and columns.
SHAPES = [(700, 10), (300, 100), (200, 5000), (256, 200_000), (3, 100_000), (4, 21, 30, 30)]
OPTIONS = [{}, {"reduction": "sum"}, {"label_smoothing": 0.1}]


def leaf_and_target(shape: tuple[int, ...], probabilities: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = torch.randn(shape, device="cuda", requires_grad=True)
    if probabilities:
        return leaf, torch.rand(shape, device="cuda").softmax(1)
    return leaf, torch.randint(shape[1], (shape[0], *shape[2:]), device="cuda")


@pytest.fixture
def no_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nobody_waits(shape, options, no_waiting):
    for scale in (1.0, 3.0):
        leaf, target = leaf_and_target(shape)
        weight = torch.rand(shape[1], device="cuda")
        (fused.cross_entropy(leaf, target, weight, **options) * scale).backward()
        (fused.mse_loss(leaf, leaf.detach() + 1) * scale).backward()


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_captured_step(shape, probabilities, scale):
    leaf, target = leaf_and_target(shape, probabilities)

    def step() -> torch.Tensor:
        leaf.grad = None
        loss = fused.cross_entropy(leaf, target)
        (loss * scale).backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    leaf.grad = None
    with torch.cuda.graph(graph):
        loss = step()
    for _ in range(2):
        other_leaf, other_target = leaf_and_target(shape, probabilities)
        with torch.no_grad():
            leaf.copy_(other_leaf)
            target.copy_(other_target)
        graph.replay()
        expected = F.cross_entropy(other_leaf.double(), other_target.double() if probabilities else other_target)
        (grad,) = torch.autograd.grad(expected * scale, other_leaf)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(leaf.grad, grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_handed_over_is_what_would_be_computed(shape, dtype):
    leaf, target = leaf_and_target(shape)
    leaf = leaf.detach().to(dtype).requires_grad_()
    fused.cross_entropy(leaf, target).backward()  # so that the next forward pass also computes the gradient
    torch.cuda.synchronize()
    leaf.grad = None
    loss = fused.cross_entropy(leaf, target)
    (handed_over,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (computed,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert torch.equal(handed_over, computed)
    handed_over.zero_()  # the caller may write to it
    (again,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(again, computed)


def test_a_scaled_gradient_is_computed_from_the_logits():
    """Scaling a float16 gradient by 32768 after it was rounded, or underflowed, would give another result."""
    scale = 2**15  # float16's largest power of two: the scale is the upstream gradient, in the loss's dtype
    leaf, target = leaf_and_target((512, 5000))
    leaf = leaf.detach().half().requires_grad_()
    for _ in range(3):  # with the gradient in the forward pass, and without it after the scale was seen
        leaf.grad = None
        (fused.cross_entropy(leaf, target) * scale).backward()
        torch.cuda.synchronize()
        exact = leaf.detach().double().requires_grad_()
        (F.cross_entropy(exact, target) * scale).backward()
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=2**-10, atol=2**-24)
