"""The losses under saved-tensor hooks, activation checkpoints and torch's global modes, and after errors."""

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.draws import REDUCTIONS
from helpers.graphs import CLASSES, KINDS, given, target_for
from helpers.modes import assert_step, functions, is_fused, send_one, step
from helpers.oracle import assert_exact
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fusedloss
from fusedloss import reference

# ---- saved-tensor hooks ----


def to_bytes(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def from_bytes(saved: bytes) -> Tensor:
    return torch.load(io.BytesIO(saved))


PACKINGS = {
    "to disk": (to_bytes, from_bytes),
    "strided": (lambda t: t, lambda t: t.unsqueeze(-1).expand(*t.shape, 2).clone()[..., 0] if t.dim() > 1 else t),
    "a copy": (lambda t: (t.dtype, t.double()) if t.is_floating_point() else (t.dtype, t), lambda p: p[1].to(p[0])),
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_tensor_hooks(kind, packing, device):
    ours, _, _ = functions(kind)
    packed, unpacked = [], []
    pack, unpack = PACKINGS[packing]

    def under_hooks(input: Tensor, target: Tensor, **options) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (packed.append(t.numel()), pack(t))[1], lambda p: (unpacked.append(0), unpack(p))[1]
        ):
            return ours(input, target, **options)

    input, target, options = given(kind, device)
    assert_step(kind, under_hooks, input, target, **options)  # two steps
    assert len(packed) == len(unpacked) >= 4
    # Beside the arguments, two numbers for each row and two sums of weights are saved. The gradient is not.
    arguments = input.numel() + target.numel() + (CLASSES if "weight" in options else 0)
    assert sum(packed) <= 2 * (arguments + (0 if kind == "mse" else 2 * len(input) + 2))


@pytest.mark.parametrize("pin_memory", [False, pytest.param(True, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", KINDS)
def test_save_on_cpu(kind, pin_memory, device):
    ours, _, _ = functions(kind)

    def under_hooks(input: Tensor, target: Tensor, **options) -> Tensor:
        with torch.autograd.graph.save_on_cpu(pin_memory=pin_memory):
            return ours(input, target, **options)

    input, target, options = given(kind, device)
    assert_step(kind, under_hooks, input, target, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tensors_that_may_be_overwritten(kind, device):
    """torch copies a tensor before it is overwritten. Without this mode, autograd raises an error."""
    ours, _, _ = functions(kind)
    input, target, options = given(kind, device)
    leaf = input.detach().requires_grad_()
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        logits = leaf * 1
        loss = ours(logits, target, **options)
        logits.zero_()
        loss.backward()
    assert torch.equal(leaf.grad, step(ours, input, target, torch.ones((), device=device), **options)[1])


# ---- activation checkpointing ----


def policy_to(save: bool) -> Callable:
    """A policy that saves, or recomputes, the results of the losses' ops."""

    def policy(context, op, *args, **kwargs) -> CheckpointPolicy:
        seen.append(str(op))
        is_ours = "fusedloss" in str(op)
        return CheckpointPolicy.MUST_SAVE if is_ours and save else CheckpointPolicy.MUST_RECOMPUTE

    seen: list[str] = []
    policy.seen = seen
    return policy


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "saved by policy", "recomputed by policy"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing(kind, how, device):
    ours, _, _ = functions(kind)
    calls = []

    def counted(input: Tensor, target: Tensor, options: dict) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return ours(input, target, **options)

    policy = policy_to("saved" in how)
    chosen = {"context_fn": lambda: create_selective_checkpoint_contexts(policy)} if "policy" in how else {}

    def checkpointed(input: Tensor, target: Tensor, **options) -> Tensor:
        return checkpoint(counted, input, target, options, use_reentrant=how == "reentrant", **chosen)

    input, target, options = given(kind, device)
    assert_step(kind, checkpointed, input, target, **options)
    assert len(calls) == 4  # two steps
    if "policy" in how:
        assert f"fusedloss.{'pointwise' if kind == 'mse' else 'cross_entropy'}_forward.default" in policy.seen


# ---- modes of all of torch ----


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """In this mode torch fills new memory with NaN, so that elements that are never written are noticed."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_algorithms(kind, reduction, dtype, device):
    ours, _, _ = functions(kind)
    rows, columns = (torch.randn(shape, dtype=dtype, device=device) for shape in ((5, CLASSES), (3, CLASSES, 4)))
    for input in (rows, columns, rows[0], rows.t().contiguous().t(), columns.mT.contiguous().mT):
        target, options = target_for(kind, input)
        options["reduction"] = reduction
        for upstream in (None, torch.ones_like(ours(input, target, **options))):
            if upstream is not None:
                send_one()
            loss, grad, upstream = step(ours, input, target, upstream, **options)
            with deterministic():
                again, grad_again, _ = step(ours, input, target, upstream, **options)
            assert torch.equal(loss, again) and torch.equal(grad, grad_again)


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients(kind, device):
    ours, torchs, _ = functions(kind)
    input, target, options = given(kind, device)
    loss, _, _ = step(ours, input, target, **options)
    for mode in (torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)):
        with mode():
            quiet, expected = (f(input.detach().requires_grad_(), target, **options) for f in (ours, torchs))
        assert torch.equal(quiet, loss)
        assert (quiet.requires_grad, quiet.grad_fn, quiet.is_inference()) == (False, None, expected.is_inference())
        torch.testing.assert_close(quiet, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_tensors_outside_of_their_mode(kind, device):
    """They can be used in a loss, but cannot be saved for a backward pass: torch's error."""
    ours, torchs, _ = functions(kind)
    with torch.inference_mode():
        input, target, options = given(kind, device)
    if kind == "probabilities":
        options = {}  # smoothed probabilities are new tensors in torch, which may be saved
    torch.testing.assert_close(ours(input, target, **options), torchs(input, target, **options))
    for loss in (ours, torchs):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            loss(input.clone().requires_grad_(), target, **options)
    ours(
        input.clone().requires_grad_(),
        target.clone(),
        **{n: o.clone() if n == "weight" else o for n, o in options.items()},
    ).backward()


@pytest.mark.parametrize("kind", ["indices", "mse"])
def test_anomaly_mode_names_the_loss(kind, device):
    ours, _, _ = functions(kind)
    input, target, _ = given(kind, device)
    with warnings.catch_warnings(), torch.autograd.detect_anomaly(check_nan=True):
        warnings.simplefilter("ignore")
        loss = ours((input * float("nan")).requires_grad_(), target)
        with pytest.raises(RuntimeError, match=re.escape(loss.grad_fn.name()) + ".* returned nan values"):
            loss.backward()
        assert_step(kind, ours, input, target)


# ---- modules, errors ----


def test_functional_call(device):
    """The buffer of a module is replaced for one call."""
    input, target, _ = given("indices", device)
    module = fusedloss.CrossEntropyLoss(weight=torch.ones(CLASSES, device=device), reduction="sum")
    weight = torch.rand(CLASSES, device=device)
    loss = torch.func.functional_call(module, {"weight": weight}, (input.requires_grad_(), target))
    assert is_fused(loss)
    assert_exact(loss, reference.cross_entropy(input, target, weight, reduction="sum"), scale=10)
    assert torch.equal(module.weight, torch.ones(CLASSES, device=device))
    # Probabilities with a stack of weights under vmap, and with weights that require grad.
    probabilities = torch.rand(5, CLASSES, device=device)

    def of_weight(weight: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": weight}, (input, probabilities))

    weights = torch.rand(3, CLASSES, device=device)
    exact = torch.stack([reference.cross_entropy(input, probabilities, w, reduction="sum") for w in weights]).float()
    torch.testing.assert_close(torch.func.vmap(of_weight)(weights), exact)
    exact = -(probabilities * input.log_softmax(1)).sum(0)
    torch.testing.assert_close(torch.func.grad(of_weight)(weight), exact)


@pytest.mark.parametrize("sent", [1.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_survives_errors(kind, sent, device):
    """A graph can be used after a wrong upstream gradient, an error in a hook, and one in another forward pass."""
    ours, _, _ = functions(kind)
    input, target, options = given(kind, device)
    expected, upstream = step(ours, input, target, torch.tensor(sent, device=device), **options)[1:]
    send_one()
    leaf = input.detach().requires_grad_()
    logits = leaf * 1
    loss = ours(logits, target, **options)
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        loss.backward(torch.ones(3, device=device))

    def refuse(grad: Tensor) -> None:
        raise ValueError("not today")

    handle = logits.register_hook(refuse)
    with pytest.raises(ValueError, match="not today"):
        loss.backward(upstream, retain_graph=True)
    handle.remove()
    with pytest.raises((RuntimeError, ValueError)):
        ours(logits, target[:3], **options)
    assert leaf.grad is None
    loss.backward(upstream)
    assert torch.equal(leaf.grad, expected)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward(upstream)
