"""The losses with fake and meta tensors."""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import SEED
from helpers.draws import DTYPES, REDUCTIONS
from helpers.graphs import KINDS, LAYOUTS, functions, given, target_for
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fusedloss
import fusedloss.functional as fused
from fusedloss import _backend, _dispatch

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def facts(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.stride(), tensor.device, tensor.layout


def everything(kind: str, input: Tensor, target: Tensor, options: dict, autocast: bool) -> list[Tensor]:
    """The loss and the gradients."""
    leaves = [input.detach().requires_grad_()]
    if kind == "mse":
        leaves.append(target := target.detach().requires_grad_())
    with torch.autocast(input.device.type, dtype=torch.bfloat16, enabled=autocast):
        loss = functions(kind)[0](leaves[0], target, **options)
    return [loss, *torch.autograd.grad(loss, leaves, torch.ones_like(loss))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors_look_like_the_real_ones(layout, dtype, device):
    input = LAYOUTS[layout](dtype=dtype, device=device)
    for i, kind in enumerate(KINDS):
        target, options = target_for(kind, input)
        options["reduction"] = REDUCTIONS[(i + SEED) % 3] if kind != "mse" else "none"
        for autocast in (False, True):
            real = everything(kind, input, target, options, autocast)
            with FakeTensorMode() as mode:
                weight = {"weight": mode.from_tensor(options["weight"])} if "weight" in options else {}
                faked = everything(kind, mode.from_tensor(input), mode.from_tensor(target), options | weight, autocast)
            assert all(isinstance(tensor, FakeTensor) for tensor in faked)
            assert list(map(facts, faked)) == list(map(facts, real)), f"{kind}, {options}, autocast {autocast}"
            assert "fusedloss" in faked[0].grad_fn.name()


def test_fake_tensors_are_known_outside_of_their_mode(device):
    mode = FakeTensorMode()
    input, target, _ = given("indices", device)
    input = mode.from_tensor(input.requires_grad_())
    loss = fused.cross_entropy(input, mode.from_tensor(target), reduction="none")
    assert type(loss) is FakeTensor and loss.shape == (5,) and "fusedloss" in loss.grad_fn.name()
    loss.sum().backward()
    assert type(input.grad) is FakeTensor and input.grad.shape == input.shape


@pytest.mark.parametrize("kind", ["indices", "probabilities", "mse"])
def test_fake_tensors_of_a_gpu_that_is_not_there(kind):
    """As when the memory of a model is estimated on another machine."""
    with FakeTensorMode():
        input, target, options = given(kind, "cuda")
        loss = functions(kind)[0](input, target, reduction="none", **options)
    assert loss.device.type == "cuda" and loss.shape == (input.shape if kind == "mse" else (5,))


class WithoutCuda:
    """The extension, as a build without CUDA provides it."""

    with_cuda = False

    def __init__(self, extension):
        self.extension = extension

    def __getattr__(self, name):
        return getattr(self.extension, name)


@pytest.mark.parametrize("cuda", ["13.0", None])
def test_cuda_tensors_without_cuda_kernels_are_warned_of_once(cuda, monkeypatch):
    """The tensors are fake, and are dispatched as real ones are."""
    monkeypatch.setattr(_backend, "_module", WithoutCuda(_backend.extension()))
    monkeypatch.setattr(_backend, "_warned", False)
    monkeypatch.setattr(torch.version, "cuda", cuda)

    def told_by(*calls):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for call in calls:
                call()
        return [str(one.message) for one in caught if "fusedloss" in str(one.message)]

    def calls(device):
        for kind in ("mse", "indices", "probabilities"):
            input, target, options = given(kind, device)
            yield functools.partial(functions(kind)[0], input, target, **options)

    assert told_by(*calls("cpu")) == []
    with FakeTensorMode():
        (message,) = told_by(*calls("cuda"), *calls("cuda"))
    assert fusedloss.describe().removeprefix("fusedloss: ") in message
    assert ("install a CUDA toolkit with nvcc, version 13.x" in message) == (cuda is not None)
    assert ("fusedloss.jit.load(cuda=True)" in message) == (cuda is not None)

    # The compiler dispatches while it records, and the warning must not interrupt it.
    monkeypatch.setattr(_backend, "_warned", False)
    compiled = torch.compile(lambda x: x if _dispatch._has_kernels("cuda") else -x, fullgraph=True, backend="eager")
    assert told_by(lambda: compiled(torch.ones(1))) == [message]
    assert compiled(torch.ones(1)) == -1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_meta_tensors(kind, layout):
    """They go to torch's own function, which gives the results and errors that it gives without this package."""
    input = LAYOUTS[layout]()
    target, options = target_for(kind, input)
    options = {name: option.to("meta") if isinstance(option, Tensor) else option for name, option in options.items()}
    ours, _ = functions(kind)
    for reduction in REDUCTIONS:
        found = []
        for loss in (ours, getattr(F, ours.__name__)):
            leaf = input.to("meta").requires_grad_()
            value = loss(leaf, target.to("meta"), reduction=reduction, **options)
            found.append([*map(facts, (value, *torch.autograd.grad(value.sum(), leaf))), value.grad_fn.name()])
        assert found[0] == found[1] and value.is_meta
