"""Derivatives of the losses under torch.compile, and compiled autograd."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from helpers.draws import REDUCTIONS
from helpers.graphs import (
    CE_BACKWARD,
    CLASSES,
    KINDS,
    MSE_BACKWARD,
    assert_same_gradients,
    assert_step,
    batch,
    doubled,
    functions,
    given,
    losses_in,
    models,
    step,
)
from helpers.oracle import assert_exact
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fusedloss.functional as fused
from fusedloss import reference

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_probabilities_and_their_weights_that_require_grad(reduction, device):
    """Such losses are composed of torch's operations, since the kernels have no gradient for these operands."""
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
    # With gradients another graph is compiled.
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
    """Autograd raises its error while the graph is compiled."""
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
    """torch does not support a second derivative through a compiled graph."""
    input, target, _ = given("indices", device)
    leaf = input.requires_grad_()
    loss = torch.compile(fused.cross_entropy, backend="aot_eager", fullgraph=True)(leaf, target)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def save_nothing(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("policy", [None, save_nothing], ids=["all", "selective"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_in_a_compiled_graph(kind, policy, device):
    """The backward graph runs the forward op again."""
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
    """The compiled backward pass of an eager loss is bitwise equal to the eager backward pass."""
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
    """AOTAutograd compiles the forward pass, and compiled autograd the backward pass, for several batch sizes."""
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
