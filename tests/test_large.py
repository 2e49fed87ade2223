"""Every offset that can exceed 2^31 is 64 bits wide, for tensors of more than 2^31 elements and for large strides.

The values are a repeated random block. Its length is prime, so an offset that is cut to fewer bits finds other values.
The values beyond element 2^31 are larger than the others and outweigh them, so a loss that skips them is wrong.
Losses and gradients are compared with float64 in rows at both ends and around the 2^30th and 2^31st element.
"""

import gc
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.oracle import assert_exact
from torch import Tensor

import fusedloss.functional as fused
from fusedloss import _backend, reference

GIB = 2**30
PERIOD = 1_000_003  # of the repeated values
ROWS, CLASSES = 71_563, 30_011  # six rows, or six classes of columns, lie beyond element 2^31
NUMEL = ROWS * CLASSES
BEYOND = 2**31
assert BEYOND < NUMEL < BEYOND + 7 * CLASSES


def available_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def need(gib: float, device: str) -> None:
    gc.collect()  # frees what the previous test left
    if device == "cuda":
        torch.cuda.empty_cache()
    available = available_bytes(device) / GIB
    if available < gib:
        pytest.skip(f"needs {gib:.1f} GiB of memory, {available:.1f} GiB are available")


def repeated(block: Tensor) -> Tensor:
    """More than 2^31 elements."""
    flat = torch.empty(NUMEL, dtype=block.dtype, device=block.device)
    for start in range(0, NUMEL, PERIOD):
        flat[start : start + PERIOD] = block[: NUMEL - start]
    return flat


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], scope="module")
def device(request: pytest.FixtureRequest) -> str:
    """Like the fixture of tests/conftest.py, but with the scope of the logits."""
    return request.param


@pytest.fixture(scope="module")
def block(device: str) -> Tensor:
    return (torch.randn(PERIOD) * 2).to(device, torch.bfloat16)


@pytest.fixture(scope="module")
def flat(block: Tensor, device: str) -> Iterator[Tensor]:
    need(4.5, device)
    values = [repeated(block)]
    values[0][BEYOND:] += 12
    yield values[0]
    values.clear()
    gc.collect()


def sum_of_repeated(values: Tensor) -> Tensor:
    """The sum over the elements up to 2^31, given one period of them."""
    return values.sum() * (BEYOND // PERIOD) + values[: BEYOND % PERIOD].sum()


def places(size: int, elements_apart: int) -> Tensor:
    """Some of `size` rows at this distance: at both ends, around elements 2^30 and 2^31, and a few more."""
    marked = [0, 1, size - 2, size - 1]
    for boundary in (2**30 // elements_apart, 2**31 // elements_apart):
        marked += [row for row in (boundary - 1, boundary, boundary + 1) if row < size]
    return torch.cat([torch.tensor(marked), torch.randint(size, (20,))]).unique()


def check_rows(input: Tensor, grad: Tensor, loss: Tensor, target: Tensor, grad_output: Tensor) -> None:
    """A few rows agree with the reference. `input` and `grad` are [rows, classes]."""
    exact = input.double().requires_grad_()
    expected = reference.cross_entropy(exact, target, reduction="none")
    expected.backward(grad_output.double())
    for k in range(len(input)):
        assert_exact(loss[k], expected[k], scale=20.0, what=f"loss of row {k} of those that were looked at")
        scale = grad_output[k].abs().item()
        assert_exact(grad[k], exact.grad[k], scale=scale, what=f"gradient of row {k} of those that were looked at")


def random_targets(rows: int, classes: int, device: str) -> Tensor:
    target = torch.randint(classes, (rows,))
    target[1::7] = -100
    target[-3:] = torch.tensor([classes - 1, 0, classes - 2])
    return target.to(device)


def test_rows_beyond_2_to_the_31(flat, device):
    need(5, device)
    input = flat.detach().view(ROWS, CLASSES).requires_grad_()
    target = random_targets(ROWS, CLASSES, device)
    loss = fused.cross_entropy(input, target, reduction="none")
    grad_output = torch.randn(ROWS, device=device).bfloat16()
    (grad,) = torch.autograd.grad(loss, input, grad_output)
    assert grad.shape == input.shape and grad.is_contiguous()
    rows = places(ROWS, CLASSES).to(device)
    check_rows(input.detach()[rows], grad[rows], loss.detach()[rows], target[rows], grad_output[rows])
    ignored = target == -100
    assert (loss.detach()[ignored] == 0).all() and (loss.detach()[~ignored] > 0).all()


def test_columns_beyond_2_to_the_31(flat, device):
    """The same memory as columns, so that the last classes lie beyond 2^31."""
    need(5, device)
    input = flat.detach().view(1, CLASSES, ROWS).requires_grad_()
    target = random_targets(ROWS, CLASSES, device)
    target[::5] = CLASSES - 1 - torch.arange(len(target[::5]), device=device) % 6  # targets beyond element 2^31
    loss = fused.cross_entropy(input, target[None], reduction="none")
    grad_output = torch.randn(ROWS, device=device).bfloat16()
    (grad,) = torch.autograd.grad(loss, input, grad_output[None])
    assert grad.shape == input.shape and grad.is_contiguous()
    columns = places(ROWS, 1).to(device)
    columns = torch.cat([columns, torch.tensor([5 * 8, 5 * 9, 255, 256, 257], device=device)])
    check_rows(
        input.detach()[0][:, columns].t(), grad[0][:, columns].t(), loss.detach()[0][columns], target[columns],
        grad_output[columns],
    )  # fmt: skip


def test_one_row_of_more_than_2_to_the_31_classes(flat, block, device):
    if device == "cuda":
        pytest.skip("torch's own function computes it: the next test sees that it is asked to")
    need(5, device)
    input = flat.detach().requires_grad_()
    target = torch.tensor(NUMEL - 2, device=device)
    loss = fused.cross_entropy(input, target)
    (grad,) = torch.autograd.grad(loss, input)
    largest = block.double().max() + 12
    total = sum_of_repeated((block.double() - largest).exp()) + (flat[BEYOND:].double() - largest).exp().sum()
    some = torch.cat([places(NUMEL, 1), torch.arange(BEYOND - 20, BEYOND + 20), torch.arange(NUMEL - 40, NUMEL)])
    some = some.unique().to(device)
    log_p = flat[some].double() - largest - total.log()
    assert_exact(loss.detach(), -log_p[some == NUMEL - 2][0], scale=30.0, what="loss")
    expected = log_p.exp() - (some == NUMEL - 2).double()
    # The error is relative to each value, since the sum over the classes has 2^31 terms in float32.
    assert ((grad[some].double() - expected).abs() <= (2**-8 + 1e-3) * expected.abs()).all()


@pytest.mark.gpu
@pytest.mark.parametrize("beyond", [0, 1])
def test_rows_of_more_classes_than_the_cuda_kernels_count_go_to_torch(beyond):
    need(5, "cuda")
    classes = 2**30 + beyond
    row = torch.zeros((), device="cuda", dtype=torch.bfloat16).expand(1, classes)
    target = torch.zeros(1, device="cuda", dtype=torch.int64)
    loss = _backend.extension().cross_entropy(row, target, None, 1, -100, 0.0, False)  # 1 is the mean
    if beyond:
        assert loss is None
    else:
        assert_exact(loss, torch.tensor(math.log(classes), device="cuda", dtype=torch.float64), what="loss")


def test_mse_beyond_2_to_the_31(flat, block, device):
    need(9, device)
    other = block.roll(12345)
    target = repeated(other)
    input = flat.detach().requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = fused.mse_loss(input, target)  # float32, as under autocast
    (grad,) = torch.autograd.grad(loss, input, torch.tensor(float(NUMEL), device=device))

    beyond = flat[BEYOND:].double() - target[BEYOND:].double()
    total = sum_of_repeated((block.double() - other.double()) ** 2) + (beyond**2).sum()
    assert_exact(loss.detach(), total / NUMEL, what="loss")
    some = torch.cat([places(NUMEL, 1), torch.arange(BEYOND - 20, BEYOND + 20), torch.arange(NUMEL - 40, NUMEL)])
    some = some.unique().to(device)
    expected = 2 * (flat[some].double() - target[some].double())
    for k, place in enumerate(some.tolist()):
        assert_exact(grad[place], expected[k], what=f"gradient of element {place}")


# ---- strides ----

FAR = 2**31 + 11
STRIDES = {  # shape and strides in elements. Some are large, and the memory between is never touched
    "rows": ((3, 37), (FAR, 1)),
    "rows of 3-D logits, outer": ((3, 21, 2), (FAR, 1, 40)),
    "rows of 3-D logits, inner": ((2, 21, 3), (40, 1, FAR)),
    "columns, outer": ((3, 7, 33), (FAR, 40, 1)),
    "columns, classes": ((2, 3, 33), (50, FAR, 1)),
    "columns, both": ((2, 2, 300), (FAR, FAR + 4096, 1)),
    "swapped": ((33, 3), (1, FAR)),
    "neither": ((2, 3, 5), (2, FAR, 9)),  # the loss copies it first
    "1-D": ((3,), (FAR,)),
}


def reach(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1


@pytest.fixture(scope="module")
def untouched(device: str) -> Tensor:
    """Address space for any of the strides. Only what a test touches takes memory."""
    if device == "cuda":
        need(20, device)
    elements = max(reach(*case) for case in STRIDES.values()) + 10_000
    try:
        return torch.empty(elements, dtype=torch.bfloat16, device=device)
    except RuntimeError as error:
        pytest.skip(f"needs {elements * 2 / GIB:.1f} GiB of address space: {error}")


@pytest.mark.parametrize("name", STRIDES)
def test_huge_strides(name, untouched, device):
    shape, strides = STRIDES[name]
    logits = untouched.as_strided(shape, strides).copy_(torch.randn(shape) * 3)
    # Probabilities with the strides of the logits, at a small offset from them.
    beside = untouched.as_strided(shape, strides, 5000).copy_(torch.randn(shape).softmax(min(1, len(shape) - 1)))
    rows = shape[:1] * (len(shape) > 1) + shape[2:]
    indices = torch.randint(shape[min(1, len(shape) - 1)], rows, device=device)
    for target in (indices, beside, beside.clone()):
        for label_smoothing in (0.0, 0.1):
            options = {"reduction": "none", "label_smoothing": label_smoothing}
            ours, exact = logits.detach().requires_grad_(), logits.double().requires_grad_()
            loss = fused.cross_entropy(ours, target, **options)
            expected = reference.cross_entropy(exact, target, **options)
            assert_exact(loss, expected, scale=10.0, what="loss")
            grad_output = torch.randn(rows, device=device).bfloat16()
            (grad,) = torch.autograd.grad(loss, ours, grad_output)
            expected.backward(grad_output.double())
            assert_exact(grad, exact.grad, scale=grad_output.abs().max().item(), what="gradient")


def test_huge_strides_of_mse_loss(untouched):
    for shape, strides in STRIDES.values():
        input = untouched.as_strided(shape, strides).copy_(torch.randn(shape)).requires_grad_()
        target = untouched.as_strided(shape, strides, 5000).copy_(torch.randn(shape))
        for reduction in ("none", "sum"):
            exact = input.detach().double().requires_grad_()
            loss = fused.mse_loss(input, target, reduction=reduction)
            expected = reference.mse_loss(exact, target, reduction=reduction)
            assert_exact(loss, expected, what="loss")
            (grad,) = torch.autograd.grad(loss.sum(), input)
            expected.sum().backward()
            assert_exact(grad, exact.grad, what="gradient")
