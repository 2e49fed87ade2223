"""Values and gradients of the squared error, compared with the float64 reference and with torch's own loss."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.draws import DTYPES, REDUCTIONS
from helpers.oracle import assert_exact
from torch import Tensor

import fusedloss.functional as fused
from fusedloss import reference

# Odd sizes, and just below, at and above a vector (16), four of them, a block (4096) and a chunk (32768).
SHAPES = [(), (1,), (3,), (15,), (17,), (63,), (4095,), (4097,), (5, 7), (3, 1, 5), (32768,), (3, 32769)]


def check(input: Tensor, target: Tensor, reduction: str) -> None:
    ours = [tensor.detach().requires_grad_() for tensor in (input, target)]
    exact = [tensor.detach().double().requires_grad_() for tensor in (input, target)]
    loss = fused.mse_loss(*ours, reduction=reduction)
    expected = reference.mse_loss(*exact, reduction=reduction)
    torchs = F.mse_loss(input.detach(), target.detach(), reduction=reduction)
    assert (loss.dtype, loss.shape, loss.device) == (torchs.dtype, torchs.shape, torchs.device)
    assert_exact(loss, expected, what="loss")
    grad_output = torch.randn(loss.shape, dtype=torch.float64).to(loss)
    loss.backward(grad_output)
    expected.backward(grad_output.double())
    for name, mine, right in zip(("input", "target"), ours, exact, strict=True):
        assert mine.grad is not None and mine.grad.dtype == mine.dtype
        assert_exact(mine.grad, right.grad, what=f"gradient of {name}")
    assert torch.equal(loss.detach(), fused.mse_loss(input.detach(), target.detach(), reduction=reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, reduction, device):
    input, target = (torch.randn(shape, dtype=torch.float64).to(device, dtype) for _ in range(2))
    check(input, target, reduction)


LAYOUTS = {
    "every second element": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "odd storage offset": lambda x: torch.cat([x.new_full((3,), torch.nan), x.flatten()])[3:].view(x.shape),
    "expanded": lambda x: x[:1].expand(x.shape),
    "contiguous": lambda x: x,
}


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("of_target", LAYOUTS)
@pytest.mark.parametrize("of_input", LAYOUTS)
def test_strides_and_offsets(of_input, of_target, reduction, device):
    for dtype in DTYPES:
        input, target = (torch.randn(9, 31, dtype=torch.float64).to(device, dtype) for _ in range(2))
        check(LAYOUTS[of_input](input), LAYOUTS[of_target](target), reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("input_shape", "target_shape"), [((4, 1), (4,)), ((3,), (2, 3)), ((5, 1, 2), (3, 1)), ((), (2, 2))], ids=str
)
def test_broadcasting_with_torchs_warning(input_shape, target_shape, reduction, device):
    input, target = torch.randn(input_shape, device=device), torch.randn(target_shape, device=device)
    results = []
    for loss_function in (F.mse_loss, fused.mse_loss):
        leaves = [input.clone().requires_grad_(), target.clone().requires_grad_()]
        with pytest.warns(UserWarning, match="Using a target size") as caught:
            loss = loss_function(*leaves, reduction=reduction)
        assert caught[0].filename == __file__  # the warning points at the caller
        loss.backward(torch.full_like(loss, 0.7))
        results.append((loss.detach(), leaves[0].grad, leaves[1].grad, str(caught[0].message)))
    for expected, actual in zip(*results, strict=True):
        if isinstance(expected, str):
            assert actual == expected
        else:
            torch.testing.assert_close(actual, expected)


def test_no_warning_for_equal_shapes(device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused.mse_loss(torch.randn(3, device=device), torch.randn(3, device=device))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty(reduction, device):
    for shape in [(0,), (3, 0)]:
        ours, torchs = (torch.zeros(shape, device=device, requires_grad=True) for _ in range(2))
        loss = fused.mse_loss(ours, torch.zeros(shape, device=device), reduction=reduction)
        expected = F.mse_loss(torchs, torch.zeros(shape, device=device), reduction=reduction)
        torch.testing.assert_close(loss, expected, equal_nan=True)
        loss.backward(torch.ones_like(loss))
        assert ours.grad.shape == shape


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_empty_and_expanded(device):
    input = torch.randn(1, device=device, requires_grad=True)
    loss = fused.mse_loss(input, torch.randn(0, device=device), reduction="none")
    loss.backward(torch.ones_like(loss))
    assert loss.shape == (0,) and torch.equal(input.grad, torch.zeros_like(input))
    fused.mse_loss(input.expand(0), torch.randn(0, device=device), reduction="sum").backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_only_the_wanted_gradient(reduction, device):
    input, target = torch.randn(50, device=device), torch.randn(50, device=device)
    both = [tensor.clone().requires_grad_() for tensor in (input, target)]
    fused.mse_loss(*both, reduction=reduction).sum().backward()
    for wanted in (0, 1):
        pair = [input.clone(), target.clone()]
        pair[wanted].requires_grad_()
        fused.mse_loss(*pair, reduction=reduction).sum().backward()
        assert torch.equal(pair[wanted].grad, both[wanted].grad)
        assert pair[1 - wanted].grad is None


def test_strided_grad_output(device):
    input, target = torch.randn(6, 5, device=device), torch.randn(6, 5, device=device)
    for grad_output in (torch.randn(5, 6, device=device).t(), torch.randn(5, device=device).expand(6, 5)):
        ours, exact = input.clone().requires_grad_(), input.double().requires_grad_()
        fused.mse_loss(ours, target, reduction="none").backward(grad_output)
        reference.mse_loss(exact, target, reduction="none").backward(grad_output.double())
        assert_exact(ours.grad, exact.grad)


def test_the_loss_is_laid_out_as_torchs(device):
    input = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    target = torch.randn(2, 3, 4, 5, device=device)
    loss, expected = (f(input, target, reduction="none") for f in (fused.mse_loss, F.mse_loss))
    assert loss.stride() == expected.stride() and torch.equal(loss, expected)


def test_non_finite_values_pass_through(device):
    input = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf], device=device)
    target = torch.zeros(4, device=device)
    for reduction in REDUCTIONS:
        torch.testing.assert_close(
            fused.mse_loss(input, target, reduction=reduction),
            F.mse_loss(input, target, reduction=reduction),
            equal_nan=True,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_gives_float32(dtype, device):
    input = torch.randn(40, device=device).to(dtype).requires_grad_()
    target = torch.randn(40, device=device).to(dtype)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss, expected = fused.mse_loss(input, target), F.mse_loss(input, target)
    assert loss.dtype == expected.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, input)[0] for x in (loss, expected)))


def test_mixed_dtypes_and_weights_are_torchs(device):
    input, target = torch.randn(8, device=device), torch.randn(8, dtype=torch.float64, device=device)
    torch.testing.assert_close(fused.mse_loss(input, target), F.mse_loss(input, target))
    weight = torch.rand(8, device=device)
    torch.testing.assert_close(
        fused.mse_loss(input, input + 1, weight=weight), F.mse_loss(input, input + 1, weight=weight)
    )
