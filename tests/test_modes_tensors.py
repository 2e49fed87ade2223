"""The losses with tensor subclasses, function modes, and tensors that are not plain numbers in memory."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers.graphs import CLASSES, KINDS, given
from helpers.modes import TORCHS, assert_step, functions, is_fused, step
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor

import fusedloss
import fusedloss.functional as fused

# ---- tensor subclasses and function modes ----


class Kept(Tensor):
    """A subclass that torch's functions preserve."""


class Tabled(Tensor):
    """A subclass with its own versions of torch's functions, as tensors with units or names have."""

    table: dict = {}  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in cls.table:
            return cls.table[function](*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})


class Disabled(Tensor):
    """A subclass that does not override torch's functions."""

    __torch_function__ = torch._C._disabled_torch_function_impl


@pytest.fixture(params=[False, True], ids=["", "patched"])
def patched(request) -> Iterator[bool]:
    with fusedloss.patch() if request.param else contextlib.nullcontext():
        yield request.param


@pytest.mark.parametrize("kind", KINDS)
def test_subclasses_are_kept(kind, patched, device):
    ours, torchs, _ = functions(kind)
    input, target, options = given(kind, device)
    expected = torchs(input, target, **options)
    for of_input, of_target in ((Kept, Tensor), (Tensor, Kept), (Kept, Kept)):
        leaf = input.detach().requires_grad_()
        loss = ours(leaf.as_subclass(of_input), target.as_subclass(of_target), **options)
        assert type(loss) is Kept
        torch.testing.assert_close(loss.as_subclass(Tensor), expected)
        loss.backward()
        torch.testing.assert_close(leaf.grad, step(torchs, input, target, torch.ones((), device=device), **options)[1])
    if "weight" in options:
        kept = {**options, "weight": options["weight"].as_subclass(Kept)}
        assert type(ours(input, target, **kept)) is Kept
    assert type(ours(input.as_subclass(Disabled), target, **options)) is type(
        torchs(input.as_subclass(Disabled), target, **options)
    )


def test_a_table_of_functions_knows_torchs_own(patched, device, monkeypatch):
    """The keys of the table are torch's functions as they were before they were patched."""
    mine = {function: lambda *_, **options: ("mine", options) for function in TORCHS.values()}
    monkeypatch.setattr(Tabled, "table", mine)
    input, target, _ = given("indices", device)
    modules = (nn.CrossEntropyLoss, nn.MSELoss) if patched else (fusedloss.CrossEntropyLoss, fusedloss.MSELoss)
    library = F if patched else fused
    for arguments in ((input.as_subclass(Tabled), target), (input, target.as_subclass(Tabled))):
        handled, options = library.cross_entropy(*arguments, label_smoothing=0.1, reduction="sum", ignore_index=3)
        assert handled == "mine"
        assert (options["label_smoothing"], options["reduction"], options["ignore_index"]) == (0.1, "sum", 3)
        assert modules[0]()(*arguments)[0] == "mine"
    handled, options = library.mse_loss(input, input.as_subclass(Tabled), reduction="none")
    assert handled == "mine" and options["reduction"] == "none"
    assert modules[1]()(input.as_subclass(Tabled), input)[0] == "mine"
    # A function that is not in the table is computed as usual, and the class is kept.
    Tabled.table.clear()
    assert type(library.mse_loss(input, input.as_subclass(Tabled))) is Tabled


@pytest.mark.parametrize("kind", KINDS)
def test_subclasses_of_torch_dispatch(kind, patched, device):
    """A wrapper of two tensors: torch's own function computes the loss of both."""
    ours, torchs, _ = functions(kind)
    input, target, options = given(kind, device)
    other = torch.randn_like(input)
    leaf = TwoTensor(input, other).requires_grad_()
    loss = ours(leaf, target, **options)
    loss.backward()
    assert type(loss) is TwoTensor and type(leaf.grad) is TwoTensor
    for inside, loss_inside, grad in ((input, loss.a, leaf.grad.a), (other, loss.b, leaf.grad.b)):
        expected_loss, expected_grad, _ = step(torchs, inside, target, torch.ones((), device=device), **options)
        torch.testing.assert_close(loss_inside, expected_loss)
        torch.testing.assert_close(grad, expected_grad)


class Asked(TorchFunctionMode):
    """A mode that records the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Callable] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.functions.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_mode_is_asked(kind, patched, device):
    _, torchs, expected = functions(kind)
    loss = getattr(F if patched else fused, torchs.__name__)
    input, target, options = given(kind, device)
    with Asked() as mode:
        found = loss(input, target, **options)
    assert mode.functions.count(torchs) == 1 and not {fused.cross_entropy, fused.mse_loss} & set(mode.functions)
    torch.testing.assert_close(found, expected(input, target, **options).float())


@pytest.mark.parametrize(
    "mode", [lambda: torch.device("cpu"), torch._C.DisableTorchFunction, torch._C.DisableTorchFunctionSubclass]
)
def test_modes_that_mean_nothing_to_a_loss(mode):
    input, target, _ = given("indices", "cpu")
    with mode():
        assert_step("indices", fused.cross_entropy, input, target)
        assert is_fused(fused.cross_entropy(input.requires_grad_(), target))


# ---- tensors that are not plain numbers in memory ----


def negated(tensor: Tensor) -> Tensor:
    """The same numbers, stored with the other sign and the negative bit, as the imaginary part of a conjugate is."""
    return torch._neg_view(-tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_with_the_negative_bit(kind, device):
    ours, _, _ = functions(kind)
    input, target, options = given(kind, device)

    def of_negated(input: Tensor, target: Tensor, **options) -> Tensor:
        if "weight" in options:
            options["weight"] = negated(options["weight"])
        input, target = negated(input), negated(target) if target.is_floating_point() else target
        assert input.is_neg()
        return ours(input, target, **options)

    assert_step(kind, of_negated, input, target, **options)


LAYOUTS = {
    "sparse": Tensor.to_sparse,
    "csr": Tensor.to_sparse_csr,
    "mkldnn": Tensor.to_mkldnn,
    "zeros": lambda tensor: torch._efficientzerotensor(tensor.shape),
    "nested": lambda tensor: torch.nested.nested_tensor(list(tensor.split([2, 3]))),
    "jagged": lambda tensor: torch.nested.nested_tensor(list(tensor.split([2, 3])), layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore")  # sparse CSR and nested tensors are prototypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_give_what_torch_gives(layout):
    """The value, or the type of the error, is torch's."""
    change, failed = LAYOUTS[layout], []
    input, other = torch.randn(5, CLASSES), torch.rand(5, CLASSES)
    calls: dict[str, tuple[str, tuple]] = {
        "input": ("cross_entropy", (change(input), torch.zeros(5, dtype=torch.int64))),
        "input, probabilities": ("cross_entropy", (change(input), other)),
        "probabilities": ("cross_entropy", (input, change(other))),
        "both": ("cross_entropy", (change(input), change(other))),
        "mse input": ("mse_loss", (change(input), other)),
        "mse target": ("mse_loss", (input, change(other))),
        "mse both": ("mse_loss", (change(input), change(other))),
    }
    for what, (name, arguments) in calls.items():
        found = []
        for library in (fused, F):
            try:
                loss = getattr(library, name)(*arguments)
                found.append((type(loss), loss.to_dense() if loss.layout != torch.strided else loss))
            except Exception as error:
                found.append((type(error), None))
        (ours, mine), (torchs, expected) = found
        if ours is not torchs or (expected is not None and not torch.allclose(mine, expected)):
            failed.append(f"{what}: {found[0]}, torch's {found[1]}")
    assert not failed
