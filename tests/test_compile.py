"""The losses under torch.compile: values, dtypes, sizes, options and errors."""

import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.draws import REDUCTIONS
from helpers.graphs import (
    CE,
    CE_BACKWARD,
    CLASSES,
    KINDS,
    LAYOUTS,
    MSE,
    MSE_BACKWARD,
    OLD,
    assert_same_gradients,
    assert_step,
    batch,
    doubled,
    functions,
    given,
    losses_in,
    models,
    step,
    target_for,
)
from helpers.oracle import assert_exact
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend
from torch.overrides import TorchFunctionMode

import fusedloss.functional as fused
from fusedloss import reference

pytestmark = pytest.mark.usefixtures("fresh_compiler")


# ---- torch.compile ----


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_is_eager_bitwise(kind, reduction, device):
    ours, _ = functions(kind)
    input, target, options = given(kind, device)
    compiled = torch.compile(doubled(ours), backend="aot_eager", fullgraph=True)
    assert_step(kind, compiled, input, target, reduction=reduction, **options)
    # loss.backward() sends a gradient of 1. After one of 1, eager forward passes on the CPU compute the gradient too.
    fused.cross_entropy(torch.zeros(1, 2, requires_grad=True), torch.zeros(1, dtype=torch.int64)).backward()
    ones = torch.ones_like(ours(input, target, reduction=reduction, **options))
    (loss, grad, _), (eager_loss, eager_grad, _) = (
        step(function, input, target, ones, reduction=reduction, **options) for function in (compiled, doubled(ours))
    )
    assert torch.equal(loss, eager_loss) and torch.equal(grad, eager_grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_in_other_dtypes(kind, dtype, device):
    ours, _ = functions(kind)
    input, target, options = given(kind, device, 2, CLASSES, 3, dtype=dtype)
    compiled = torch.compile(doubled(ours), backend="aot_eager", fullgraph=True)
    assert_step(kind, compiled, input, target, reduction="none", **options)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_compiled_with_class_indices_of_any_integer_type(dtype, device):
    input, target, _ = given("indices", device)
    recorded = AotEagerAndRecordGraphs()
    compiled = torch.compile(doubled(fused.cross_entropy), backend=recorded, fullgraph=True)
    assert_step("indices", compiled, input, target.to(dtype))
    assert losses_in(*recorded.fw_graphs) == {CE}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inductor(dtype, device):
    """All kinds are in one graph, with logits in several layouts, since compiling takes seconds."""
    if device == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("inductor needs a C++ compiler")
    layouts = ["2-D", "transposed", "channels last", "a stride over the classes"]
    cases = []
    for kind, layout, reduction in zip(KINDS, layouts, ["mean", "none", "sum", "none"], strict=True):
        input = LAYOUTS[layout](dtype=dtype, device=device)
        target, options = target_for(kind, input)
        cases.append((kind, input, target, {"reduction": reduction, **options}))

    def all_losses(inputs: list[Tensor], targets: list[Tensor], weights: list[Tensor | None]) -> list[Tensor]:
        return [
            doubled(functions(kind)[0])(x, t, **({**options, "weight": w} if "weight" in options else options))
            for (kind, _, _, options), x, t, w in zip(cases, inputs, targets, weights, strict=True)
        ]

    def run(function: Callable) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        inputs = [input.detach().requires_grad_() for _, input, _, _ in cases]
        losses = function(inputs, [case[2] for case in cases], [case[3].get("weight") for case in cases])
        return losses, torch.autograd.grad(
            losses, inputs, [upstream.to(loss.dtype) for upstream, loss in zip(upstreams, losses, strict=True)]
        )

    upstreams = [
        torch.randn_like(loss)
        for loss in all_losses([c[1] for c in cases], [c[2] for c in cases], [c[3].get("weight") for c in cases])
    ]
    compiled, eager = run(torch.compile(all_losses, backend="inductor", fullgraph=True)), run(all_losses)
    for mine, same in zip(compiled[0] + list(compiled[1]), eager[0] + list(eager[1]), strict=True):
        # An older inductor changes the layout of the logits, and the sums of rows and of columns differ in order.
        assert mine.dtype == same.dtype and (OLD or torch.equal(mine, same))
    for (kind, input, target, options), loss, grad, upstream in zip(cases, *compiled, upstreams, strict=True):
        exact_loss, exact_grad, _ = step(doubled(functions(kind)[1]), input.double(), target, upstream, **options)
        assert_exact(loss, exact_loss, scale=max(1.0, exact_loss.abs().sum().item()), what=f"{kind}: loss")
        assert_exact(
            grad, exact_grad, scale=8 * max(1.0, upstream.double().abs().max().item()), what=f"{kind}: gradient"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_graphs_hold_the_fused_ops(kind, device):
    ours, _ = functions(kind)
    input, target, options = given(kind, device)
    recorded = AotEagerAndRecordGraphs()
    step(torch.compile(ours, backend=recorded, fullgraph=True), input, target, **options)
    assert losses_in(*recorded.fw_graphs) == {MSE if kind == "mse" else CE}
    assert losses_in(*recorded.bw_graphs) == {MSE_BACKWARD if kind == "mse" else CE_BACKWARD}


@pytest.mark.parametrize("kind", KINDS)
def test_one_compilation_serves_every_batch_size(kind, device):
    ours, _ = functions(kind)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(doubled(ours), backend=counter, fullgraph=True, dynamic=True)
    for reduction in ("mean", "none"):
        frames = []
        for rows, classes in ((5, 7), (9, 7), (33, 4), (2, 70)):
            input, target, options = given(kind, device, rows, classes)
            assert_step(kind, compiled, input, target, reduction=reduction, **options)
            frames.append(counter.frame_count)
        assert frames[0] == frames[-1]
    # The compiler specializes on sizes 0 and 1. Their results must be right as well.
    for rows in (1, 0):
        input, target, options = given(kind, device, rows, CLASSES)
        if rows > 0 and kind == "smoothed":
            target.fill_(0)
        assert_step(kind, compiled, input, target, reduction="sum", **options)


def test_a_changed_batch_size_compiles_once_more(device):
    """Without dynamic=True, the second size makes the graph dynamic, and the third one reuses it."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(doubled(fused.cross_entropy), backend=counter, fullgraph=True)
    for rows in (5, 9, 33, 12):
        input, target, options = given("smoothed", device, rows, CLASSES)
        assert_step("smoothed", compiled, input, target, **options)
    assert counter.frame_count == 2


def test_an_argument_that_changes_compiles_again(device):
    """A traced graph is valid for its options only."""
    compiled = torch.compile(doubled(fused.cross_entropy), backend="aot_eager", fullgraph=True)
    input, target, _ = given("indices", device)
    target[0] = 3
    for options in (
        {},
        {"ignore_index": 3},
        {"label_smoothing": 0.1},
        {"reduction": "sum"},
        {"weight": torch.rand(CLASSES, device=device)},
    ):
        assert_step("indices", compiled, input, target, **options)
    assert_step("probabilities", compiled, input, torch.rand_like(input))


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("kind", ["indices", "mse"])
def test_autocast(kind, inside, device):
    ours, _ = functions(kind)
    input, target, _ = given(kind, device, dtype=torch.bfloat16)

    def under_autocast(input: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return ours(input * 2, target)

    if inside:
        compiled = torch.compile(under_autocast, backend="aot_eager", fullgraph=True)
    else:
        whole = torch.compile(doubled(ours), backend="aot_eager", fullgraph=True)
        assert step(whole, input, target)[0].dtype == torch.bfloat16  # compile without autocast first

        def compiled(input: Tensor, target: Tensor) -> Tensor:
            with torch.autocast(device, dtype=torch.bfloat16):
                return whole(input, target)

    loss, grad, upstream = step(compiled, input, target)
    eager_loss, eager_grad, _ = step(under_autocast, input, target, upstream)
    assert loss.dtype == torch.float32 and grad.dtype == torch.bfloat16
    assert torch.equal(loss, eager_loss) and torch.equal(grad, eager_grad)
    exact_loss, exact_grad, _ = step(doubled(functions(kind)[1]), input.double(), target, upstream)
    assert_exact(loss, exact_loss, what="loss")
    assert_exact(grad, exact_grad, scale=8 * max(1.0, upstream.abs().item()), what="gradient")


def test_modules(device):
    ours, torchs = models(device)
    recorded = AotEagerAndRecordGraphs()
    compiled = torch.compile(ours, backend=recorded, fullgraph=True)
    arguments = batch(device)
    loss, expected = compiled(*arguments), torchs(*arguments)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert_same_gradients(ours, torchs)
    assert losses_in(*recorded.fw_graphs) == {CE, MSE}
    assert losses_in(*recorded.bw_graphs) == {CE_BACKWARD, MSE_BACKWARD}


def rows_of(*shape: int) -> Tensor:
    return torch.randn(shape)


INDICES = torch.zeros(5, dtype=torch.int64)
# Input, target, weight, torch's message, and the message of these losses.
REFUSED = {
    "batch": (
        rows_of(5, 7),
        INDICES[:3],
        None,
        "Expected input batch_size",
        r"target must have shape \[5\], got \[3\]",
    ),
    "float indices": (rows_of(5, 7), torch.zeros(5), None, "(?i)expected", "(?i)expected"),
    "spatial size": (
        rows_of(5, 7, 2),
        torch.zeros(5, 3, dtype=torch.int64),
        None,
        "Expected target size",
        r"target must have shape \[5, 2\], got \[5, 3\]",
    ),
    "weight size": (rows_of(5, 7), INDICES, torch.ones(3), "all 7 classes", "weight must have 7 elements, got 3"),
    "weight dtype": (rows_of(5, 7), INDICES, torch.ones(7).double(), *["expected scalar type"] * 2),
    "weight requires grad": (rows_of(5, 7), INDICES, torch.ones(7, requires_grad=True), *["not differentiable"] * 2),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_torch_refuses_is_refused(what):
    """Compiling raises an error of the same type as torch's."""
    *arguments, says, said_here = REFUSED[what]
    raised = []
    for loss, words in ((fused.cross_entropy, said_here), (F.cross_entropy, says)):
        compiled = torch.compile(lambda *arguments, loss=loss: loss(*arguments), backend="aot_eager", fullgraph=True)
        with pytest.raises(Exception, match=words) as error:
            compiled(*arguments)
        raised.append(error.type)
    assert raised[0] is raised[1]


@pytest.mark.parametrize("kind", ["indices", "mse"])
def test_an_unknown_reduction(kind, device):
    input, target, _ = given(kind, device)
    with pytest.raises(Exception, match="average is not a valid value for reduction"):
        torch.compile(functions(kind)[0], backend="aot_eager", fullgraph=True)(input, target, reduction="average")


@pytest.mark.parametrize("kind", ["indices", "smoothed"])
def test_a_class_index_out_of_range(kind):
    """This runs on the CPU only: on CUDA it is a device-side assertion, after which no other test could run."""
    input, target, options = given(kind, "cpu")
    target[3] = CLASSES
    compiled = torch.compile(fused.cross_entropy, backend="aot_eager", fullgraph=True)
    with pytest.raises(IndexError, match=r"target\[3\] is 7, expected a class index in \[0, 7\)"):
        compiled(input, target, **options)
    target[3] = 0
    assert_exact(compiled(input, target, **options), reference.cross_entropy(input, target, **options))


def test_mse_that_broadcasts_or_promotes(device):
    """Such calls use torch's own loss."""
    input = torch.randn(5, CLASSES, device=device, requires_grad=True)
    for target in (torch.randn(CLASSES, device=device), torch.randn(5, CLASSES, device=device).bfloat16()):
        recorded = AotEagerAndRecordGraphs()
        compiled = torch.compile(fused.mse_loss, backend=recorded, fullgraph=True)
        with pytest.warns(UserWarning, match="target size") if target.dim() == 1 else torch.no_grad():
            torch.testing.assert_close(compiled(input, target), (input - target).pow(2).mean())
        assert "fusedloss" not in str(losses_in(*recorded.fw_graphs))
        torch._dynamo.reset()


def filtered(loss: Callable[..., Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    return loss(logits[labels != 2], labels[labels != 2])


def sliced(loss: Callable[..., Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    return loss(logits[: int((labels != 2).sum())], labels[: int((labels != 2).sum())], reduction="sum")


def some_classes(loss: Callable[..., Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    return loss(logits[:, (logits.detach().sum(0) < 1e9).nonzero().squeeze(1)], labels)


@pytest.mark.parametrize("model", [filtered, sliced, some_classes])
def test_sizes_that_only_the_run_knows(model, device):
    """Sizes of masked tokens are known at run time only. The compiler need not prove that both sizes are equal."""
    logits = torch.randn(9, CLASSES, device=device)
    labels = torch.tensor([0, 2, 6, 2, 1, 3, 2, 0, 5], device=device)

    def run(loss: Callable[..., Tensor], backend) -> tuple[Tensor, Tensor]:
        torch._dynamo.reset()
        return step(
            torch.compile(lambda x, t: model(loss, x, t), backend=backend, fullgraph=True),
            logits,
            labels,
            torch.ones((), device=device),
        )[:2]

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        try:
            expected = run(F.cross_entropy, "aot_eager")
        except Exception as error:
            pytest.skip(f"torch {torch.__version__} does not compile its own: {type(error).__name__}")
        recorded = AotEagerAndRecordGraphs()
        found = run(fused.cross_entropy, recorded)
    torch.testing.assert_close(found, expected)
    assert losses_in(*recorded.fw_graphs) == {CE}


class Counting(TorchFunctionMode):
    """A mode that multiplies the results of torch's losses by 10."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result * 10 if function in (F.cross_entropy, F.mse_loss) else result


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("kind", ["indices", "mse"])
def test_a_function_mode_sees_torchs_function(kind, inside, device):
    input, target, _ = given(kind, device)
    ours, expected = functions(kind)

    def under_mode(input: Tensor, target: Tensor) -> Tensor:
        with Counting():
            return ours(input, target)

    if inside:
        loss = torch.compile(under_mode, backend="aot_eager", fullgraph=True)(input, target)
    else:
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        with Counting():
            loss = compiled(input, target)
    assert_exact(loss, 10 * expected(input, target), scale=100)
