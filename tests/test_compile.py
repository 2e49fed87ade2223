"""The losses seen by the compiler and its kin: torch.compile, export, make_fx, fake tensors, dispatch modes.

Values are compared with the float64 reference, and bitwise with the eager call: it is the same kernel.
"""

import copy
import io
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from conftest import SEED
from oracle import assert_exact
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fusedloss
import fusedloss.functional as fused
from fusedloss import reference
from fusedloss._build import release

REDUCTIONS = ["none", "mean", "sum"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
CLASSES = 7
OLD = release(torch.__version__) < (2, 13)
CE, CE_BACKWARD = "fusedloss.cross_entropy_forward", "fusedloss.cross_entropy_backward"
MSE, MSE_BACKWARD = "fusedloss.mse_loss_forward", "fusedloss.mse_loss_backward"


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- arguments, and what becomes of them ----

KINDS = ["indices", "smoothed", "probabilities", "mse"]


def functions(kind: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The fused loss and the reference."""
    name = "mse_loss" if kind == "mse" else "cross_entropy"
    return getattr(fused, name), getattr(reference, name)


def target_for(kind: str, input: Tensor) -> tuple[Tensor, dict]:
    """A target of this kind, and the options that belong to it."""
    if kind == "mse":
        return torch.randn_like(input), {}
    class_dim = min(1, input.dim() - 1)
    if kind == "probabilities":
        weight = torch.rand(input.shape[class_dim], dtype=input.dtype, device=input.device)
        return torch.randn_like(input).softmax(class_dim), {"weight": weight, "label_smoothing": 0.2}
    rows = input.shape[:class_dim] + input.shape[class_dim + 1 :]
    target = torch.randint(0, input.shape[class_dim], rows, device=input.device)
    if kind == "indices":
        return target, {}
    if target.numel() > 0:
        target.view(-1)[-1] = 1  # ignored
        target.view(-1)[0] = 0  # not ignored
    weight = torch.rand(input.shape[class_dim], dtype=input.dtype, device=input.device) + 0.1
    return target, {"weight": weight, "ignore_index": 1, "label_smoothing": 0.1}


def given(kind: str, device: str, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, dict]:
    """An input, a target and options."""
    input = torch.randn(shape or (5, CLASSES), dtype=dtype, device=device)
    return input, *target_for(kind, input)


def doubled(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss of logits that were computed. Twice a float is exact in every dtype, and so is the gradient's double."""

    def of_doubled(input: Tensor, target: Tensor, **options) -> Tensor:
        return loss(input * 2, target, **options)

    return of_doubled


def step(loss: Callable[..., Tensor], input: Tensor, target: Tensor, upstream: Tensor | None = None, **options):
    """loss, its gradient, and the upstream gradient that was drawn for it."""
    leaf = input.detach().requires_grad_()
    value = loss(leaf, target, **options)
    upstream = torch.randn_like(value) if upstream is None else upstream.to(value.dtype)
    return value.detach(), *torch.autograd.grad(value, leaf, upstream), upstream


def assert_step(kind: str, compiled: Callable[..., Tensor], input: Tensor, target: Tensor, **options) -> None:
    """One step of `compiled`, which is to be `doubled(...)`: bitwise the eager one's, and that of the reference."""
    ours, expected = functions(kind)
    loss, grad, upstream = step(compiled, input, target, **options)
    eager_loss, eager_grad, _ = step(doubled(ours), input, target, upstream, **options)
    assert torch.equal(loss, eager_loss) and torch.equal(grad, eager_grad)
    assert (loss.dtype, loss.shape, loss.device) == (eager_loss.dtype, eager_loss.shape, eager_loss.device)
    assert grad.stride() == eager_grad.stride()
    exact_loss, exact_grad, _ = step(doubled(expected), input.double(), target, upstream, **options)
    assert_exact(loss, exact_loss, scale=max(1.0, exact_loss.abs().sum().item()), what="loss")
    # A gradient is a difference of numbers of this size at most.
    assert_exact(grad, exact_grad, scale=8 * max(1.0, upstream.double().abs().max().item()), what="gradient")


def losses_in(*graphs: torch.fx.GraphModule) -> set[str]:
    """The ops in these graphs that compute a loss, ours or torch's."""
    modules = (module for graph in graphs for module in graph.modules() if isinstance(module, torch.fx.GraphModule))
    names = (str(node.target) for module in modules for node in module.graph.nodes if node.op == "call_function")
    return set(filter(is_loss, (name.removesuffix(".default") for name in names)))


def is_loss(name: str) -> bool:
    return any(part in name for part in ("fusedloss", "log_softmax", "nll_loss", "cross_entropy", "mse_loss"))


# ---- opcheck: schema, fake kernel, autograd and AOT dispatch of each op ----

LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "2-D": lambda **o: torch.randn(5, CLASSES, **o),
    "transposed": lambda **o: torch.randn(CLASSES, 5, **o).t(),
    "K-dim": lambda **o: torch.randn(2, CLASSES, 3, 4, **o),
    "channels last": lambda **o: torch.randn(2, CLASSES, 3, 4, **o).to(memory_format=torch.channels_last),
    "spatial strides that do not collapse": lambda **o: torch.randn(2, CLASSES, 4, 3, **o).transpose(2, 3),
    "a stride over the classes": lambda **o: torch.randn(5, 2 * CLASSES, **o)[:, ::2],
    "sliced rows": lambda **o: torch.randn(5, CLASSES + 4, **o)[:, 2:-2],
    "1-D": lambda **o: torch.randn(CLASSES, **o),
    "expanded": lambda **o: torch.randn(1, CLASSES, **o).expand(5, CLASSES),
    "one row": lambda **o: torch.randn(1, CLASSES, **o),
}


def samples(device: str, layouts: list[str], passes: int = 1) -> Iterator[tuple[str, Tensor, str, int, bool]]:
    """(what, input, kind of target, reduction, autocast): each layout, and within a few samples each of the others.

    Which of them meet is another from run to run.
    """
    for i in range(passes * len(layouts)):
        j = i + SEED
        layout, dtype = layouts[i % len(layouts)], DTYPES[(j + i // len(layouts)) % 4]
        kind, reduction, autocast = KINDS[(j + j // 4) % 3], (j + j // 3) % 3, (j + j // 2) % 2 == 1
        what = f"{layout}, {dtype}, {kind}, reduction {reduction}, autocast {autocast}"
        yield what, LAYOUTS[layout](dtype=dtype, device=device).requires_grad_(), kind, reduction, autocast


def cross_entropy_arguments(input: Tensor, kind: str, reduction: int) -> tuple:
    target, options = target_for(kind, input.detach())
    if kind == "indices" and reduction == 0:
        target = target.to(torch.int32)
    weight, ignore_index, smoothing = (
        options.get(n, d) for n, d in (("weight", None), ("ignore_index", -100), ("label_smoothing", 0.0))
    )
    return input, target, weight, reduction, ignore_index, smoothing


def cross_entropy_forward_samples(device: str):
    for what, input, kind, reduction, autocast in samples(device, list(LAYOUTS), passes=2):
        yield what, (*cross_entropy_arguments(input, kind, reduction), autocast)


def cross_entropy_backward_samples(device: str):
    for what, input, kind, reduction, autocast in samples(device, list(LAYOUTS)):
        arguments = cross_entropy_arguments(input, kind, reduction)
        loss, statistics = torch.ops.fusedloss.cross_entropy_forward(
            *(a.detach() if isinstance(a, Tensor) else a for a in arguments), autocast
        )
        input, target, weight, *options = arguments
        yield what, (torch.randn_like(loss).requires_grad_(), input, target, weight, statistics, *options)


def mse_loss_forward_samples(device: str):
    for what, input, _, reduction, autocast in samples(device, list(LAYOUTS)):
        target = torch.randn_like(input).requires_grad_(reduction != 1)
        yield what, (input, target, reduction, autocast)
        yield what + ", contiguous target", (input, target.detach().contiguous(), reduction, autocast)


def mse_loss_backward_samples(device: str):
    for what, input, _, reduction, autocast in samples(device, list(LAYOUTS)):
        target = torch.randn_like(input).requires_grad_(reduction != 1)
        loss = torch.ops.fusedloss.mse_loss_forward(input.detach(), target.detach(), reduction, autocast)
        yield what, (torch.randn_like(loss).requires_grad_(), input, target, reduction)


SAMPLES = {
    "cross_entropy_forward": cross_entropy_forward_samples,
    "cross_entropy_backward": cross_entropy_backward_samples,
    "mse_loss_forward": mse_loss_forward_samples,
    "mse_loss_backward": mse_loss_backward_samples,
}
REGISTERED = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fusedloss::"))


def test_every_registered_op_has_samples():
    assert sorted(f"fusedloss::{name}" for name in SAMPLES) == REGISTERED


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", REGISTERED)
def test_opcheck(name, device):
    name = name.removeprefix("fusedloss::")
    op = getattr(torch.ops.fusedloss, name).default
    for what, arguments in SAMPLES[name](device):
        # An older torch does not trace its own loss of probabilities, the second derivative, for dynamic sizes.
        composes = OLD and name == "cross_entropy_backward"
        try:
            torch.library.opcheck(op, arguments, test_utils=CHECKS[:-1] if composes else CHECKS)
        except Exception as error:
            raise AssertionError(f"{name}: {what}") from error


# ---- torch.compile ----


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_is_eager_bitwise(kind, reduction, device):
    ours, _ = functions(kind)
    input, target, options = given(kind, device)
    compiled = torch.compile(doubled(ours), backend="aot_eager", fullgraph=True)
    assert_step(kind, compiled, input, target, reduction=reduction, **options)
    # A gradient of 1 is what loss.backward() sends. After one, eager forward passes on the CPU compute it at once.
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
    """All kinds in one graph, of logits in several layouts: compiling takes seconds."""
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
        # An older inductor lays out the logits anew, and rows are not added up as columns are.
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
    # The compiler has sizes 0 and 1 to itself. They are right as well.
    for rows in (1, 0):
        input, target, options = given(kind, device, rows, CLASSES)
        if rows > 0 and kind == "smoothed":
            target.fill_(0)
        assert_step(kind, compiled, input, target, reduction="sum", **options)


def test_a_changed_batch_size_compiles_once_more(device):
    """Without dynamic=True: the second size makes the graph dynamic, the third finds it so."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(doubled(fused.cross_entropy), backend=counter, fullgraph=True)
    for rows in (5, 9, 33, 12):
        input, target, options = given("smoothed", device, rows, CLASSES)
        assert_step("smoothed", compiled, input, target, **options)
    assert counter.frame_count == 2


def test_an_argument_that_changes_compiles_again(device):
    """What was traced holds for its options only."""
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
        assert step(whole, input, target)[0].dtype == torch.bfloat16  # compiled without autocast first

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


class Model(nn.Module):
    """Both losses behind a layer; with torch's modules or with these."""

    def __init__(self, library, device: str) -> None:
        super().__init__()
        self.layer = nn.Linear(6, CLASSES, device=device)
        weight = torch.linspace(0.5, 1.5, CLASSES, device=device)
        self.cross_entropy = library.CrossEntropyLoss(weight=weight, label_smoothing=0.1)
        self.mse = library.MSELoss(reduction="sum")

    def forward(self, features: Tensor, target: Tensor, values: Tensor) -> Tensor:
        logits = self.layer(features)
        return self.cross_entropy(logits, target) + 0.25 * self.mse(logits, values)


def models(device: str) -> tuple[Model, Model]:
    """Ours and torch's, with the same parameters."""
    ours, torchs = Model(fusedloss, device), Model(nn, device)
    ours.load_state_dict(torchs.state_dict())
    return ours, torchs


def batch(device: str, rows: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Features, class indices and values for `Model`."""
    target = torch.randint(0, CLASSES, (rows,), device=device)
    return torch.randn(rows, 6, device=device), target, torch.randn(rows, CLASSES, device=device)


def assert_same_gradients(ours: nn.Module, torchs: nn.Module) -> None:
    for (name, mine), theirs in zip(ours.named_parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")


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
# input, target, weight, what torch says to it, and what is said here
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
    """While it is compiled, by an error of the same type."""
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
    """On CUDA it is a device-side assertion, after which no other test could run."""
    input, target, options = given(kind, "cpu")
    target[3] = CLASSES
    compiled = torch.compile(fused.cross_entropy, backend="aot_eager", fullgraph=True)
    with pytest.raises(IndexError, match=r"target\[3\] is 7, expected a class index in \[0, 7\)"):
        compiled(input, target, **options)
    target[3] = 0
    assert_exact(compiled(input, target, **options), reference.cross_entropy(input, target, **options))


def test_mse_that_broadcasts_or_promotes(device):
    """Left to torch, as any mixture of dtypes is."""
    input = torch.randn(5, CLASSES, device=device, requires_grad=True)
    for target in (torch.randn(CLASSES, device=device), torch.randn(5, CLASSES, device=device).bfloat16()):
        recorded = AotEagerAndRecordGraphs()
        compiled = torch.compile(fused.mse_loss, backend=recorded, fullgraph=True)
        with pytest.warns(UserWarning, match="target size") if target.dim() == 1 else torch.no_grad():
            torch.testing.assert_close(compiled(input, target), (input - target).pow(2).mean())
        assert "fusedloss" not in str(losses_in(*recorded.fw_graphs))
        torch._dynamo.reset()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_probabilities_and_their_weights_that_require_grad(reduction, device):
    """Composed: the kernels have no gradient for these."""
    tensors = [
        torch.rand(5, CLASSES, device=device),
        torch.rand(5, CLASSES, device=device),
        torch.rand(CLASSES, device=device),
    ]
    compiled = torch.compile(fused.cross_entropy, backend="aot_eager", fullgraph=True)
    for required in ((True, True, False), (True, False, True), (False, True, True)):
        results = []
        for loss in (compiled, reference.cross_entropy):
            leaves = [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(tensors, required, strict=True)]
            value = loss(*leaves, reduction=reduction, label_smoothing=0.1)
            upstream = torch.linspace(0.5, 2, value.numel(), device=device).reshape(value.shape)
            grads = torch.autograd.grad(
                value, [leaf for leaf in leaves if leaf.requires_grad], upstream.to(value.dtype)
            )
            results.append((value.detach().float(), *grads))
        for mine, exact in zip(*results, strict=True):
            torch.testing.assert_close(mine, exact)


@pytest.mark.parametrize("require", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_mse_targets_that_require_grad(reduction, require, device):
    pair = [torch.randn(5, CLASSES, device=device) for _ in range(2)]
    recorded = AotEagerAndRecordGraphs()
    compiled = torch.compile(fused.mse_loss, backend=recorded, fullgraph=True)
    results = []
    for loss in (compiled, fused.mse_loss, reference.mse_loss):
        leaves = [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(pair, require, strict=True)]
        value = loss(*leaves, reduction=reduction)
        upstream = torch.linspace(-1, 2, value.numel(), device=device).reshape(value.shape).to(value.dtype)
        results.append(torch.autograd.grad(value, [leaf for leaf in leaves if leaf.requires_grad], upstream))
    for mine, eager, exact in zip(*results, strict=True):
        assert torch.equal(mine, eager)
        torch.testing.assert_close(mine, exact)
    assert losses_in(*recorded.bw_graphs) == {MSE_BACKWARD}


TRANSFORMS = {
    "grad": lambda loss, x, t: torch.func.grad(lambda x: loss(x, t))(x),
    "vmap": lambda loss, x, t: torch.func.vmap(loss)(x, t),
    "hessian": lambda loss, x, t: torch.func.hessian(lambda x: loss(x, t))(x),
    "jvp": lambda loss, x, t: torch.func.jvp(lambda x: loss(x, t), (x,), (x.cos(),)),
    "vjp": lambda loss, x, t: torch.func.vjp(lambda x: loss(x, t), x)[1](torch.ones((), device=x.device)),
    "gradients of each sample": lambda loss, x, t: torch.func.vmap(torch.func.grad(loss))(x, t),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("kind", ["indices", "mse"])
def test_functorch(kind, name, device):
    input, target, _ = given(kind, device)
    ours, _ = functions(kind)
    torchs = getattr(F, ours.__name__)
    compiled = torch.compile(lambda x, t: TRANSFORMS[name](ours, x, t), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input, target), TRANSFORMS[name](torchs, input, target))


@pytest.mark.parametrize("kind", ["indices", "mse"])
def test_forward_mode(kind, device):
    input, target, _ = given(kind, device)
    ours, _ = functions(kind)

    def tangent(loss: Callable[..., Tensor], x: Tensor, v: Tensor) -> Tensor:
        with fwAD.dual_level():
            return fwAD.unpack_dual(loss(fwAD.make_dual(x, v), target)).tangent

    compiled = torch.compile(lambda x, v: tangent(ours, x, v), backend="aot_eager")
    torch.testing.assert_close(compiled(input, input.sin()), tangent(getattr(F, ours.__name__), input, input.sin()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients(kind, mode, device):
    ours, expected = functions(kind)
    input, target, options = given(kind, device)
    input.requires_grad_()
    recorded = AotEagerAndRecordGraphs()
    compiled = torch.compile(ours, backend=recorded, fullgraph=True)
    with mode():
        loss = compiled(input, target, **options)
        assert torch.equal(loss, ours(input, target, **options))
        assert_exact(loss, expected(input, target, **options))
    assert not loss.requires_grad and not recorded.bw_graphs and losses_in(*recorded.graphs)
    # And then with gradients: another graph.
    assert_step(kind, torch.compile(doubled(ours), backend="aot_eager", fullgraph=True), input, target, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_overwritten_before_the_backward_pass(kind, device):
    input, target, options = given(kind, device)
    leaf = input.requires_grad_()
    logits = leaf * 1
    loss = torch.compile(functions(kind)[0], backend="aot_eager", fullgraph=True)(logits, target, **options)
    logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_overwritten_within_the_graph(kind, device):
    """Autograd's error as well, when the graph is compiled."""
    ours, _ = functions(kind)

    def overwriting(input: Tensor, target: Tensor, **options) -> Tensor:
        logits = input * 2
        loss = ours(logits, target, **options)
        logits.mul_(0)
        return loss

    input, target, options = given(kind, device)
    with pytest.raises(Exception, match="modified by an inplace operation"):
        torch.compile(overwriting, backend="aot_eager", fullgraph=True)(input.requires_grad_(), target, **options)


def test_a_second_derivative_is_refused_not_wrong(device):
    """torch has none through a compiled graph."""
    input, target, _ = given("indices", device)
    leaf = input.requires_grad_()
    loss = torch.compile(fused.cross_entropy, backend="aot_eager", fullgraph=True)(leaf, target)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def filtered(loss: Callable[..., Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    return loss(logits[labels != 2], labels[labels != 2])


def sliced(loss: Callable[..., Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    return loss(logits[: int((labels != 2).sum())], labels[: int((labels != 2).sum())], reduction="sum")


def some_classes(loss: Callable[..., Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    return loss(logits[:, (logits.detach().sum(0) < 1e9).nonzero().squeeze(1)], labels)


@pytest.mark.parametrize("model", [filtered, sliced, some_classes])
def test_sizes_that_only_the_run_knows(model, device):
    """As in losses of masked tokens. That both sizes are one the compiler cannot prove, and torch's loss need not."""
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
    """Knows torch's functions, and changes what one of them gives."""

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


def save_nothing(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("policy", [None, save_nothing], ids=["all", "selective"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_in_a_compiled_graph(kind, policy, device):
    """The forward op is run again, in the backward graph."""
    ours, _ = functions(kind)
    chosen = {} if policy is None else {"context_fn": lambda: create_selective_checkpoint_contexts(policy)}

    def checkpointed(input: Tensor, target: Tensor, **options) -> Tensor:
        return checkpoint(doubled(ours), input, target, use_reentrant=False, **chosen, **options)

    recorded = AotEagerAndRecordGraphs()
    input, target, options = given(kind, device)
    assert_step(kind, torch.compile(checkpointed, backend=recorded, fullgraph=True), input, target, **options)


# ---- compiled autograd ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_autograd(kind, dtype, device):
    """The backward pass of an eager loss, compiled: bitwise the eager one."""
    ours, expected = functions(kind)
    recorded = AotEagerAndRecordGraphs()
    compiler = torch.compile(backend=recorded, fullgraph=True)
    for reduction, sent in (("none", None), ("mean", None), ("mean", 1.0), ("mean", 1.0)):
        input, target, options = given(kind, device, dtype=dtype)
        options["reduction"] = reduction
        upstream = None if sent is None else torch.tensor(sent, device=device)
        _, eager, upstream = step(doubled(ours), input, target, upstream, **options)
        leaf = input.detach().requires_grad_()
        with compiled_autograd._enable(compiler):
            doubled(ours)(leaf, target, **options).backward(upstream)
        assert torch.equal(leaf.grad, eager)
        exact = step(doubled(expected), input.double(), target, upstream, **options)[1]
        assert_exact(leaf.grad, exact, scale=8 * max(1.0, upstream.double().abs().max().item()))
    assert losses_in(*recorded.fw_graphs) == {MSE_BACKWARD if kind == "mse" else CE_BACKWARD}


def test_compiled_autograd_of_both_inputs_of_mse(device):
    pair = [torch.randn(5, CLASSES, device=device) for _ in range(2)]
    grads = []
    for enabled in (True, False):
        leaves = [tensor.detach().requires_grad_() for tensor in pair]
        with (
            compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True))
            if enabled
            else torch.enable_grad()
        ):
            (fused.mse_loss if enabled else F.mse_loss)(leaves[0] * 2, leaves[1].sin(), reduction="sum").backward()
        grads.append([leaf.grad for leaf in leaves])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_compiled_autograd_under_autocast(device):
    input, target, options = given("indices", device, dtype=torch.bfloat16)
    with torch.autocast(device, dtype=torch.bfloat16):
        _, eager, upstream = step(fused.cross_entropy, input, target, **options)
    leaf = input.detach().requires_grad_()
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = fused.cross_entropy(leaf, target)
        loss.backward(upstream)
    assert loss.dtype == torch.float32 and torch.equal(leaf.grad, eager)


def test_a_compiled_step_with_compiled_autograd(device):
    """The forward pass by AOT, the backward pass by compiled autograd, for more than one batch size."""
    ours, torchs = models(device)

    def train(model: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
        loss = model(*arguments)
        loss.backward()
        return loss.detach()

    def check(model: nn.Module) -> None:
        compiled = torch.compile(train, backend="aot_eager")
        for rows in (5, 9):
            arguments = batch(device, rows)
            torchs.zero_grad()
            model.zero_grad()
            expected = train(torchs, arguments)
            torch.testing.assert_close(compiled(model, arguments), expected)
            assert_same_gradients(model, torchs)

    with torch._dynamo.config.patch(compiled_autograd=True):
        try:
            check(copy.deepcopy(torchs))
        except Exception as error:
            pytest.skip(f"torch {torch.__version__} does not compile its own: {type(error).__name__}")
        torch._dynamo.reset()
        check(ours)


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
    for rows in (5, 2, 31):  # the first is the one that was exported with
        arguments = batch(device, rows)
        for form in (program, loaded, decomposed):
            with torch.no_grad():
                loss, eager = form.module()(*arguments), ours(*arguments)
            torch.testing.assert_close(loss, torchs(*arguments).detach())
            assert torch.equal(loss, eager)


@pytest.mark.parametrize("kind", ["probabilities", "smoothed"])
def test_export_of_the_options(kind, device):
    """What the modules do not show: per-row losses, probabilities, ignored rows."""

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
    for rows in (5, 11) if mode == "symbolic" else (5,):  # other numbers than those of the tracing
        input, target, _ = given(kind, device, rows, CLASSES)
        assert_exact(loss(input, target, tensors), forward_of(expected)(input, target, tensors), what="loss")
        exact = gradient_of(expected)(input, target, tensors)
        assert_exact(gradient(input, target, tensors), exact, scale=8, what="gradient")


def test_make_fx_before_the_dispatcher(device):
    """As torch.export traces."""
    input, target, options = given("smoothed", device)
    graph = make_fx(lambda x, t: fused.cross_entropy(x, t, **options), pre_dispatch=True)(input, target)
    assert losses_in(graph) == {CE}
    assert_exact(graph(input, target), reference.cross_entropy(input, target, **options))


@pytest.mark.parametrize("kind", ["indices", "mse"])
def test_forward_and_backward_traced_at_once(kind, device):
    """By AOTAutograd alone, with functional tensors."""
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
    """Torch's own function, as in every transform."""
    input, target, _ = given("indices", device)
    graph = make_fx(torch.func.grad(lambda x: fused.cross_entropy(x, target)))(input)
    assert "fusedloss" not in str(losses_in(graph))
    torch.testing.assert_close(graph(input), torch.func.grad(lambda x: F.cross_entropy(x, target))(input))


def test_fx_symbolic_trace():
    """Proxies are no tensors: torch's function is what is recorded."""
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
    """Torch's own function is traced, and works for other sizes."""
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


# ---- fake and meta tensors ----


def facts(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.stride(), tensor.device, tensor.layout


def everything(kind: str, input: Tensor, target: Tensor, options: dict, autocast: bool) -> list[Tensor]:
    """Loss and gradients."""
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
    """As in an estimate of memory, made on another machine."""
    with FakeTensorMode():
        input, target, options = given(kind, "cuda")
        loss = functions(kind)[0](input, target, reduction="none", **options)
    assert loss.device.type == "cuda" and loss.shape == (input.shape if kind == "mse" else (5,))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_meta_tensors(kind, layout):
    """Torch's own function, which says as much as it says without these."""
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


# ---- dispatch modes ----


class Looking(TorchDispatchMode):
    """Looks at what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function).removesuffix(".default"))
        return function(*args, **(kwargs or {}))

    def losses(self) -> list[str]:
        return list(filter(is_loss, self.seen))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_dispatch_mode_sees_the_ops(kind, reduction, device):
    forward, backward = (MSE, MSE_BACKWARD) if kind == "mse" else (CE, CE_BACKWARD)
    input, target, options = given(kind, device)
    ours, _ = functions(kind)

    def looked_at(input: Tensor, target: Tensor, **options) -> Tensor:
        with Looking() as mode:
            loss = doubled(ours)(input, target, **options)
        assert mode.losses() == [forward]
        return loss

    assert_step(kind, looked_at, input, target, reduction=reduction, **options)
    with Looking() as mode:
        loss, grad, upstream = step(ours, input, target, reduction=reduction, **options)
    assert mode.losses() == [forward, backward]
    eager_loss, eager_grad, _ = step(ours, input, target, upstream, reduction=reduction, **options)
    assert torch.equal(loss, eager_loss) and torch.equal(grad, eager_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mode_that_looks_at_the_backward_pass_only(kind, device):
    """The loss is an eager one."""
    input, target, options = given(kind, device)
    ours, _ = functions(kind)
    _, eager, upstream = step(ours, input, target, **options)
    leaf = input.requires_grad_()
    loss = ours(leaf, target, **options)
    with Looking() as mode:
        (grad,) = torch.autograd.grad(loss, leaf, upstream)
    assert mode.losses() == [MSE_BACKWARD if kind == "mse" else CE_BACKWARD]
    assert torch.equal(grad, eager)


NO_CLASSES = """
import torch, torch.nn.functional as F
import fusedloss.functional as fused
from torch.utils._python_dispatch import TorchDispatchMode

class Looking(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))

for shape in ((2, 0), (0, 0), (0,), (2, 0, 3)):
    for reduction in ("none", "mean", "sum"):
        found = []
        for loss in (fused.cross_entropy, F.cross_entropy):
            input = torch.zeros(shape, requires_grad=True)
            with Looking():
                value = loss(input, torch.zeros(shape), reduction=reduction)
                value.sum().backward()
            found.append((value.detach().nan_to_num(123).tolist(), input.grad.tolist()))
        print(shape, reduction, found[0] == found[1], found)
"""


def test_logits_without_classes():
    """In a process of its own: memory would be read that is not there."""
    finished = subprocess.run(
        [sys.executable, "-c", NO_CLASSES],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr or finished.returncode
    lines = finished.stdout.splitlines()
    assert len(lines) == 12 and all(" True [" in line for line in lines), finished.stdout


@pytest.mark.parametrize("require", [(True, True), (False, True)], ids=str)
def test_mse_targets_under_a_dispatch_mode(require, device):
    pair = [torch.randn(5, CLASSES, device=device) for _ in range(2)]
    upstream = torch.randn(5, CLASSES, device=device)
    grads = []
    for loss in (fused.mse_loss, reference.mse_loss):
        leaves = [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(pair, require, strict=True)]
        with Looking():
            value = loss(*leaves, reduction="none")
            grads.append(
                torch.autograd.grad(value, [leaf for leaf in leaves if leaf.requires_grad], upstream.to(value.dtype))
            )
    for mine, exact in zip(*grads, strict=True):
        torch.testing.assert_close(mine, exact)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_under_a_dispatch_mode(kind, reduction, device):
    """The registered ops have derivatives of their own, the second one too."""
    input, target, options = given(kind, device, 2, 3, dtype=torch.float64)
    inputs = (input.requires_grad_(), target.requires_grad_()) if kind == "mse" else (input.requires_grad_(),)

    def loss(input: Tensor, target: Tensor = target) -> Tensor:
        return functions(kind)[0](input, target, reduction=reduction, **options)

    with Looking() as mode:
        assert torch.autograd.gradcheck(loss, inputs)
        assert torch.autograd.gradgradcheck(loss, inputs)
    assert (MSE_BACKWARD if kind == "mse" else CE_BACKWARD) in mode.seen


def test_a_second_derivative_under_a_dispatch_mode_walks_the_graph_once(device):
    """What lies behind the inputs is the outer pass's, its hooks too, also where the target depends on the input."""
    values = torch.randn(5, dtype=torch.float64, device=device)
    for pair_of in (lambda x: (x, 2 * x), lambda x: (x * 3, x), lambda x: (x, x.sin())):
        results = []
        for loss in (fused.mse_loss, reference.mse_loss):
            x = values.clone().requires_grad_()
            x.register_hook(lambda grad: grad * 2)
            with Looking():
                (grad,) = torch.autograd.grad(loss(*pair_of(x * 1)), x, create_graph=True)
                results.append((grad.detach(), torch.autograd.grad(grad.pow(3).sum(), x)[0]))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_gradients(kind, device):
    """Of an eager loss, of one under a dispatch mode, and of a backward pass under one: composed, as vmap has it."""
    input, target, options = given(kind, device)
    options["reduction"] = "none"
    ours, expected = functions(kind)
    leaf = input.requires_grad_()
    exact = expected(leaf, target, **options)
    upstream = torch.randn(3, *exact.shape, device=device)
    (exact_grads,) = torch.autograd.grad(exact, leaf, upstream.double(), is_grads_batched=True)
    no_mode = torch.enable_grad
    for of_forward, of_backward in ((no_mode, no_mode), (Looking, Looking), (no_mode, Looking)):
        with of_forward():
            loss = ours(leaf, target, **options)
        with of_backward():
            (grads,) = torch.autograd.grad(loss, leaf, upstream, is_grads_batched=True)
        torch.testing.assert_close(grads, exact_grads)
