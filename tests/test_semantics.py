"""Cross entropy does what torch's does, for all combinations of options, all dtypes and all special rows.

Values and gradients equal those of torch's own loss in float64 up to one rounding. Shape, dtype and device are those of
torch's own loss of the same input.
"""

import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.draws import DTYPES, REDUCTIONS, random_indices, random_logits, random_probabilities
from helpers.oracle import assert_exact
from torch import Tensor

import fusedloss
import fusedloss.functional as fused

SMOOTHINGS = [0.0, 0.1, 1.0]
SHAPES = {1: (5,), 2: (7, 5), 3: (3, 5, 9), 4: (2, 5, 3, 4), 5: (2, 5, 3, 1, 4)}  # by rank; 5 classes
CLASSES = 5


def rows_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:1] * (len(shape) > 1) + shape[2:]


def as_float64(tensor: Tensor | None) -> Tensor | None:
    """torch's loss on the CPU, where the mean over a single ignored row is NaN, as over several. On CUDA it is 0."""
    if tensor is None:
        return None
    return tensor.cpu().double() if tensor.is_floating_point() else tensor.cpu()


def check(input: Tensor, target: Tensor, weight: Tensor | None = None, **options) -> tuple[Tensor, Tensor]:
    """The fused loss and its gradient, after a comparison with torch's."""
    ours, exact = input.detach().requires_grad_(), input.detach().cpu().double().requires_grad_()
    loss = fused.cross_entropy(ours, target, weight, **options)
    expected = F.cross_entropy(exact, as_float64(target), as_float64(weight), **options)
    likeness = F.cross_entropy(input, target, weight, **options)
    assert (loss.dtype, loss.shape, loss.device) == (likeness.dtype, likeness.shape, likeness.device)
    assert loss.stride() == likeness.stride()

    rows = max(1, math.prod(rows_of(tuple(input.shape))))
    largest = 1.0 if weight is None else max(1.0, weight.abs().max().item())
    reduction = options.get("reduction", "mean")
    # The terms of the sum are rows, which are as large as the finite logits.
    terms = largest * max(1.0, input.detach()[input.isfinite()].abs().max().item() if input.isfinite().any() else 1.0)
    assert_exact(loss.cpu(), expected, scale=terms * (rows if reduction == "sum" else 1), what="loss")

    grad_output = torch.randn(loss.shape, dtype=torch.float64).to(loss)
    loss.backward(grad_output)
    expected.backward(grad_output.cpu().double())
    assert ours.grad is not None and exact.grad is not None
    assert (ours.grad.dtype, ours.grad.shape, ours.grad.device) == (input.dtype, input.shape, input.device)
    scale = largest * grad_output.abs().max().item() if grad_output.numel() else 1.0
    if input.dtype == torch.float64:  # torch adds up classes one after another, with an error of 1e-13 for 5000
        scale *= max(1.0, input.shape[min(1, input.dim() - 1)] / 200)
    assert_exact(ours.grad.cpu(), exact.grad, scale=scale, what="gradient")
    return loss.detach(), ours.grad


# ---- options ----


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", SHAPES)
def test_every_combination_of_options_with_class_indices(rank, dtype, reduction, device):
    shape = SHAPES[rank]
    weights = [None, torch.rand(CLASSES).to(device, dtype) + 0.1, torch.tensor([0, 1, 0.5, 0, 2]).to(device, dtype)]
    for weight, ignore_index, label_smoothing in itertools.product(weights, (-100, -1, 0, 3, 1000), SMOOTHINGS):
        target = random_indices(shape, device, ignore_index)
        if weight is not None and weight[0] == 0:
            target = torch.where(target == ignore_index, target, 4)  # otherwise the total weight of the mean might be 0
        options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
        check(random_logits(shape, dtype, device), target, weight, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", SHAPES)
def test_every_combination_of_options_with_class_probabilities(rank, dtype, reduction, device):
    shape = SHAPES[rank]
    weights = [None, torch.rand(CLASSES).to(device, dtype) + 0.1, torch.tensor([0, 1, 0.5, 0, 2]).to(device, dtype)]
    for weight, ignore_index, label_smoothing in itertools.product(weights, (-100, -1), SMOOTHINGS):
        target = random_probabilities(shape, dtype, device)
        options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
        check(random_logits(shape, dtype, device), target, weight, **options)
    # The values of probabilities are never checked.
    check(random_logits(shape, dtype, device), random_logits(shape, dtype, device), weights[1], reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("reduce", [None, True, False])
@pytest.mark.parametrize("size_average", [None, True, False])
def test_deprecated_arguments_win_over_reduction(size_average, reduce, reduction, device):
    """This tests the functions. tests/test_modules.py tests the classes."""
    input, t = torch.randn(6, 5, device=device), torch.randint(5, (6,), device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for ours, torchs, target in (
            (fused.cross_entropy, F.cross_entropy, t),
            (fused.mse_loss, F.mse_loss, torch.randn_like(input)),
        ):
            options = {"size_average": size_average, "reduce": reduce, "reduction": reduction}
            torch.testing.assert_close(ours(input, target, **options), torchs(input, target, **options))


# ---- dtypes of targets and weights ----

INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("rank", SHAPES)
def test_class_indices_of_every_integer_type(rank, dtype, device):
    """Results are bitwise identical to those with int64 indices, and agree with torch where torch supports the type."""
    shape = SHAPES[rank]
    ignored = (2, -100) if dtype.is_signed else (2, 255)
    for ignore_index, label_smoothing, reduction in itertools.product(ignored, (0.0, 0.1), REDUCTIONS):
        input = random_logits(shape, torch.float32, device)
        target = random_indices(shape, device, ignore_index)
        options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
        loss, _ = check(input, target, **options)
        leaf = input.clone().requires_grad_()
        ours = fused.cross_entropy(leaf, target.to(dtype), **options)
        torch.testing.assert_close(ours.detach(), loss, rtol=0, atol=0, equal_nan=True)
        ours.sum().backward()
        again = input.clone().requires_grad_()
        fused.cross_entropy(again, target, **options).sum().backward()
        assert torch.equal(leaf.grad, again.grad)
        if dtype == torch.uint8 and rank <= 2 and label_smoothing == 0:
            expected = F.cross_entropy(input, target.to(dtype), **options)
            if target.dim() > 0 or device == "cpu":  # see as_float64
                torch.testing.assert_close(loss, expected, equal_nan=True)


@pytest.mark.parametrize("of_weight", [*DTYPES, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_another_dtype(dtype, of_weight, device):
    """As in torch, an error with class indices, and promoted with probabilities."""
    for shape in (SHAPES[2], SHAPES[3]):
        input, weight = random_logits(shape, dtype, device), torch.arange(1, CLASSES + 1).to(device, of_weight)
        target = random_indices(shape, device)
        if of_weight == dtype:
            check(input, target, weight)
        else:
            for function in (F.cross_entropy, fused.cross_entropy):
                with pytest.raises(RuntimeError):
                    function(input, target, weight)
        check_as_torchs(input, random_probabilities(shape, dtype, device), weight)


@pytest.mark.parametrize("of_target", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_class_probabilities_of_another_dtype(dtype, of_target, device):
    for shape, label_smoothing in itertools.product(SHAPES.values(), (0.0, 0.1)):
        input, target = random_logits(shape, dtype, device), random_probabilities(shape, of_target, device)
        for weight in (None, torch.rand(CLASSES).to(device, dtype), torch.rand(CLASSES).to(device, of_target)):
            check_as_torchs(input, target, weight, label_smoothing=label_smoothing)


def check_as_torchs(input: Tensor, target: Tensor, weight: Tensor | None, **options) -> None:
    """The loss has torch's promoted dtype and torch's value, for every reduction."""
    for reduction in REDUCTIONS:
        leaves = [input.clone().requires_grad_() for _ in range(2)]
        ours = fused.cross_entropy(leaves[0], target, weight, reduction=reduction, **options)
        torchs = F.cross_entropy(leaves[1], target, weight, reduction=reduction, **options)
        assert ours.dtype == torchs.dtype
        # torch rounds intermediate results: the log-softmax to input's dtype, and smoothed targets to target's.
        rounded = [input, target] if options.get("label_smoothing", 0) > 0 else [input]
        tolerance = 30 * max(torch.finfo(tensor.dtype).eps for tensor in rounded)
        tolerance *= math.prod(rows_of(tuple(input.shape))) if reduction == "sum" else 1
        torch.testing.assert_close(ours, torchs, rtol=tolerance, atol=tolerance)
        for loss in (ours, torchs):
            loss.backward(torch.ones_like(loss))
        assert leaves[0].grad.dtype == leaves[1].grad.dtype == input.dtype
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=tolerance, atol=tolerance)


# ---- masked and huge logits ----

LAYOUTS = ["rows", "columns", "swapped"]


def lay_out(rows: Tensor, layout: str) -> Tensor:
    """Logits of shape [rows, classes], with this layout in memory."""
    if layout == "columns":
        return rows.t().contiguous()[None]
    return rows.t().contiguous().t() if layout == "swapped" else rows


def targets_for(target: Tensor, layout: str) -> Tensor:
    return target[None] if layout == "columns" else target


@pytest.mark.parametrize("masked", [1, 15, 16, 17, 64, 255, 256, 2047, 2048, 2049, 5000])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_leading_classes(dtype, layout, masked, device):
    """Whole vectors, tiles and blocks of -inf precede the first finite class."""
    x = random_logits((4, masked + 3), dtype, device)
    x[:3, :masked] = -torch.inf  # the last row is unchanged
    target = torch.tensor([masked, 0, masked + 2, 1], device=device)  # the second target is masked: infinite
    for label_smoothing in (0.0, 0.1):
        loss, _ = check(
            lay_out(x, layout), targets_for(target, layout), reduction="none", label_smoothing=label_smoothing
        )
        loss = loss.flatten()
        assert loss[1] == torch.inf and loss[3].isfinite()
        assert loss[0].isfinite() == loss[2].isfinite() == (label_smoothing == 0)
    p = torch.rand(4, masked + 3, dtype=torch.float64).to(device, dtype)
    p[0, :masked] = 0
    loss, _ = check(lay_out(x, layout), lay_out(p, layout), reduction="none")
    assert loss.flatten()[0].isnan()  # 0 * -inf


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 17, 300, 2500])
def test_rows_of_every_kind_of_mask(classes, dtype, layout, device):
    """A row that is masked entirely is NaN. If only the target is unmasked, the loss is 0."""
    x = random_logits((5, classes), dtype, device)
    target = torch.randint(classes, (5,), device=device)
    x[0] = -torch.inf
    x[1] = -torch.inf
    x[1, target[1]] = 1.5
    x[2, target[2]] = -torch.inf
    x[3, torch.rand(classes) < 0.5] = -torch.inf
    loss, grad = check(lay_out(x, layout), targets_for(target, layout), reduction="none")
    grad = grad[0].t() if layout == "columns" else grad
    assert loss.flatten()[0].isnan() and grad[0].isnan().all()
    assert loss.flatten()[1] == 0 and (grad[1] == 0).all()
    for reduction in ("mean", "sum"):
        check(lay_out(x[1:2], layout), targets_for(target[1:2], layout), reduction=reduction)
        check(lay_out(x, layout), targets_for(target, layout), reduction=reduction)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 5, 40, 2100])
def test_a_bad_row_is_bad_alone(classes, dtype, layout, value, device):
    """NaN or +inf makes its own row NaN, as in torch. The other rows are bitwise identical to those without it."""
    x = random_logits((37, classes), dtype, device)
    for target, options in (
        (torch.randint(classes, (37,), device=device), {}),
        (torch.randint(classes, (37,), device=device), {"label_smoothing": 0.1}),
        (random_probabilities((37, classes), dtype, device), {}),
    ):
        t = lay_out(target, layout) if target.dim() == 2 else targets_for(target, layout)
        options |= {"reduction": "none"}
        bad = int(torch.randint(37, ()))
        dirty = x.clone()
        dirty[bad, torch.randint(classes, ())] = value
        check(lay_out(dirty, layout), t, **options)
        results = []
        for logits in (x, dirty):
            leaf = lay_out(logits, layout).detach().requires_grad_()
            loss = fused.cross_entropy(leaf, t, **options)
            loss.sum().backward()
            grad = leaf.grad[0].t() if layout == "columns" else leaf.grad
            results.append((loss.detach().flatten(), grad))
        others = torch.arange(37, device=device) != bad
        for clean, with_bad in zip(*results, strict=True):
            assert torch.equal(clean[others], with_bad[others])
            assert with_bad[bad].isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_bad_row_that_is_ignored(label_smoothing, dtype, layout, value, device):
    """torch's gradient is NaN in that row only, and ours is 0. Everything else equals torch's."""
    x = random_logits((6, 23), dtype, device)
    x[2, 7] = value
    target = torch.tensor([0, 22, -100, 5, -100, 9], device=device)
    for reduction in REDUCTIONS:
        ours, exact = (lay_out(t, layout).detach().requires_grad_() for t in (x, x.double()))
        options = {"reduction": reduction, "label_smoothing": label_smoothing}
        loss = fused.cross_entropy(ours, targets_for(target, layout), **options)
        expected = F.cross_entropy(exact, targets_for(target, layout), **options)
        if label_smoothing == 0:  # otherwise torch multiplies the ignored row by 0, and does not skip it
            assert_exact(loss, expected, scale=100.0, what="loss")
        assert loss.isfinite().all()
        loss.sum().backward()
        expected.sum().backward()
        grads = [g[0].t() if layout == "columns" else g for g in (ours.grad, exact.grad)]
        assert (grads[0][2] == 0).all()
        kept = torch.tensor([0, 1, 3, 4, 5], device=device)
        assert_exact(grads[0][kept], grads[1][kept], scale=1.0, what="gradient")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("height", [100.0, 1e4, -1e4])
def test_logits_far_apart(height, dtype, layout, device):
    """Probabilities are exactly 0 and 1. Nothing overflows, and a loss of 0 is exactly 0."""
    x = random_logits((6, 70), dtype, device)
    x[:, 33] = height
    x[5] = height  # all logits of the row are equal
    target = torch.tensor([33, 0, 33, 69, 34, 1], device=device)
    for label_smoothing, reduction in itertools.product((0.0, 0.1), REDUCTIONS):
        options = {"label_smoothing": label_smoothing, "reduction": reduction}
        loss, grad = check(lay_out(x, layout), targets_for(target, layout), **options)
        assert loss.isfinite().all() and grad.isfinite().all()
        check(lay_out(x, layout), lay_out(random_probabilities((6, 70), dtype, device), layout), **options)
        if height == 1e4 and reduction == "none" and label_smoothing == 0:
            assert loss.flatten()[0] == 0


@pytest.mark.parametrize("value", [1.3e9, -1.4e9, 5e9, -1e10, -1e30, -3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_logits_masked_with_a_huge_number(dtype, value, device):
    """Rows are masked entirely or in part. A row of equal numbers is uniform, whatever the number is."""
    for classes in (7, 300, 3000):
        logits = torch.randn(4, classes).to(device, dtype)
        logits[0] = value
        logits[1, ::3] = value
        logits[2, : classes // 2] = value
        target = torch.tensor([1, 1, classes - 1, 0], device=device)
        if value > 0:
            target[1:3] = 0  # a loss as large as the number would hide the others
        check(logits, target, reduction="none")
        if abs(value) < 1e34:  # the sum of so many does not overflow in float32
            check(logits, target, label_smoothing=0.1, reduction="none")
        check(logits[:1], target[:1])


# ---- total weight of 0, no rows, one class ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [3, 20, 2500])
def test_an_infinite_weight(classes, dtype, layout, device):
    """A row whose target includes that class has an infinite loss, whichever class has the maximum."""
    rows = 37 if classes < 100 else 5
    x = random_logits((rows, classes), dtype, "cpu")
    target = torch.randint(classes, (rows,))
    probabilities = (0.01 + torch.rand(rows, classes, dtype=torch.float64)).to(dtype)
    heavy = int(torch.randint(classes, ()))
    target[:3] = heavy
    x[0, heavy] = x[3, heavy] = x.max() + 1
    x[1, heavy] = -20
    for value in (math.inf, -math.inf):
        weight = (0.5 + torch.rand(classes, dtype=torch.float64)).to(dtype)
        weight[heavy] = value
        for given, label_smoothing, reduction in (
            *((target, label_smoothing, reduction) for label_smoothing in (0.0, 0.1) for reduction in REDUCTIONS),
            *((probabilities, 0.0, reduction) for reduction in REDUCTIONS),
        ):
            laid_out = lay_out if given is probabilities else targets_for
            ours = lay_out(x.to(device, copy=True), layout).detach().requires_grad_()
            exact = x.double().clone().requires_grad_()
            options: dict = {"label_smoothing": label_smoothing, "reduction": reduction}
            loss = fused.cross_entropy(ours, laid_out(given.to(device), layout), weight.to(device), **options)
            expected = F.cross_entropy(exact, as_float64(given), as_float64(weight), **options)
            close = {"rtol": 2e-2, "atol": 2e-2, "equal_nan": True}
            torch.testing.assert_close(loss.flatten().cpu().double(), expected.flatten(), **close)
            assert reduction != "none" or loss.isinf().all() == (given is probabilities or label_smoothing > 0)
            loss.sum().backward()
            expected.sum().backward()
            grad = ours.grad[0].t() if layout == "columns" else ours.grad
            torch.testing.assert_close(grad.cpu().double(), exact.grad, **close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", SHAPES)
def test_all_rows_ignored(rank, dtype, device):
    """The mean is NaN, the sum is 0, and every gradient is 0."""
    shape = SHAPES[rank]
    weights = (None, torch.rand(CLASSES).to(device, dtype))
    for weight, ignore_index, label_smoothing, reduction in itertools.product(
        weights, (-100, 2), SMOOTHINGS, REDUCTIONS
    ):
        target = torch.full(rows_of(shape), ignore_index, device=device)
        options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
        ours = random_logits(shape, dtype, device).requires_grad_()
        loss = fused.cross_entropy(ours, target, weight, **options)
        on_cpu = weight if weight is None else weight.cpu()  # see as_float64
        expected = F.cross_entropy(ours.detach().cpu(), target.cpu(), on_cpu, **options)
        torch.testing.assert_close(loss.detach().cpu(), expected, rtol=0, atol=0, equal_nan=True)
        assert (loss.isnan() if reduction == "mean" else loss == 0).all()
        loss.backward(torch.randn_like(loss))
        assert (ours.grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(0, 3), (0, 1), (0, 3, 4), (2, 3, 0), (0, 3, 0), (2, 3, 4, 0), (0, 3, 2, 0, 5)], ids=str
)
def test_no_rows(shape, dtype, device):
    weights = (None, torch.rand(shape[1]).to(device, dtype))
    for weight, label_smoothing, reduction in itertools.product(weights, SMOOTHINGS, REDUCTIONS):
        for target in (
            torch.zeros(rows_of(shape), dtype=torch.int64, device=device),
            torch.rand(shape, device=device).to(dtype),
        ):
            ours, torchs = (torch.zeros(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
            options = {"reduction": reduction, "label_smoothing": label_smoothing}
            loss = fused.cross_entropy(ours, target, weight, **options)
            expected = F.cross_entropy(torchs, target, weight, **options)
            assert (loss.dtype, loss.shape, loss.device) == (expected.dtype, expected.shape, expected.device)
            torch.testing.assert_close(loss, expected, rtol=0, atol=0, equal_nan=True)
            loss.backward(torch.ones_like(loss))
            assert ours.grad.shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (4, 1), (1, 1), (3, 1, 5), (2, 1, 3, 2), (2, 1, 1, 1, 3)], ids=str)
def test_one_class(shape, dtype, device):
    """Loss and gradient are 0, however large the logit is."""
    weights = (None, torch.tensor([1.7]).to(device, dtype))
    for weight, label_smoothing, reduction in itertools.product(weights, SMOOTHINGS, REDUCTIONS):
        input = random_logits(shape, dtype, device) * 1000
        target = torch.zeros(rows_of(shape), dtype=torch.int64, device=device)
        options = {"reduction": reduction, "label_smoothing": label_smoothing}
        loss, grad = check(input, target, weight, **options)
        assert (loss == 0).all() and (grad == 0).all()
        check(input, torch.rand(shape, device=device).to(dtype), weight, **options)


def test_the_class_is_the_function(device):
    """The class passes every argument on to the function."""
    input, target = torch.randn(6, 5, device=device), torch.tensor([0, 1, 2, 2, 4, 3], device=device)
    weight = torch.rand(5, device=device)
    for ignore_index, label_smoothing, reduction in itertools.product((-100, 2), (0.0, 0.3), REDUCTIONS):
        options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
        ours = fusedloss.CrossEntropyLoss(weight, **options)(input, target)
        torch.testing.assert_close(ours, torch.nn.CrossEntropyLoss(weight, **options)(input, target))
