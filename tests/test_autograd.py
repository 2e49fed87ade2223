"""Derivatives of every kind, compared with finite differences and with torch's own losses."""

import pytest
import torch
import torch.nn.functional as F
from helpers.draws import REDUCTIONS
from torch.autograd import gradcheck, gradgradcheck

import fusedloss.functional as fused


def cross_entropy_cases(device: str):
    """(input, target, options) in float64, for each kind of target, weight and layout."""
    weight = torch.rand(4, dtype=torch.float64, device=device) + 0.1
    for shape in [(4,), (3, 4), (2, 4, 3)]:
        rows = shape[:-1] if len(shape) < 3 else (shape[0], shape[2])
        input = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
        indices = torch.randint(0, 4, rows, device=device)
        probabilities = torch.rand(shape, dtype=torch.float64, device=device)
        for target in (indices, probabilities):
            yield input, target, {}
            yield input, target, {"weight": weight, "label_smoothing": 0.2}
    yield input, torch.randint(0, 4, rows, device=device), {"ignore_index": 1, "label_smoothing": 0.1}


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_first_and_second_derivatives(reduction, device):
    for input, target, options in cross_entropy_cases(device):

        def loss(x, target=target, options=options):
            return fused.cross_entropy(x, target, reduction=reduction, **options)

        assert gradcheck(loss, (input,), check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(loss, (input,), check_batched_grad=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_mse_first_and_second_derivatives(reduction, device):
    input, target = (torch.randn(3, 5, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))

    def loss(x, t):
        return fused.mse_loss(x, t, reduction=reduction)

    for pair in [(input, target), (input, target.detach()), (input.detach(), target)]:
        assert gradcheck(loss, pair, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(loss, pair, check_batched_grad=True)


def test_probability_targets_and_their_weights_may_require_grad(device):
    input, target = (torch.rand(3, 4, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    weight = torch.rand(4, dtype=torch.float64, device=device, requires_grad=True)
    for reduction in REDUCTIONS:
        assert gradcheck(
            lambda x, t, w, r=reduction: fused.cross_entropy(x, t, w, reduction=r), (input, target, weight)
        )


LOSSES = [
    pytest.param(fused.cross_entropy, F.cross_entropy, id="cross_entropy"),
    pytest.param(fused.mse_loss, F.mse_loss, id="mse_loss"),
]


def pair(loss, device: str):
    input = torch.randn(6, 9, device=device)
    target = torch.randint(0, 9, (6,), device=device) if "cross" in loss.__name__ else torch.randn(6, 9, device=device)
    return input, target


@pytest.mark.parametrize(("ours", "torchs"), LOSSES)
def test_a_retained_graph_gives_the_same_gradient_each_time(ours, torchs, device):
    input, target = pair(ours, device)
    leaf = input.requires_grad_()
    loss = ours(leaf, target)
    grads = []
    for scale in (1.0, 1.0, 3.0):
        (grad,) = torch.autograd.grad(loss, leaf, torch.tensor(scale, device=device), retain_graph=True)
        grads.append(grad)
        # The caller may write to the gradient that it was given.
        kept = grad.clone()
        grad.mul_(-7)
        grads[-1] = kept
    assert torch.equal(grads[0], grads[1])
    torch.testing.assert_close(grads[2], 3 * grads[0])
    expected = torch.autograd.grad(torchs(leaf, target), leaf)[0]
    torch.testing.assert_close(grads[0], expected)


@pytest.mark.parametrize(("ours", "torchs"), LOSSES)
def test_overwritten_logits_are_never_read(ours, torchs, device):
    """The result is torch's gradient or autograd's error, never a wrong number."""
    input, target = pair(ours, device)
    leaf = input.requires_grad_()
    logits = leaf * 1.0
    loss = ours(logits, target)
    logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(("ours", "torchs"), LOSSES)
def test_inside_a_model(ours, torchs, device):
    """The gradient flows on through the graph, and the loss can be one term of a sum."""
    input, target = pair(ours, device)
    layer = torch.nn.Linear(9, 9, device=device)
    grads = []
    for loss in (ours, torchs):
        layer.zero_grad()
        logits = layer(input)
        (0.3 * loss(logits, target) + 2 * loss(logits.flip(0), target) ** 2).backward()
        grads.append([parameter.grad.clone() for parameter in layer.parameters()])
    for mine, expected in zip(*grads, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize(("ours", "torchs"), LOSSES)
def test_functorch(ours, torchs, device):
    input, target = pair(ours, device)
    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(
            transform(lambda x: ours(x, target))(input), transform(lambda x: torchs(x, target))(input)
        )
    torch.testing.assert_close(torch.func.vmap(ours)(input, target), torch.func.vmap(torchs)(input, target))
    per_sample = [torch.func.vmap(torch.func.grad(lambda x, t, f=f: f(x, t)))(input, target) for f in (ours, torchs)]
    torch.testing.assert_close(*per_sample)


@pytest.mark.parametrize(("ours", "torchs"), LOSSES)
def test_second_order_training_step(ours, torchs, device):
    """A gradient penalty, as in WGAN-GP or MAML: create_graph, then a backward pass through the gradient."""
    input, target = pair(ours, device)
    results = []
    for loss in (ours, torchs):
        leaf = input.clone().requires_grad_()
        logits = leaf * leaf.sin()
        (grad,) = torch.autograd.grad(loss(logits, target), leaf, create_graph=True)
        grad.pow(2).sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results)


def test_second_derivative_where_the_target_depends_on_the_input(device):
    """Only the outer backward pass goes through the graph behind the inputs, and only once."""
    values = torch.randn(5, device=device)
    for pair_of in (lambda x: (x, 2 * x), lambda x: (x * 3, x), lambda x: (x, x.sin())):
        results = []
        for loss in (fused.mse_loss, F.mse_loss):
            x = values.clone().requires_grad_()
            (grad,) = torch.autograd.grad(loss(*pair_of(x)), x, create_graph=True)
            results.append((grad.detach(), torch.autograd.grad(grad.pow(3).sum(), x)[0]))
        for ours, torchs in zip(*results, strict=True):
            torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize(("ours", "torchs"), LOSSES)
def test_hooks_run_once_under_create_graph(ours, torchs, device):
    input, target = pair(ours, device)
    results = []
    for loss in (ours, torchs):
        x = input.clone().requires_grad_()
        x.register_hook(lambda grad: grad * 2)
        logits = x * 1
        logits.retain_grad()
        loss(logits, target).backward(create_graph=True)
        results.append((x.grad.detach(), logits.grad.detach()))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize(("ours", "torchs"), LOSSES)
def test_a_parameter_is_a_plain_tensor(ours, torchs, device):
    input, target = pair(ours, device)
    loss = ours(torch.nn.Parameter(input), target)
    assert "fusedloss" in loss.grad_fn.name()
    name = {"cross_entropy": "CrossEntropyBackward", "mse_loss": "PointwiseBackward"}[ours.__name__]
    assert type(loss.grad_fn).__name__ == name and f"grad_fn=<{name}>)" in repr(loss)
