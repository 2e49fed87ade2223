"""`inplace_backward=True`: the gradient overwrites the logits, and a later use of the logits is an error."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.draws import DTYPES, REDUCTIONS
from helpers.oracle import assert_exact
from torch import Tensor

import fusedloss
import fusedloss.functional as fused
from fusedloss import reference

OVERWRITTEN = "the first has written the gradient over input"


def in_layout(leaf: Tensor, layout: str) -> Tensor:
    """The result of an operation, with this layout in memory."""
    if layout == "swapped":
        return (leaf * 1).t().contiguous().t()
    if layout == "padded":
        return torch.cat([leaf, leaf], 1)[:, : leaf.shape[1]]
    if layout == "every other":  # not a layout of the kernels: the gradient is computed elsewhere and copied
        return torch.stack([leaf, leaf], 2).flatten(1)[:, ::2].view(leaf.shape)
    return leaf * 1


def gradients_seen(logits: Tensor) -> list[Tensor]:
    """The gradients that the operation that made the logits receives. `retain_grad` would keep a copy."""
    seen = []
    logits.register_hook(lambda grad: seen.append(grad.detach()))
    return seen


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "swapped", "padded", "every other"])
@pytest.mark.parametrize("classes", [3, 700, 5000])
def test_the_gradient_lies_where_the_logits_were(classes, layout, dtype, reduction, device):
    leaf = (torch.randn(9, classes, device=device) * 3).to(dtype).requires_grad_()
    indices = torch.randint(0, classes, (9,), device=device)
    indices[2] = -100
    weight = torch.rand(classes, device=device).to(dtype) + 0.1
    probabilities = torch.randn(9, classes, device=device).softmax(1).to(dtype)
    for target, options in [
        (indices, {}),
        (indices, {"weight": weight, "label_smoothing": 0.1}),
        (probabilities, {"weight": weight}),
    ]:
        logits = in_layout(leaf, layout)
        before = logits.detach().clone()
        grads = gradients_seen(logits)
        loss = fused.cross_entropy(logits, target, reduction=reduction, inplace_backward=True, **options)
        assert torch.equal(logits, before)
        grad_output = torch.randn(loss.shape, device=device).to(dtype)
        version = logits._version
        loss.backward(grad_output)
        (grad,) = grads
        assert grad.data_ptr() == logits.data_ptr() and torch.equal(grad, logits) and logits._version > version
        exact = before.double().requires_grad_()
        wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}
        wide_target = target.double() if target.is_floating_point() else target
        reference.cross_entropy(exact, wide_target, reduction=reduction, **wide).backward(grad_output.double())
        assert_exact(grad, exact.grad, what="gradient", scale=grad_output.abs().max().item())


@pytest.mark.parametrize("shape", [(4, 6, 300), (2, 21, 8, 8), (50,)])
def test_other_shapes(shape, device):
    leaf = torch.randn(shape, device=device, requires_grad=True)
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    target = torch.randint(0, shape[min(1, len(shape) - 1)], rows, device=device)
    (ours,) = torch.autograd.grad(fused.cross_entropy(leaf * 2, target, inplace_backward=True), leaf)
    (torchs,) = torch.autograd.grad(F.cross_entropy(leaf * 2, target), leaf)
    torch.testing.assert_close(ours, torchs)


def pair(device: str) -> tuple[Tensor, Tensor]:
    return torch.randn(6, 50, device=device, requires_grad=True), torch.randint(0, 50, (6,), device=device)


def test_an_operation_that_saved_its_output_is_told(device):
    leaf, target = pair(device)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fused.cross_entropy(leaf.exp(), target, inplace_backward=True).backward()


def test_an_operation_that_saved_its_input_is_not_disturbed(device):
    leaf, target = pair(device)
    (ours,) = torch.autograd.grad(fused.cross_entropy(leaf.sin() * 3, target, inplace_backward=True), leaf)
    (torchs,) = torch.autograd.grad(F.cross_entropy(leaf.sin() * 3, target), leaf)
    torch.testing.assert_close(ours, torchs)


def test_another_loss_of_the_same_logits_is_told(device):
    leaf, target = pair(device)
    logits = leaf * 1
    first, other = (fused.cross_entropy(logits, target, inplace_backward=in_place) for in_place in (True, False))
    first.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (other * 2).backward()


def test_other_uses_of_the_logits_add_up(device):
    """Autograd adds the gradients of several uses up in other memory than the logits'."""
    leaf, target = pair(device)
    other = torch.randn(6, 50, device=device)

    def gradient(loss) -> Tensor:
        logits = leaf * 1
        return torch.autograd.grad((logits * other).sum() + loss(logits), leaf)[0]

    ours = gradient(lambda logits: fused.cross_entropy(logits, target, inplace_backward=True))
    torch.testing.assert_close(ours, gradient(lambda logits: F.cross_entropy(logits, target)))


def test_a_second_backward_pass_raises(device):
    leaf, target = pair(device)
    loss = fused.cross_entropy(leaf * 1, target, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=OVERWRITTEN):
        loss.backward()


def test_logits_that_were_overwritten_before_are_noticed(device):
    leaf, target = pair(device)
    logits = leaf * 1
    loss = fused.cross_entropy(logits, target, inplace_backward=True)
    logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_must_not_be_overwritten_is_refused(device):
    leaf, target = pair(device)
    for view in (leaf, leaf.view(6, 50), leaf[:, :40], leaf.t().t()):
        with pytest.raises(RuntimeError, match="inplace_backward=True writes the gradient over input, got a leaf"):
            fused.cross_entropy(view, target.clamp(max=view.shape[1] - 1), inplace_backward=True)
    row = leaf[:1] * 1
    with pytest.raises(RuntimeError, match=r"got elements that share memory \(sizes \[6, 50\], strides \[0, 1\]\)"):
        fused.cross_entropy(row.expand(6, 50), target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="got elements that share memory"):
        fused.cross_entropy((leaf * 1).flatten().as_strided((6, 50), (20, 1)), target, inplace_backward=True)
    before = leaf.detach().clone()
    with torch.no_grad():  # nothing is refused without a backward pass
        fused.cross_entropy(leaf, target, inplace_backward=True)
    assert torch.equal(leaf, before)


def test_a_gradient_that_is_differentiated_leaves_the_logits(device):
    leaf, target = pair(device)
    logits = leaf * 1
    before = logits.detach().clone()
    loss = fused.cross_entropy(logits, target, inplace_backward=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    grad.square().sum().backward()
    assert torch.equal(logits, before)
    other = before.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(other, target), other, create_graph=True)
    expected.square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)


def test_the_module_has_the_option(device):
    leaf, target = pair(device)
    module = fusedloss.CrossEntropyLoss(inplace_backward=True, label_smoothing=0.1)
    for loss in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        logits = leaf * 1
        grads = gradients_seen(logits)
        loss(logits, target).backward()
        assert grads[0].data_ptr() == logits.data_ptr()
    old = fusedloss.CrossEntropyLoss()
    del old.__dict__["inplace_backward"]  # as in a file that was saved before the option existed
    old(leaf, target).backward()


def test_the_compiler_ignores_it(device):
    leaf, target = pair(device)
    compiled = torch.compile(fusedloss.CrossEntropyLoss(inplace_backward=True), backend="aot_eager", fullgraph=True)
    (ours,) = torch.autograd.grad(compiled(leaf * 1, target), leaf)
    (torchs,) = torch.autograd.grad(F.cross_entropy(leaf * 1, target), leaf)
    torch.testing.assert_close(ours, torchs)


def test_it_takes_no_memory_for_a_gradient():
    leaf, target = torch.randn(64, 5000, requires_grad=True), torch.randint(0, 5000, (64,))
    logits = leaf * 1
    loss = fused.cross_entropy(logits, target, inplace_backward=True)
    with torch.profiler.profile(profile_memory=True) as profiler:
        torch.autograd.grad(loss, logits)
    assert sum(max(0, event.self_cpu_memory_usage) for event in profiler.events()) < logits.nbytes / 10
