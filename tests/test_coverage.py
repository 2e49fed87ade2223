"""Each line of docs/coverage.md is run here. It lists what the kernels compute and what torch's functions do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from helpers.draws import REDUCTIONS
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fusedloss.functional as fused

DOCUMENT = Path(__file__).parent.parent / "docs" / "coverage.md"
COLUMNS = ("cross_entropy", "mse_loss")


def table() -> dict[str, dict[str, str]]:
    """Maps a situation to a loss to what computes it."""
    rows = [line.strip("| \n").split(" | ") for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    return {name: dict(zip(COLUMNS, cells, strict=True)) for name, *cells in rows[1:] if not name.startswith("**")}


# ---- the situations ----

Loss = Callable[..., Tensor]
Situation = Callable[[str, Loss], object]  # takes the loss's name and the loss, and calls it
SITUATIONS: dict[str, Situation] = {}


def situation(name: str) -> Callable[[Situation], Situation]:
    def add(function: Situation) -> Situation:
        SITUATIONS[name] = function
        return function

    return add


def given(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """An input that requires a gradient, and a target."""
    shape = shape or (4, 5)
    input = torch.randn(shape, dtype=dtype, requires_grad=True)
    if name == "mse_loss":
        return input, torch.randn(shape, dtype=dtype)
    return input, torch.randint(0, shape[min(1, len(shape) - 1)], (shape[:1] + shape[2:]) if len(shape) > 1 else ())


def step(loss: Tensor) -> Tensor:
    loss.backward(torch.randn_like(loss))
    return loss


def probabilities(**options) -> tuple[Tensor, Tensor]:
    return torch.randn(4, 5, requires_grad=True), torch.rand(4, 5, **options)


@situation("float32, float64, bfloat16, float16")
def _(name, loss):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        step(loss(*given(name, dtype=dtype)))


@situation("mixed floating-point types, which torch promotes")
def _(name, loss):
    input, target = probabilities(dtype=torch.float64)
    step(loss(input, target))


@situation("class indices of any integer type")
def _(name, loss):
    input, target = given(name)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        step(loss(input, target.to(dtype)))


@situation("class probabilities")
def _(name, loss):
    step(loss(*probabilities()))


@situation("class probabilities that require a gradient")
def _(name, loss):
    step(loss(*probabilities(requires_grad=True)))


@situation("a weight of probabilities that requires a gradient")
def _(name, loss):
    step(loss(*probabilities(), weight=torch.rand(5, requires_grad=True)))


@situation("a target that requires a gradient")
def _(name, loss):
    input, target = given(name)
    step(loss(input, target.requires_grad_()))
    step(loss(input.detach(), target))


@situation("weight")
def _(name, loss):
    input, target = given(name)
    step(loss(input, target, weight=torch.rand(5) if name == "cross_entropy" else torch.rand(4, 5)))


@situation("ignore_index, label_smoothing")
def _(name, loss):
    step(loss(*given(name), ignore_index=1, label_smoothing=0.1, reduction="sum"))


@situation("reduction none, mean, sum")
def _(name, loss):
    for reduction in REDUCTIONS:
        step(loss(*given(name), reduction=reduction))


@situation("any rank, any strides")
def _(name, loss):
    for shape in [(5,), (4, 5), (2, 5, 3), (2, 5, 3, 4), (2, 5, 3, 4, 2)]:
        step(loss(*given(name, *shape)))
        input, target = given(name, *shape)
        step(loss(input.detach().mT.contiguous().mT if len(shape) > 1 else input, target).requires_grad_())


@situation("a target that is broadcast")
def _(name, loss):
    with pytest.warns(UserWarning, match="target size"):
        step(loss(torch.randn(4, 5, requires_grad=True), torch.randn(5)))


@situation("an empty batch")
def _(name, loss):
    step(loss(*given(name, 0, 5)))


@situation("other devices than CPU and CUDA (here: meta)")
def _(name, loss):
    input, target = given(name)
    step(loss(input.detach().to("meta").requires_grad_(), target.to("meta")))


@situation("no gradient wanted: no_grad, inference_mode")
def _(name, loss):
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss(*given(name))


@situation("autocast")
def _(name, loss):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss(*given(name, dtype=torch.bfloat16))
    step(result)


@situation("a default device")
def _(name, loss):
    with torch.device("cpu"):
        step(loss(*given(name)))


@situation("deterministic algorithms")
def _(name, loss):
    torch.use_deterministic_algorithms(True)
    try:
        step(loss(*given(name)))
    finally:
        torch.use_deterministic_algorithms(False)


@situation("saved-tensor hooks")
def _(name, loss):
    input, target = given(name)
    with torch.autograd.graph.save_on_cpu():
        result = loss(input * 2, target)
    step(result)


@situation("activation checkpointing")
def _(name, loss):
    input, target = given(name)
    step(checkpoint(loss, input, target, use_reentrant=False))


class Subclass(Tensor):
    pass


@situation("tensor subclasses")
def _(name, loss):
    input, target = given(name)
    step(loss(input.detach().as_subclass(Subclass).requires_grad_(), target))


class Passing(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@situation("torch function modes")
def _(name, loss):
    arguments = given(name)
    with Passing():
        step(loss(*arguments))


@situation("backward, once or again, with any grad_output")
def _(name, loss):
    for reduction in ("none", "mean"):
        result = loss(*given(name), reduction=reduction)
        for scale in (1.0, 65536.0):
            result.backward(torch.full_like(result, scale), retain_graph=True)


def forward_apart(backward: Callable[[Tensor, Tensor], object]) -> Situation:
    """Only the backward pass counts."""

    def run(name: str, loss: Loss) -> object:
        input, target = given(name)
        result = loss(input, target)
        return lambda: backward(result, input)

    return run


SITUATIONS["backward with create_graph, for a second derivative"] = forward_apart(
    lambda loss, input: torch.autograd.grad(loss, input, create_graph=True)[0].sum().backward()
)
SITUATIONS["backward of a batch of gradients, is_grads_batched"] = forward_apart(
    lambda loss, input: torch.autograd.grad(loss, input, torch.randn(3), is_grads_batched=True)
)


@situation("forward-mode AD")
def _(name, loss):
    input, target = given(name)
    with fwAD.dual_level():
        assert fwAD.unpack_dual(loss(fwAD.make_dual(input, torch.randn_like(input)), target)).tangent is not None


@situation("torch.func: grad, vjp, jvp, vmap, jacrev, jacfwd, hessian")
def _(name, loss):
    input, target = given(name)
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        transform(lambda x: loss(x, target))(input.detach())
    torch.func.vmap(loss)(input, target)
    torch.func.jvp(lambda x: loss(x, target), (input.detach(),), (torch.randn_like(input),))
    torch.func.vjp(lambda x: loss(x, target), input.detach())[1](torch.tensor(1.0))


@situation("torch.compile")
def _(name, loss):
    step(torch.compile(loss, backend="aot_eager", fullgraph=True)(*given(name)))


@situation("torch.func within torch.compile")
def _(name, loss):
    input, target = given(name)
    torch.compile(torch.func.grad(lambda x: loss(x, target)), backend="aot_eager", fullgraph=True)(input.detach())


@situation("compiled autograd")
def _(name, loss):
    compiled_autograd = pytest.importorskip("torch._dynamo.compiled_autograd")
    input, target = given(name)
    result = loss(input * 2, target)

    def backward() -> None:
        with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            step(result)

    return backward


class Module(nn.Module):
    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.loss(input, target)


@situation("torch.export")
def _(name, loss):
    for strict in (True, False):
        torch.export.export(Module(loss), given(name), strict=strict).module()(*given(name))


@situation("make_fx")
def _(name, loss):
    from torch.fx.experimental.proxy_tensor import make_fx

    def gradient(input: Tensor, target: Tensor) -> Tensor:
        input = input.detach().requires_grad_()
        return torch.autograd.grad(loss(input, target), input)[0]

    make_fx(gradient)(*given(name))


@situation("fake tensors")
def _(name, loss):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        step(loss(*given(name)))


class Looking(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@situation("dispatch modes")
def _(name, loss):
    with Looking():
        step(loss(*given(name)))


@situation("torch.jit.trace, torch.jit.script")
def _(name, loss):
    torch.jit.trace(loss, given(name), check_trace=False)
    step(torch.jit.script(loss)(*given(name)))


# ---- what computes them ----

BY_TORCH = ("_log_softmax", "nll_loss", "cross_entropy_loss", "mse_loss")


def ops_of(run: Callable[[], object]) -> tuple[object, set[str]]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        result = run()
    return result, {event.name for event in profiler.events()}


def what_computes(name: str, run: Situation) -> str:
    torch._dynamo.reset()
    backward, seen = ops_of(lambda: run(name, getattr(fused, name)))
    if callable(backward):
        _, seen = ops_of(backward)
    ours = {op for op in seen if op.startswith("fusedloss::") and "CppNode" not in op and "composed" not in op}
    torchs = {op for op in seen if op.startswith("aten::") and any(part in op for part in BY_TORCH)}
    assert not (ours and torchs), f"both are seen: {ours}, {torchs}"
    return "kernels" if ours else "torch"


TABLE = table()


def test_every_line_of_the_table_is_run():
    assert TABLE.keys() == SITUATIONS.keys()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("situation", TABLE)
def test_the_table(situation, name):
    documented = TABLE[situation][name]
    if documented == "n/a":
        pytest.skip("does not exist for this loss")
    assert what_computes(name, SITUATIONS[situation]) == documented
