"""The losses under torch.export, make_fx and the other tracers."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.graphs import (
    CE,
    CE_BACKWARD,
    CLASSES,
    KINDS,
    MSE,
    MSE_BACKWARD,
    batch,
    functions,
    given,
    losses_in,
    models,
    step,
)
from helpers.oracle import assert_exact
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch.fx.experimental.proxy_tensor import make_fx

import fusedloss
import fusedloss.functional as fused
from fusedloss import reference

pytestmark = pytest.mark.usefixtures("fresh_compiler")


# ---- torch.export ----


def exported(model: nn.Module, device: str, strict: bool) -> torch.export.ExportedProgram:
    rows = torch.export.Dim("rows", min=2, max=1000)
    return torch.export.export(model, batch(device), dynamic_shapes=({0: rows},) * 3, strict=strict)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_export(strict, device):
    ours, torchs = models(device)
    program = exported(ours, device, strict)
    assert losses_in(program.graph_module) == {CE, MSE}
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    decomposed = program.run_decompositions()
    assert losses_in(loaded.graph_module) == losses_in(decomposed.graph_module) == {CE, MSE}
    for rows in (5, 2, 31):  # the model was exported with the first
        arguments = batch(device, rows)
        for form in (program, loaded, decomposed):
            with torch.no_grad():
                loss, eager = form.module()(*arguments), ours(*arguments)
            torch.testing.assert_close(loss, torchs(*arguments).detach())
            assert torch.equal(loss, eager)


def test_an_exported_program_needs_the_import(tmp_path):
    ours, _ = models("cpu")
    torch.export.save(exported(ours, "cpu", strict=False), tmp_path / "program.pt2")
    code = """if True:
        import sys, torch
        try:
            torch.export.load("program.pt2")
        except Exception:
            import fusedloss
            torch.export.load("program.pt2")
            print("needed")
    """
    root = str(Path(fusedloss.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "needed\n", done.stderr


@pytest.mark.parametrize("kind", ["probabilities", "smoothed"])
def test_export_of_the_options(kind, device):
    """Options that the test of the modules does not cover: losses of rows, probabilities and ignored rows."""

    class PerRow(nn.Module):
        def forward(self, input: Tensor, target: Tensor, options: dict[str, Tensor]) -> Tensor:
            return fused.cross_entropy(
                input, target, reduction="none", ignore_index=-1 if kind == "probabilities" else 1, **options
            )

    input, target, options = given(kind, device, 3, CLASSES, 4)
    weight = {"weight": options["weight"]}
    program = torch.export.export(PerRow(), (input, target, weight))
    assert losses_in(program.graph_module) == {CE}
    loss = program.module()(input, target, weight)
    kept = {"ignore_index": 1} if kind == "smoothed" else {}
    assert_exact(loss, reference.cross_entropy(input, target, reduction="none", **weight, **kept))


@pytest.mark.parametrize("traced_under, run_under", [(False, True), (True, False)], ids=["only run", "only traced"])
@pytest.mark.parametrize("kind", ["indices", "mse"])
def test_an_exported_graph_follows_autocast_as_torchs_does(kind, traced_under, run_under, device):
    input, target, _ = given(kind, device, dtype=torch.bfloat16)

    class Of(nn.Module):
        def __init__(self, loss: Callable[..., Tensor]) -> None:
            super().__init__()
            self.loss = loss

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return self.loss(input, target)

    dtypes = []
    for loss in (functions(kind)[0], getattr(F, functions(kind)[0].__name__)):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=traced_under):
            program = torch.export.export(Of(loss), (input, target))
        with torch.autocast(device, dtype=torch.bfloat16, enabled=run_under):
            dtypes.append(program.module()(input, target).dtype)
    assert dtypes[0] == dtypes[1]


def test_an_exported_model_trains(device):
    """Gradients pass through the ops of an exported graph."""
    ours, torchs = models(device)
    module = exported(ours, device, strict=False).module()
    arguments = batch(device, 8)
    module(*arguments).backward()
    torchs(*arguments).backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert grads.keys() == dict(torchs.named_parameters()).keys()
    for name, parameter in torchs.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)


# ---- make_fx ----


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("kind", KINDS)
def test_make_fx(kind, mode, device):
    ours, expected = functions(kind)
    forward, backward = (MSE, MSE_BACKWARD) if kind == "mse" else (CE, CE_BACKWARD)
    input, target, options = given(kind, device)
    tensors = {name: options.pop(name) for name in list(options) if name == "weight"}

    def forward_of(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, t, tensors: loss(x, t, reduction="none", **options, **tensors)

    def gradient_of(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def gradient(input: Tensor, target: Tensor, tensors: dict[str, Tensor]) -> Tensor:
            leaf = input.detach().requires_grad_()
            return torch.autograd.grad(forward_of(loss)(leaf, target, tensors).sum(), leaf)[0]

        return gradient

    loss = make_fx(forward_of(ours), tracing_mode=mode)(input, target, tensors)
    assert losses_in(loss) == {forward}
    gradient = make_fx(gradient_of(ours), tracing_mode=mode)(input, target, tensors)
    assert losses_in(gradient) == {forward, backward}
    for rows in (5, 11) if mode == "symbolic" else (5,):  # with other values than those of the tracing
        input, target, _ = given(kind, device, rows, CLASSES)
        assert_exact(loss(input, target, tensors), forward_of(expected)(input, target, tensors), what="loss")
        exact = gradient_of(expected)(input, target, tensors)
        assert_exact(gradient(input, target, tensors), exact, scale=8, what="gradient")


def test_make_fx_before_the_dispatcher(device):
    """Traced before the dispatcher, as torch.export does."""
    input, target, options = given("smoothed", device)
    graph = make_fx(lambda x, t: fused.cross_entropy(x, t, **options), pre_dispatch=True)(input, target)
    assert losses_in(graph) == {CE}
    assert_exact(graph(input, target), reference.cross_entropy(input, target, **options))


@pytest.mark.parametrize("kind", ["indices", "mse"])
def test_forward_and_backward_traced_at_once(kind, device):
    """AOTAutograd alone traces, with functional tensors."""
    input, target, _ = given(kind, device)
    ours, _ = functions(kind)
    graph = aot_export_joint_simple(
        lambda x, t: (ours(x, t, reduction="sum"),), (input.requires_grad_(), target), trace_joint=True
    )
    assert losses_in(graph) == ({MSE, MSE_BACKWARD} if kind == "mse" else {CE, CE_BACKWARD})
    traced = (input.detach(), target), (torch.tensor(3.0, device=device),)
    found = [result for results in graph(*traced) for result in results if result is not None]
    expected = step(functions(kind)[1], input, target, traced[1][0], reduction="sum")
    torch.testing.assert_close(found, [result.float() for result in expected[:2]])


def test_make_fx_of_functorch(device):
    """The traced graph has torch's own function, as in every transform."""
    input, target, _ = given("indices", device)
    graph = make_fx(torch.func.grad(lambda x: fused.cross_entropy(x, target)))(input)
    assert "fusedloss" not in str(losses_in(graph))
    torch.testing.assert_close(graph(input), torch.func.grad(lambda x: F.cross_entropy(x, target))(input))


def test_fx_symbolic_trace():
    """Proxies are not tensors, so the call of torch's function is recorded."""
    ours, torchs = models("cpu")
    graph = torch.fx.symbolic_trace(ours)
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert F.cross_entropy in called and F.mse_loss in called
    arguments = batch("cpu")
    torch.testing.assert_close(graph(*arguments), torchs(*arguments))


@pytest.mark.parametrize("kind", ["indices", "mse"])
def test_functionalize(kind, device):
    input, target, _ = given(kind, device)
    ours, _ = functions(kind)
    torch.testing.assert_close(torch.func.functionalize(ours)(input, target), getattr(F, ours.__name__)(input, target))


@pytest.mark.parametrize(
    "ours",
    [fusedloss.CrossEntropyLoss(label_smoothing=0.1, reduction="sum"), fusedloss.MSELoss()],
    ids=["cross_entropy", "mse"],
)
def test_jit_trace(ours, device):
    """Torch's own function is traced, and the trace works for other sizes."""
    kind = "mse" if isinstance(ours, nn.MSELoss) else "indices"
    torchs = nn.MSELoss() if kind == "mse" else nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum")
    traced = torch.jit.trace(ours, given(kind, device)[:2])
    assert "fusedloss::" not in str(traced.inlined_graph)
    for rows in (5, 11):
        input, target, _ = given(kind, device, rows, CLASSES)
        loss, grad, upstream = step(traced, input, target)
        expected_loss, expected_grad, _ = step(torchs, input, target, upstream)
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(grad, expected_grad)
