"""Values and gradients of cross entropy, compared with the float64 reference and with torch's own loss."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers.draws import DTYPES, LAYOUTS, REDUCTIONS, class_dim, random_indices, random_logits, random_probabilities
from helpers.oracle import assert_exact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fusedloss.functional as fused
from fusedloss import reference

# Odd sizes, one class, one row, and just below, at and above a vector (16), a block (2048) and a tile (256).
SHAPES = [
    (5,), (1,), (1, 1), (7, 1), (1, 7), (3, 10), (33, 15), (5, 16), (5, 17), (2, 2047), (2, 2049), (3, 4097),
    (2, 3, 5), (1, 10, 255), (2, 5, 256), (1, 21, 257), (2, 33, 3), (2, 4, 3, 5), (1, 3, 2, 2, 7), (3, 1, 4),
]  # fmt: skip
OPTIONS = list(itertools.product((False, True), (0.0, 0.1, 1.0)))


def check(input: Tensor, target: Tensor, **options) -> None:
    """Loss and gradient, for a random grad_output, agree with the reference, and have torch's dtype and shape."""
    ours = input.detach().requires_grad_()
    exact = input.detach().double().requires_grad_()
    loss = fused.cross_entropy(ours, target, **options)
    expected = reference.cross_entropy(exact, target, **options)
    torchs = F.cross_entropy(input.detach(), target, **options)
    assert (loss.dtype, loss.shape, loss.device) == (torchs.dtype, torchs.shape, torchs.device)
    # Loss and gradient are differences, with errors relative to the terms. For a row, the terms are as large as its
    # largest weight, and for the gradient that times grad_output.
    rows = input.numel() // input.shape[class_dim(tuple(input.shape))]
    largest = 1.0 if options.get("weight") is None else options["weight"].abs().max().item()
    assert_exact(loss, expected, scale=largest * (rows if options["reduction"] == "sum" else 1), what="loss")

    grad_output = torch.randn(loss.shape, dtype=torch.float64).to(loss)
    loss.backward(grad_output)
    expected.backward(grad_output.double())
    assert ours.grad is not None and exact.grad is not None
    assert ours.grad.dtype == input.dtype
    terms = largest * grad_output.abs().max().item() / (rows if options["reduction"] == "mean" else 1)
    assert_exact(ours.grad, exact.grad, scale=terms, what="gradient")
    # Without autograd, the loss is bitwise identical to the one with it.
    assert torch.equal(loss.detach(), fused.cross_entropy(input.detach(), target, **options)) or loss.isnan().any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_class_indices(shape, dtype, reduction, device):
    for weighted, label_smoothing in OPTIONS:
        weight = (torch.rand(shape[class_dim(shape)]) + 0.1).to(device, dtype) if weighted else None
        check(
            random_logits(shape, dtype, device),
            random_indices(shape, device),
            weight=weight,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_class_probabilities(shape, dtype, reduction, device):
    for weighted, label_smoothing in OPTIONS:
        weight = (torch.rand(shape[class_dim(shape)]) + 0.1).to(device, dtype) if weighted else None
        check(
            random_logits(shape, dtype, device),
            random_probabilities(shape, dtype, device),
            weight=weight,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [*range(1, 9), 16, 31, 32, 33])
def test_few_classes_in_columns(classes, dtype, device):
    """More than one tile (256) of rows, ending within a vector. Few classes have a kernel of their own."""
    shape = (2, classes, 5, 61)
    input = LAYOUTS["odd storage offset"](random_logits(shape, dtype, device))
    weight = (torch.rand(classes) + 0.1).to(device, dtype)
    weight[-1] = 0 if classes > 1 else 2
    indices, probabilities = random_indices(shape, device, ignore_index=1), random_probabilities(shape, dtype, device)
    for reduction, label_smoothing in (("mean", 0.0), ("none", 0.0), ("sum", 0.2)):
        options = {"reduction": reduction, "label_smoothing": label_smoothing}
        check(input, indices, ignore_index=1, **options)
        check(input, indices, ignore_index=1, weight=weight, **options)
        check(input, probabilities, weight=weight, **options)


@pytest.mark.parametrize("shape", [(6, 37), (3, 5, 34), (3, 1, 34), (2, 7, 6, 10)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_offsets(layout, shape, device):
    for dtype in DTYPES:
        input = LAYOUTS[layout](random_logits(shape, dtype, device))
        assert input.shape == shape
        for target in (
            random_indices(shape, device),
            random_probabilities(shape, dtype, device),
            LAYOUTS[layout](random_probabilities(shape, dtype, device)),
        ):
            check(input, target, reduction="mean", label_smoothing=0.1)
            check(input, target, reduction="none")
        check(random_logits(shape, dtype, device), target, reduction="mean")


def test_strided_targets_and_weights(device):
    input = random_logits((4, 6, 5), torch.float32, device)
    target = random_indices((4, 6, 5), device)
    strided = torch.stack([target, torch.full_like(target, 10**9)], -1)[..., 0]
    weight = torch.stack([torch.rand(6), torch.full((6,), torch.nan)], -1).to(device)[:, 0]
    assert not strided.is_contiguous() and not weight.is_contiguous()
    check(input, strided, weight=weight, reduction="mean")
    check(input, strided, weight=weight, reduction="none", label_smoothing=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("center", [1e4, -1e4])
def test_large_logits_keep_their_digits(dtype, center, device):
    """A log-sum-exp in float32 would lose three digits here."""
    for shape in [(8, 50), (3, 20, 40)]:
        input = random_logits(shape, dtype, device, scale=2.0) + center
        check(input, random_indices(shape, device), reduction="none")
        check(input, random_indices(shape, device), reduction="none", label_smoothing=0.1)
        check(input, random_probabilities(shape, dtype, device), reduction="none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_range_of_logits(dtype, device):
    """Each gradient is right relative to itself, however small: its error is that of exp's argument."""
    for shape in [(4, 1000), (1, 1000, 4)]:
        input = torch.linspace(-85, 0, 4000, dtype=torch.float64).to(dtype).double()
        input = input[torch.randperm(4000)].view(shape).to(device, dtype).requires_grad_()
        exact = input.detach().double().requires_grad_()
        target = input.detach().argmax(1)
        fused.cross_entropy(input, target, reduction="sum").backward()
        reference.cross_entropy(exact, target, reduction="sum").backward()
        others = torch.ones_like(exact, dtype=torch.bool).scatter_(1, target.unsqueeze(1), False)
        got, want = input.grad.double()[others], exact.grad[others]
        relative = {
            torch.float32: 2e-5,
            torch.float64: 1e-13,
            torch.bfloat16: 2**-8 + 2e-5,
            torch.float16: 2**-11 + 2e-5,
        }
        smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        assert ((got - want).abs() <= relative[dtype] * want + smallest).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_integer_dtypes_of_targets(dtype, device):
    input = random_logits((9, 7), torch.float32, device)
    target = torch.randint(0, 7, (9,), device=device)
    expected = F.cross_entropy(input, target)
    torch.testing.assert_close(fused.cross_entropy(input, target.to(dtype)), expected)


@pytest.mark.parametrize("ignore_index", [0, 2, -1, 255, -(2**40)])
def test_ignore_index(ignore_index, device):
    for shape in [(40, 5), (2, 5, 33)]:
        input = random_logits(shape, torch.float32, device)
        target = random_indices(shape, device, ignore_index)
        check(input, target, ignore_index=ignore_index, reduction="mean")
        check(input, target, ignore_index=ignore_index, reduction="none", label_smoothing=0.1)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_all_targets_ignored(reduction, label_smoothing, device):
    for shape in [(4, 5), (2, 5, 3)]:
        input = random_logits(shape, torch.float32, device).requires_grad_()
        target = torch.full((shape[0], *shape[2:]), -100, device=device)
        options = {"reduction": reduction, "label_smoothing": label_smoothing}
        loss = fused.cross_entropy(input, target, **options)
        torch.testing.assert_close(loss, F.cross_entropy(input, target, **options), equal_nan=True)
        loss.backward(torch.randn_like(loss))
        assert torch.equal(input.grad, torch.zeros_like(input))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_targets_without_weight(label_smoothing, device):
    """The mean is divided by a total weight of 0."""
    target = torch.tensor([1, 1, -100], device=device)
    for weight in (torch.zeros(3, device=device), torch.tensor([1.0, 0.0, 2.0], device=device)):
        results = []
        for loss_function in (fused.cross_entropy, F.cross_entropy):
            input = torch.arange(9.0, device=device).view(3, 3).requires_grad_()
            loss = loss_function(input, target, weight, label_smoothing=label_smoothing)
            loss.backward()
            results.append((loss.detach(), input.grad[:2]))
        for ours, torchs in zip(*results, strict=True):
            assert torch.equal(ours.isnan(), torchs.isnan()) and ours.isnan().all()


def test_an_ignored_row_may_hold_anything(device):
    """The gradient of an ignored row is 0. torch's is NaN here."""
    for shape in [(3, 20), (3, 20, 5)]:
        clean = random_logits(shape, torch.float32, device)
        target = random_indices(shape, device)
        target[1] = -100
        target[0], target[2] = 3, 4
        dirty = clean.clone()
        dirty[1] = torch.nan
        dirty[1, 0] = torch.inf
        grads = []
        for input in (clean, dirty):
            leaf = input.requires_grad_()
            loss = fused.cross_entropy(leaf, target)
            loss.backward()
            grads.append((loss.detach(), leaf.grad))
        assert torch.equal(grads[0][0], grads[1][0])
        assert torch.equal(grads[0][1], grads[1][1])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)], ids=str)
def test_empty_batches(shape, reduction, device):
    input = torch.randn(shape, device=device)
    rows = (shape[0], *shape[2:])
    for target in (torch.zeros(rows, dtype=torch.int64, device=device), torch.rand(shape, device=device)):
        ours, torchs = input.clone().requires_grad_(), input.clone().requires_grad_()
        loss = fused.cross_entropy(ours, target, reduction=reduction)
        expected = F.cross_entropy(torchs, target, reduction=reduction)
        torch.testing.assert_close(loss, expected, equal_nan=True)
        loss.backward(torch.ones_like(loss))
        assert ours.grad.shape == shape


def test_empty_batches_of_any_stride(device):
    for shape, strides in [((0, 3), (7, 5)), ((2, 3, 0, 4), (1, 2, 9, 3))]:
        input = torch.empty_strided(shape, strides, device=device).requires_grad_()
        target = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64, device=device)
        loss = fused.cross_entropy(input, target, reduction="sum")
        loss.backward()
        assert loss.item() == 0 and input.grad.shape == shape


def masked_logits(device: str) -> Tensor:
    """Logits with every kind of mask that a row can have, over more than one block of classes."""
    x = torch.randn(7, 5000, device=device) * 3
    x[0, :4096] = -torch.inf  # whole leading blocks
    x[1, 1:] = -torch.inf  # all but one class
    x[2, ::2] = -torch.inf
    x[3, 2048:] = -torch.inf
    x[4, :] = -torch.inf  # everything
    x[5, 17] = torch.nan
    x[6, 4500] = torch.inf
    return x


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_masked_and_non_finite_logits(columns, label_smoothing, device):
    x = masked_logits(device)
    target = torch.tensor([4999, 0, 1, 0, 3, 4, 5], device=device)
    if columns:
        x, target = x.t().contiguous().unsqueeze(0), target.unsqueeze(0)
    check_each_row(x, target, label_smoothing)


def check_each_row(x, target, label_smoothing):
    """The losses of all rows and the gradient of their sum agree with torch's in float64."""
    ours, torchs = x.clone().requires_grad_(), x.to(torch.float64, copy=True).requires_grad_()
    options = {"reduction": "none", "label_smoothing": label_smoothing}
    loss, expected = fused.cross_entropy(ours, target, **options), F.cross_entropy(torchs, target, **options)
    assert_exact(loss, expected, what="loss")
    loss.sum().backward()
    expected.sum().backward()
    assert_exact(ours.grad, torchs.grad, what="gradient")


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_any_few_logits_in_columns(classes, device):
    """Every combination of these logits in a row of few classes, with each of its classes as the target."""
    values = torch.tensor([-torch.inf, torch.inf, torch.nan, -1e4, 1e4, 0.5], device=device)
    every = torch.cartesian_prod(*[values] * classes).view(-1, classes)
    x = every.repeat(classes, 1).t().contiguous().unsqueeze(0)
    target = torch.arange(classes, device=device).repeat_interleave(len(every)).unsqueeze(0)
    for dtype in DTYPES:
        for label_smoothing in (0.0, 0.1):
            check_each_row(x.to(dtype), target, label_smoothing)


@pytest.mark.parametrize("classes", [1, 3, 40])
@pytest.mark.parametrize("position", [0, 8, 255, 256, 299])
def test_the_first_class_that_does_not_exist_is_named(position, classes):
    """The message names the first bad class that is not ignored. On a GPU the kernel stops instead."""
    for bad in (-1, classes, 2**32, -(2**63)):  # the lower half of 2**32 is class 0
        target = torch.zeros(2, 300, dtype=torch.int64)
        target[0, ::7] = target[1, :position] = -100
        target[1, position] = target[1, -1] = bad
        for reduction in ("none", "mean"):
            input = torch.randn(2, classes, 300, requires_grad=True)
            with pytest.raises(IndexError, match=rf"target\[1, {position}\] is {bad}, expected a class index in"):
                fused.cross_entropy(input, target, reduction=reduction)


def test_masked_logits_with_probabilities(device):
    x = masked_logits(device)
    target = torch.rand_like(x)
    target[3, 2048:] = 0  # 0 * -inf is NaN, as in torch
    ours, torchs = x.clone().requires_grad_(), x.double().requires_grad_()
    loss = fused.cross_entropy(ours, target, reduction="none")
    expected = F.cross_entropy(torchs, target.double(), reduction="none")
    assert_exact(loss, expected, what="loss")
    loss.sum().backward()
    expected.sum().backward()
    assert_exact(ours.grad, torchs.grad, what="gradient")


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_gradient_of_expanded_grad_output(layout, device):
    """The backward pass of loss.sum() sends one expanded value, and that of a slice sends a strided tensor."""
    shape = (6, 11) if layout == "rows" else (2, 11, 3)
    input, target = random_logits(shape, torch.float32, device), random_indices(shape, device)
    grads = []
    for scale in (lambda loss: loss.sum(), lambda loss: (loss * torch.ones_like(loss)).sum()):
        leaf = input.clone().requires_grad_()
        scale(fused.cross_entropy(leaf, target, reduction="none")).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    rows = target.shape
    strided = torch.randn(*rows, 2, device=device)[..., 0]
    partly_expanded = torch.randn(*rows[:-1], 1, device=device).expand(rows) if len(rows) > 1 else strided
    for grad_output in (strided, partly_expanded):
        leaf, exact = input.clone().requires_grad_(), input.double().requires_grad_()
        fused.cross_entropy(leaf, target, reduction="none").backward(grad_output)
        reference.cross_entropy(exact, target, reduction="none").backward(grad_output.double())
        assert_exact(leaf.grad, exact.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_gives_float32(dtype, device):
    """Only float64 stays as it is. On CUDA, torch rounds log-probabilities to the input's dtype before it adds them up
    in float32, so the values are compared with those of a loss of float32 logits."""
    input = random_logits((8, 12), dtype, device).requires_grad_()
    target = random_indices((8, 12), device)
    for weight in (None, torch.rand(12, device=device, dtype=torch.promote_types(dtype, torch.float32))):
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = fused.cross_entropy(input, target, weight)
            likeness = F.cross_entropy(input, target, weight)
        assert loss.dtype == likeness.dtype == torch.promote_types(dtype, torch.float32)
        expected = F.cross_entropy(input.to(loss.dtype), target, weight)
        torch.testing.assert_close(loss, expected)
        (grad,) = torch.autograd.grad(loss, input)
        (torchs,) = torch.autograd.grad(expected, input)
        torch.testing.assert_close(grad, torchs)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple),
    dtype=st.sampled_from(DTYPES),
    probabilities=st.booleans(),
    weighted=st.booleans(),
    label_smoothing=st.floats(0, 1),
    reduction=st.sampled_from(REDUCTIONS),
    order=st.randoms(use_true_random=False),
)
def test_any_call(shape, dtype, probabilities, weighted, label_smoothing, reduction, order):
    """Random shapes, with the dimensions in any order in memory."""
    permutation = list(range(len(shape)))
    order.shuffle(permutation)
    inverse = [permutation.index(d) for d in range(len(shape))]
    input = random_logits(shape, dtype, "cpu").permute(permutation).contiguous().permute(inverse)
    target = random_probabilities(shape, dtype, "cpu") if probabilities else random_indices(shape, "cpu")
    weight = (torch.rand(shape[class_dim(shape)]) + 0.1).to(dtype) if weighted else None
    check(input, target, weight=weight, reduction=reduction, label_smoothing=label_smoothing)
