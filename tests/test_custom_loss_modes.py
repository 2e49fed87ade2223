"""Custom losses under TorchScript, torch.fx, torch.compile and autocast, and what their modules do."""

import copy
import io
import itertools
import pickle
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers.custom import CASES, CHOICES, EVERYTHING, TOLERANCE, by_hand, by_torch, drawn, gradients, made
from helpers.draws import DTYPES, REDUCTIONS
from torch import Tensor, nn

import fusedloss
from fusedloss import custom, jit

pytestmark = pytest.mark.usefixtures("custom_loss_folder")


# ---- TorchScript and torch.fx

SCRIPT = pytest.mark.filterwarnings("ignore:.torch.jit.\\w+. is deprecated:DeprecationWarning")


class Model(nn.Module):
    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 7)
        self.criterion = criterion

    def forward(self, x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return self.criterion(self.layer(x), target, weight=weight)


def assert_does_the_same(found: Callable[..., Tensor], criterion: nn.Module, operands: dict[str, Tensor]) -> None:
    ours, expected = found(**operands), criterion(**operands)
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours.double(), expected.double(), **TOLERANCE[ours.dtype])
    upstream = torch.randn(expected.shape).to(expected.dtype)
    both = zip(*(gradients(loss, operands, upstream, allow_unused=True) for loss in (ours, expected)), strict=True)
    for a, b in both:  # the gradient of a mask, or one that a derivative by hand leaves out, is None or 0
        shape_of = next(x for x in (a, b, torch.zeros(())) if x is not None)
        a, b = (torch.zeros_like(shape_of) if x is None else x for x in (a, b))
        torch.testing.assert_close(a.double(), b.double(), **TOLERANCE[a.dtype])


@SCRIPT
@pytest.mark.parametrize("name", CASES)
def test_torchscript(name):
    """A scripted loss is the expression, composed of torch's operations."""
    for reduction in REDUCTIONS:
        scripted = torch.jit.script(made(name, reduction))
        assert "fusedloss::" not in str(scripted.inlined_graph)
        for _ in range(3):  # later calls are compiled for the shapes and types of the first ones
            assert_does_the_same(scripted, made(name, reduction), drawn(name, (7, 11)))


@SCRIPT
def test_torchscript_of_each_function():
    everything = fusedloss.custom_loss(EVERYTHING, which=0)
    scripted = torch.jit.script(everything)
    for number, choice in enumerate(CHOICES):
        everything.which, scripted.parameter_0 = number, float(number)
        input, target = torch.rand(2, 9) + 0.5
        assert torch.equal(scripted(input, target), everything._composed([input, target], [number])), choice


@SCRIPT
def test_torchscript_of_types():
    """Operands are promoted, and widened under autocast, as in Python."""
    criterion = made("squared")
    scripted = torch.jit.script(criterion)
    for dtype, autocast in itertools.product(DTYPES, (False, True)):
        with torch.autocast("cpu", enabled=autocast):
            assert_does_the_same(scripted, criterion, drawn("squared", (5, 8), dtype))
    x, integers, one = torch.randn(6), torch.arange(6), torch.tensor(0.3, dtype=torch.float64)
    for tensors in [(x, integers, integers > 2), (integers,) * 3, (x.half(), one, x.half()), (one, x, x.bfloat16())]:
        given = dict(zip(("input", "target", "weight"), tensors, strict=True))
        assert scripted(**given).dtype == criterion(**given).dtype
        torch.testing.assert_close(scripted(**given), criterion(**given))
    with pytest.raises(RuntimeError, match="missing value for argument 'weight'"):
        scripted(x, x)


@SCRIPT
@pytest.mark.parametrize("make", [lambda: made("squared", "sum"), lambda: by_hand(reduction="sum")], ids=["", "hand"])
def test_torchscript_of_a_model(make):
    """A scripted model can be saved. The original model still computes the same and can be copied."""
    model = Model(make()).double()
    _, target, weight = (x.detach() for x in drawn("squared", (3, 7)).values())
    x = torch.randn(3, 7, dtype=torch.float64)
    loss = model(x, target, weight)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    stored = io.BytesIO()
    torch.jit.save(torch.jit.script(model), stored)
    stored.seek(0)
    for other in (torch.jit.load(stored), model, copy.deepcopy(model)):
        found = other(x, target, weight)
        torch.testing.assert_close(found, loss)
        torch.testing.assert_close(torch.autograd.grad(found, list(other.parameters())), expected)
    assert repr(pickle.loads(pickle.dumps(model.criterion))) == repr(make())


@pytest.mark.parametrize("make", [lambda: made("squared", "none"), lambda: by_hand(reduction="none")], ids=["", "hand"])
def test_fx(make, fresh_compiler):
    """Tracing records a single call, and the graph gives the loss's results however it is run."""
    model, operands = Model(make()).double(), drawn("squared", (3, 7))
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [custom.custom_loss_of]
    given = tuple(operands.values())
    compiled = torch.compile(graph, backend="aot_eager", fullgraph=True)
    for other in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph)), compiled):
        assert_does_the_same(lambda *, _call=other, **_: _call(*given), lambda **_: model(*given), operands)
    criterion = make()
    itself = torch.fx.symbolic_trace(criterion)
    for other in (itself, pickle.loads(pickle.dumps(itself))):
        assert_does_the_same(other, criterion, operands)


def test_fx_of_parameters_and_buffers():
    criterion = made("power", p=2.5)
    constant = torch.randn(9)
    graphs = [torch.fx.symbolic_trace(lambda x: criterion.forward(x, constant)) for criterion.p in (2.5, 1.5)]
    graphs += [torch.fx.symbolic_trace(lambda x: criterion.forward(constant, x))]
    x = torch.randn(9)
    for graph, p in zip(graphs, (2.5, 1.5, 1.5), strict=True):
        torch.testing.assert_close(graph(x), (0.1 + (x - constant).abs()).pow(p).mean())
    unused = made("no target")
    assert torch.equal(torch.fx.symbolic_trace(unused)(x), unused(x))
    with pytest.raises(TypeError, match="has no tensor 'mask'"):
        torch.fx.symbolic_trace(lambda x: criterion.forward(x, constant, mask=x))


# ---- the compiler, autocast, modules


@pytest.mark.parametrize("name", CASES)
def test_compiled(name, fresh_compiler):
    operands = drawn(name, (5, 8), torch.float32)
    for reduction in ("mean", "none"):
        criterion = made(name, reduction)
        expected = criterion(**operands)
        ours = torch.compile(criterion, fullgraph=True, backend="aot_eager")(**operands)
        assert torch.equal(ours, expected)
        upstream = torch.randn(expected.shape)
        for a, b in zip(gradients(ours, operands, upstream), gradients(expected, operands, upstream), strict=True):
            assert torch.equal(a, b)


def test_compiled_with_changes(fresh_compiler):
    """A parameter, sizes and dtypes change after a model was compiled by inductor."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)
            self.criterion = made("power")
            self.weighted = made("squared")

        def forward(self, x, target, weight):
            x = self.layer(x)
            return self.criterion(x, target) + self.weighted(x, target, weight=weight)

    model = Model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for p, rows, dtype in [
        (1.3, 5, torch.float32),
        (2.0, 5, torch.float32),
        (0.7, 9, torch.float64),
        (3.0, 17, torch.float64),
    ]:
        model.to(dtype)
        model.criterion.p = p
        x, target, weight = (
            torch.randn(rows, 6, dtype=dtype),
            torch.randn(rows, 4, dtype=dtype),
            torch.rand(4, dtype=dtype),
        )
        ours, theirs = compiled(x, target, weight), model(x, target, weight)
        torch.testing.assert_close(ours, theirs)
        y = model.layer(x).detach()
        expected = ((0.1 + (y - target).abs()) ** p).mean() + (weight * (y - target) ** 2).mean()
        torch.testing.assert_close(ours.detach(), expected)
        torch.testing.assert_close(
            torch.autograd.grad(ours, model.layer.weight), torch.autograd.grad(theirs, model.layer.weight)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast(dtype, fresh_compiler):
    """The loss is float32, as torch's losses are, and each gradient has the dtype of its tensor."""
    operands = drawn("squared", (70,), dtype)
    wide = {key: x.detach().double().requires_grad_() for key, x in operands.items()}
    criterion = made("squared")
    expected = by_torch("squared", wide, "mean")
    for call in (
        criterion,
        torch.compile(criterion, fullgraph=True, backend="aot_eager"),
        lambda **xs: torch.func.vmap(lambda ys: criterion(**ys))({key: x[None] for key, x in xs.items()})[0],
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = call(**operands)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-7)
        for ours, theirs in zip(gradients(loss, operands), gradients(expected, wide, retain_graph=True), strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), theirs, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_composed_of_torch_in_float32_too(dtype):
    """The 16-bit dtypes cannot hold the square of these values."""
    x, y = torch.full((6,), 300.0, dtype=dtype), torch.zeros(6, dtype=dtype)
    eps = made("charbonnier")
    by_vmap = torch.func.vmap(lambda a, b: eps(a, b))(x.expand(2, -1), y.expand(2, -1))
    assert by_vmap.dtype == dtype and torch.equal(by_vmap, eps(x, y).expand(2))
    x.requires_grad_()
    (first,) = torch.autograd.grad(eps(x, y), x)
    (second,) = torch.autograd.grad(eps(x, y), x, create_graph=True)
    assert first.isfinite().all() and torch.equal(first, second)


def test_parameters():
    """Parameters are attributes that are read at each call. A new value compiles nothing."""
    operands = drawn("power", (50,))
    criterion = made("power")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "compiled", lambda *_: pytest.fail("compiled anew"))
        for p in (1.3, 2, 3.5, torch.tensor(0.5), np.float32(1.5)):
            criterion.p = p
            assert criterion.p == float(p) and isinstance(criterion.p, float)
            torch.testing.assert_close(criterion(**operands), by_torch("power", operands, "mean", p=float(p)))
            torch.testing.assert_close(made("power", p=p)(**operands), criterion(**operands))
    for name in ("expression", "tensors", "derivative"):
        with pytest.raises(AttributeError, match=f"{name} is compiled in"):
            setattr(criterion, name, getattr(criterion, name))
    for bad in ("2", None, True, [1.0], torch.ones(2), 1j, 10**400):
        with pytest.raises(TypeError, match="'p' must be a number"):
            criterion.p = bad
        with pytest.raises(TypeError, match="'p' must be a number"):
            made("power", p=bad)
    with pytest.raises(TypeError, match="'p' would get no gradient"):
        criterion.p = nn.Parameter(torch.tensor(1.0))
    assert criterion.p == 1.5


def test_names(monkeypatch):
    """Names that C++ reserves are accepted, and names that a module has are refused."""
    criterion = fusedloss.custom_loss(
        "input * int + INFINITY * V - default * loss + M_PI",
        tensors=("V", "loss"),
        int=2,
        INFINITY=3,
        default=4,
        M_PI=5,
    )
    x, v, loss = torch.randn(3, 9)
    torch.testing.assert_close(criterion(x, V=v, loss=loss), (x * 2 + 3 * v - 4 * loss + 5).mean())
    monkeypatch.setattr(jit, "compiled", lambda *_: pytest.fail("it was compiled"))
    for name in (
        "training",
        "forward",
        "expression",
        "float",
        "_name",
        "_formula",
        "lambda",
        "input",
        "target",
        "exp",
        "pi",
    ):
        if name == "expression":
            continue  # Python itself refuses it
        with pytest.raises(ValueError, match=f"parameter '{name}' (is|must)"):
            fusedloss.custom_loss(f"input * {name}", **{name: 1.0})
    with pytest.raises(ValueError, match="tensor 'self' cannot be"):
        fusedloss.custom_loss("input * self", tensors=("self",))
    with pytest.raises(TypeError, match="must be a sequence of names, not the str 'abc'"):
        fusedloss.custom_loss("input * abc", tensors="abc")


def test_missing_tensors():
    criterion, (x, y, m) = made("masked"), torch.randn(3, 4)
    for call, says in [
        (lambda: criterion(x, y, weight=x), "needs the tensor 'mask', which is not given"),
        (lambda: criterion(x, weight=x, mask=m), "needs the tensor 'target'"),
        (lambda: criterion(x, y, weight=None, mask=m), "needs the tensor 'weight'"),
        (lambda: criterion(x, y, weight=x, mask=m, var=x), "has no tensor 'var', expected input, target, weight, mask"),
        (lambda: criterion(x, 1.0, weight=x, mask=m), "'target' must be a tensor, got float"),
        (lambda: criterion(None, y, weight=x, mask=m), "needs the tensor 'input'"),
    ]:
        with pytest.raises(TypeError, match=re.escape(says)):
            call()
    unused = made("no target")
    assert torch.equal(unused(x, y), unused(x))  # it can be called like any other loss


def test_module():
    criterion = made("power", "sum")
    criterion.p = 2.5
    x, y = torch.randn(2, 30)
    stored = io.BytesIO()
    torch.save(criterion, stored)
    stored.seek(0)
    copies = [copy.copy(criterion), copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))]
    for other in [*copies, torch.load(stored, weights_only=False)]:
        assert torch.equal(other(x, y), criterion(x, y)) and str(other) == str(criterion)
        other.p = 1.0
    assert criterion.p == 2.5 and not criterion.state_dict() and not list(criterion.parameters())
    assert str(criterion) == "CustomLoss('(0.1 + abs(input - target)) ** p', reduction='sum', p=2.5)"
    model = nn.ModuleDict({"layer": nn.Linear(3, 3), "criterion": criterion}).to(torch.float64).half().eval()
    assert model["criterion"](x.half(), y.half()).dtype == torch.float16
    criterion.reduction = "none"
    assert criterion(x, y).shape == (30,)
    criterion.reduction = "median"
    with pytest.raises(ValueError, match="median"):
        criterion(x, y)
    with pytest.raises(ValueError, match="median"):
        made("power", "median")


def test_training():
    """Training takes the same steps as with torch's own operations."""
    found = []
    for loss in (made("charbonnier"), lambda i, t: by_torch("charbonnier", {"input": i, "target": t}, "mean")):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        x = torch.randn(64, 4, dtype=torch.float64)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            value = loss(model(x), x.sum(1, keepdim=True))
            value.backward()
            optimizer.step()
            losses.append(value.item())
        found.append(losses)
    assert found[0][-1] < found[0][0] / 4
    assert found[0] == pytest.approx(found[1], rel=1e-9)
