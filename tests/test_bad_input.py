"""Bad input raises torch's type of error. The message names the argument, what was given and what was expected."""

import contextlib
import inspect
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.bad_input import TYPES_ARE_OURS, i, x
from helpers.pointwise import CASES, Case
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fusedloss
import fusedloss.functional as fused
from fusedloss import custom_loss

# Arguments, options, and what the message must contain.
CROSS_ENTROPY = {
    "batch": ((x(4, 3), i(5)), {}, ["target", r"\[4\]", r"\[5\]"]),
    "no batch": ((x(4, 3), i()), {}, ["target", r"\[4\]", r"\[\]"]),
    "one dimension too many": ((x(4, 3), i(4, 1)), {}, ["target", r"\[4\]", r"\[4, 1\]"]),
    "1-D logits": ((x(3), i(2)), {}, ["target", r"\[\]", r"\[2\]"]),
    "spatial size": ((x(4, 3, 5), i(4, 6)), {}, ["target", r"\[4, 5\]", r"\[4, 6\]"]),
    "spatial batch": ((x(4, 3, 5), i(3, 5)), {}, ["target", r"\[4, 5\]", r"\[3, 5\]"]),
    "spatial dimensions": ((x(4, 3, 5, 2), i(4, 5)), {}, ["target", r"\[4, 5, 2\]", r"\[4, 5\]"]),
    "spatial size, smoothed": ((x(4, 3, 5), i(4, 6)), {"label_smoothing": 0.1}, ["target", r"\[4, 5\]", r"\[4, 6\]"]),
    "5-D": ((x(4, 3, 5, 2, 2), i(4, 5, 2, 3)), {}, ["target", r"\[4, 5, 2, 2\]", r"\[4, 5, 2, 3\]"]),
    "float indices": ((x(4, 3), x(4)), {}, ["target", "integer", "Float"]),
    "bool indices": ((x(4, 3), i(4).bool()), {}, ["target", "integer", "Bool"]),
    "integer probabilities": ((x(4, 3), i(4, 3)), {}, ["target", "floating", "Long"]),
    "integer logits": ((i(4, 3), i(4)), {}, ["input", "float32", "Long"]),
    "complex logits": ((x(4, 3).to(torch.complex64), i(4)), {}, ["input", "float32", "ComplexFloat"]),
    "float8 logits": ((x(4, 3).to(torch.float8_e4m3fn), i(4)), {}, ["input", "float32", "Float8"]),
    "weight size": ((x(4, 3), i(4), torch.ones(2)), {}, ["weight", "3 classes", r"\[2\]"]),
    "weight dimensions": ((x(4, 3), i(4), torch.ones(3, 1)), {}, ["weight", "3 classes", r"\[3, 1\]"]),
    "weight dtype": ((x(4, 3), i(4), torch.ones(3).double()), {}, ["weight", "Float", "Double"]),
    "weight size, probabilities": ((x(4, 3), x(4, 3), torch.ones(2)), {}, ["weight", "3 classes", r"\[2\]"]),
    "smoothing": ((x(4, 3), i(4)), {"label_smoothing": 1.5}, ["label_smoothing", "1.0", "1.5"]),
    "ignore_index, probabilities": ((x(4, 3), x(4, 3)), {"ignore_index": 1}, ["ignore_index", "negative", "1"]),
    "class too large": ((x(4, 3), i(4) + 3), {}, [r"target\[0\] is 3", r"\[0, 3\)"]),
    "class negative": ((x(4, 3), i(4) - 1), {}, [r"target\[0\] is -1", r"\[0, 3\)"]),
    "class far out": ((x(4, 3), i(4) + 2**62), {}, [str(2**62)]),
    "class far out, smoothed": ((x(4, 3), i(4) - 2**62), {"label_smoothing": 0.1}, [str(-(2**62))]),
    "class too large, columns": ((x(2, 3, 300), i(2, 300) + 5), {}, [r"target\[0, 0\] is 5", r"\[0, 3\)"]),
    "class too large, 1-D": ((x(3), i() + 7), {}, ["target is 7", r"\[0, 3\)"]),
    "reduction": ((x(4, 3), i(4)), {"reduction": "average"}, ["average", "reduction"]),
    "ignore_index type": ((x(4, 3), i(4)), {"ignore_index": 1.5}, []),
    "smoothing type": ((x(4, 3), i(4)), {"label_smoothing": "a"}, []),
    "input type": (([[1.0, 2.0]], i(1)), {}, ["input"]),
    "target type": ((x(4, 3), None), {}, ["target"]),
    "no dimensions": ((torch.tensor(1.0), torch.tensor(1.0)), {}, []),
    "no classes": ((x(2, 0), i(2)), {}, []),
    "differentiable weight": ((x(4, 3), i(4), torch.ones(3, requires_grad=True)), {}, ["weight"]),
    "target device": ((x(4, 3), i(4, device="meta")), {}, []),
}

MSE = {
    "shapes": ((x(3), x(2)), {}, ["target", r"\[2\]", r"\[3\]"]),
    "integers": ((i(3), i(3)), {}, ["mse", "not implemented", "Long"]),
    "complex": ((x(3).to(torch.complex64),) * 2, {}, ["mse", "not implemented", "ComplexFloat"]),
    "reduction": ((x(3), x(3)), {"reduction": "average"}, ["average", "reduction"]),
    "target device": ((x(3), x(3, device="meta")), {}, []),
    "input type": (([1.0], x(1)), {}, []),
}


def check(ours, torchs, arguments, options, says):
    with pytest.raises(Exception) as expected:
        torchs(*arguments, **options)
    with pytest.raises(Exception) as raised:
        ours(*arguments, **options)
    assert raised.type is expected.type or not TYPES_ARE_OURS
    for part in says:
        raised.match(part)


@pytest.mark.parametrize("case", CROSS_ENTROPY)
def test_cross_entropy(case):
    check(fused.cross_entropy, F.cross_entropy, *CROSS_ENTROPY[case])


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("case", MSE)
def test_mse_loss(case):
    check(fused.mse_loss, F.mse_loss, *MSE[case])


class Index:
    def __index__(self):
        return 1


class Float:
    def __float__(self):
        return 0.5


VALUES = [
    *(None, True, False, 0, 1, 2, -1, 0.5, 1.0, math.nan, math.inf, -0.5, 1j, Fraction(1, 2), Index(), Float()),
    *("mean", "sum", "no", "", "0", b"mean", [], (1,), object(), np.bool_(True), np.int64(1), np.float32(0.5)),
    *(np.float64(0.5), np.array(0.5), torch.tensor(1), torch.tensor(0.5), torch.tensor([1.0]), torch.tensor([1.0, 2])),
    nn.Parameter(torch.tensor(0.5)),
]
MODULES = {
    **{"cross_entropy": "CrossEntropyLoss", "nll_loss": "NLLLoss", "mse_loss": "MSELoss", "l1_loss": "L1Loss"},
    **{"smooth_l1_loss": "SmoothL1Loss", "huber_loss": "HuberLoss", "soft_margin_loss": "SoftMarginLoss"},
    **{"binary_cross_entropy_with_logits": "BCEWithLogitsLoss", "kl_div": "KLDivLoss"},
    **{"poisson_nll_loss": "PoissonNLLLoss", "gaussian_nll_loss": "GaussianNLLLoss"},
}


def of_function(library, name, arguments, options):
    return getattr(library, name)(*arguments, **options)


def of_module(library, name, arguments, options):
    return getattr(library, MODULES[name])(**options)(*arguments)


def outcome(call, *arguments):
    try:
        return call(*arguments).detach()
    except Exception as error:
        return type(error)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", MODULES)
def test_options_of_other_types(name):
    """Option values that torch accepts give torch's result, and those that it refuses are refused."""
    arguments = [torch.rand(4, 3) + 0.1, torch.rand(4, 3), torch.rand(4, 3)]
    if name in ("cross_entropy", "nll_loss"):
        arguments[1] = torch.tensor([0, 2, 1, 1])
    arguments = arguments[: 3 if name == "gaussian_nll_loss" else 2]
    options = inspect.signature(getattr(F, name)).parameters.keys() - {
        *("input", "target", "var", "weight", "pos_weight")
    }
    for option in sorted(options):
        for value in (*VALUES, *((2**70, -(2**70), 2**63) if option == "ignore_index" else ())):
            calls = [(of_function, fused, F)]
            if option in inspect.signature(getattr(nn, MODULES[name])).parameters:
                calls.append((of_module, fusedloss, nn))
            for call, *libraries in calls:
                ours, torchs = (outcome(call, library, name, arguments, {option: value}) for library in libraries)
                what = f"{option}={value!r}: {ours}, torch {torchs}"
                if isinstance(torchs, type) or isinstance(ours, type):
                    assert ours is torchs, what
                else:
                    torch.testing.assert_close(ours, torchs, equal_nan=True, msg=what)


@pytest.mark.parametrize("value", [None, 1, 0, "no", np.bool_(True)])
def test_own_options_of_other_types(value):
    with pytest.raises(TypeError, match=f"inplace_backward must be a bool, got {type(value).__name__}"):
        fused.cross_entropy(x(4, 3), i(4), inplace_backward=value)
    with pytest.raises(TypeError, match=f"enabled must be a bool, got {type(value).__name__}"):
        fusedloss.debug(value)


def test_the_first_bad_row_is_named():
    target = torch.randint(0, 50, (700, 3))
    target[400, 1], target[600, 2] = 50, -3
    logits = torch.randn(700, 50, 3)
    with pytest.raises(IndexError, match=r"target\[400, 1\] is 50, expected a class index in \[0, 50\)"):
        fused.cross_entropy(logits, target)
    with pytest.raises(IndexError, match=r"target\[400, 1\] is 50"):
        fused.cross_entropy(logits.movedim(1, -1).contiguous().movedim(-1, 1), target)


def test_nothing_is_lost_by_an_error():
    logits = torch.randn(4, 3, requires_grad=True)
    before = logits.detach().clone()
    with pytest.raises(IndexError):
        fused.cross_entropy(logits, i(4) + 3)
    assert torch.equal(logits.detach(), before) and logits.grad is None
    fused.cross_entropy(logits, i(4)).backward()


@pytest.mark.parametrize("value", [-0.5, float("nan")])
def test_torch_takes_a_negative_smoothing_for_none(value):
    logits, target = x(4, 3), torch.tensor([0, 2, 1, 1])
    assert torch.equal(fused.cross_entropy(logits, target, label_smoothing=value), fused.cross_entropy(logits, target))


@pytest.mark.gpu
def test_mismatched_devices():
    with pytest.raises(RuntimeError, match="target must be on the device of input"):
        fused.cross_entropy(x(4, 3, device="cuda"), i(4))
    with pytest.raises(RuntimeError, match="weight must be on the device of input"):
        fused.cross_entropy(x(4, 3, device="cuda"), i(4, device="cuda"), torch.ones(3))
    with pytest.raises(RuntimeError, match="target must be on the device of input"):
        fused.mse_loss(x(4, 3, device="cuda"), x(4, 3))


def free(tensor):
    tensor.untyped_storage().resize_(0)


def shrink(tensor):
    storage = tensor.untyped_storage()
    storage.resize_(storage.nbytes() - 1)


def named_losses(device):
    """The losses, each with all of its operands by name."""

    def rows():
        return {
            "input": x(6, 5, device=device),
            "target": torch.randint(5, (6,), device=device),
            "weight": 1 + torch.rand(5, device=device),
        }

    def probabilities():
        return {**rows(), "target": x(6, 5, device=device).softmax(1)}

    yield fused.cross_entropy, rows()
    yield fused.nll_loss, rows()
    yield fused.cross_entropy, probabilities()
    for case in (*CASES.values(), Case("mse_loss", {"input": "real", "target": "real"})):
        if case.options.keys() <= {"log_target", "log_input", "full"}:

            def loss(case=case, **operands):
                return case.ours(operands)

            yield loss, case.draw((6, 5), device=device)


def custom_losses(device):
    yield (
        custom_loss("(input - target) ** 2 * sample_weight", tensors=["sample_weight"]).to(device),
        {name: 1 + torch.rand(6, 5, device=device) for name in ("input", "target", "sample_weight")},
    )


@pytest.mark.filterwarnings("ignore:reduction:UserWarning")
@pytest.mark.parametrize("lose", [free, shrink])
@pytest.mark.parametrize("losses", [named_losses, custom_losses])
def test_memory_that_was_freed(losses, lose, device):
    """torch's own losses raise too, or crash."""
    for loss, operands in losses(device):
        for name in operands:
            given = {key: operand.clone() for key, operand in operands.items()}
            lose(given[name])
            with pytest.raises(RuntimeError, match=f"{name} must have memory for its elements"):
                loss(**given)
        loss(**operands)


@pytest.mark.filterwarnings("ignore:reduction:UserWarning")
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("losses", [named_losses, custom_losses])
def test_memory_that_was_freed_before_the_backward_pass(losses, create_graph, device):
    for loss, operands in losses(device):
        for name in operands:
            given = {key: operand.clone() for key, operand in operands.items()}
            given["input"].requires_grad_()
            value = loss(**given)
            free(given[name].detach())
            if loss is fused.nll_loss and name == "input":  # the backward pass does not read it
                torch.autograd.grad(2 * value, given["input"], create_graph=create_graph)
                continue
            with pytest.raises(RuntimeError, match=f"{name} must have memory for its elements"):
                torch.autograd.grad(2 * value, given["input"], create_graph=create_graph)


def test_memory_that_was_freed_of_the_registered_ops(device):
    ops = torch.ops.fusedloss
    input, target, one = x(6, 5, device=device), torch.randint(5, (6,), device=device), torch.ones((), device=device)
    _, statistics = ops.cross_entropy_forward(input, target, None, 1, -100, 0.0, False)
    _, total_weight = ops.nll_loss_forward(input, target, None, 1, -100, False)
    calls = [
        ("cross_entropy_backward", [one, input, target, None, statistics, 1, -100, 0.0]),
        ("nll_loss_backward", [one, target, None, total_weight, [6, 5], [5, 1], torch.float32, 1, -100]),
        ("pointwise_backward", [one, [input, input], "mse_loss", [], 1, None, [True, False]]),
    ]
    for name, arguments in calls:
        op = getattr(ops, name)
        op(*arguments)
        for place, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                freed = argument.clone()
                free(freed)
                with pytest.raises(RuntimeError, match="must have memory for its elements"):
                    op(*arguments[:place], freed, *arguments[place + 1 :])


# Users may call the registered ops directly. Nothing has then checked whether the kernels cover the call.
REGISTERED = {
    "probabilities of fewer bytes": ("cross_entropy", (x(64, 50), torch.rand(64, 50).bfloat16()), ["target", "dtype"]),
    "probabilities of more bytes": ("cross_entropy", (x(4, 3), torch.rand(4, 3).double()), ["target", "dtype"]),
    "no dimension": ("cross_entropy", (x(), i(1)), ["input", "dimension"]),
    "no dimension, probabilities": ("cross_entropy", (x(), x()), ["input", "dimension"]),
    "no dimension, NLL": ("nll_loss", (x(), i(1)), ["input", "dimension"]),
}


@pytest.mark.parametrize("fake", [False, True], ids=["eager", "fake"])
@pytest.mark.parametrize("name", REGISTERED)
def test_the_registered_forward_ops(name, fake, device):
    loss, tensors, says = REGISTERED[name]
    op = getattr(torch.ops.fusedloss, f"{loss}_forward")
    options = (None, 1, -100, *([0.0] if loss == "cross_entropy" else []), False)
    with FakeTensorMode() if fake else contextlib.nullcontext() as mode:
        tensors = [mode.from_tensor(tensor) if fake else tensor.to(device) for tensor in tensors]
        with pytest.raises(RuntimeError) as raised:
            op(*tensors, *options)
    for part in says:
        raised.match(part)


def test_the_registered_backward_ops(device):
    one, rows = torch.ones((), device=device), torch.ones(8, device=device)
    with pytest.raises(RuntimeError, match="target holds class probabilities, so it must have the dtype of input"):
        target = torch.rand(4, 3, device=device).bfloat16()
        torch.ops.fusedloss.cross_entropy_backward(one, x(4, 3, device=device), target, None, rows, 2, -100, 0.0)
    with pytest.raises(RuntimeError, match="nll_loss: input must have shape"):
        target = i(1, device=device)
        torch.ops.fusedloss.nll_loss_backward(one, target, None, rows[:1], [], [], torch.float32, 1, -100)
