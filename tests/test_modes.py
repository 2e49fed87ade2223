"""The losses amid everything that can be switched on around them at run time: hooks, checkpoints, autocast, threads, …

Values are compared with the float64 reference or torch's own loss, and bitwise with the plain call where it is the same
kernel that runs.
"""

import contextlib
import copy
import io
import os
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.draws import DTYPES, REDUCTIONS
from helpers.oracle import assert_exact
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.data import DataLoader, Dataset

import fusedloss
import fusedloss.functional as fused
from fusedloss import _backend, reference

ROOT = Path(__file__).parent.parent
CLASSES = 7
KINDS = ["indices", "smoothed", "probabilities", "mse"]
TORCHS = {"cross_entropy": F.cross_entropy, "mse_loss": F.mse_loss}  # also while they are patched


def functions(kind: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    """The fused loss, torch's and the reference."""
    name = "mse_loss" if kind == "mse" else "cross_entropy"
    return getattr(fused, name), TORCHS[name], getattr(reference, name)


def given(kind: str, device: str, rows: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, dict]:
    """An input, a target and options."""
    input = torch.randn(rows, CLASSES, dtype=dtype, device=device)
    return input, *target_for(kind, input)


def target_for(kind: str, input: Tensor) -> tuple[Tensor, dict]:
    class_dim = min(1, input.dim() - 1)
    if kind == "mse":
        return torch.randn_like(input), {}
    if kind == "probabilities":
        return torch.randn_like(input).softmax(class_dim), {"label_smoothing": 0.2}
    rows = input.shape[:class_dim] + input.shape[class_dim + 1 :]
    target = torch.randint(0, CLASSES, rows, device=input.device)
    if kind == "indices":
        return target, {}
    target.view(-1)[-1] = 1  # ignored
    target.view(-1)[0] = 0  # not all are
    weight = torch.rand(CLASSES, dtype=input.dtype, device=input.device) + 0.1
    return target, {"weight": weight, "ignore_index": 1, "label_smoothing": 0.1}


def step(loss: Callable[..., Tensor], input: Tensor, target: Tensor, upstream: Tensor | None = None, **options):
    """loss, its gradient, and the upstream gradient that was drawn for it."""
    leaf = input.detach().requires_grad_()
    value = loss(leaf * 1, target, **options)
    upstream = torch.randn_like(value) if upstream is None else upstream.to(value.dtype)
    value.backward(upstream)
    return value.detach(), leaf.grad, upstream


def send_one() -> None:
    """Send a gradient of 1, as training does: on the CPU the forward passes after it compute the gradient at once."""
    fused.cross_entropy(torch.zeros(1, 2, requires_grad=True), torch.zeros(1, dtype=torch.int64)).backward()


def assert_step(kind: str, under: Callable[..., Tensor], input: Tensor, target: Tensor, **options) -> None:
    """Steps of `under`, the fused loss under something: bitwise the plain one's, and those of the reference."""
    ours, _, expected = functions(kind)
    for upstream in (None, torch.ones_like(ours(input, target, **options))):
        if upstream is not None:
            send_one()
        plain_loss, plain_grad, upstream = step(ours, input, target, upstream, **options)
        loss, grad, _ = step(under, input, target, upstream, **options)
        assert torch.equal(loss, plain_loss) and torch.equal(grad, plain_grad)
        exact_loss, exact_grad, _ = step(expected, input.double(), target, upstream, **options)
        assert_exact(loss, exact_loss, scale=max(1.0, exact_loss.abs().sum().item()), what="loss")
        assert_exact(grad, exact_grad, scale=4 * max(1.0, upstream.double().abs().max().item()), what="gradient")


def is_fused(loss: Tensor) -> bool:
    return "fusedloss" in loss.grad_fn.name()


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
    # What is saved beside the arguments: two numbers a row, and two sums of weights. Not the gradient.
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
    """torch copies what is about to be overwritten; without this it is autograd's error."""
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
    """Saves, or recomputes, what the losses' ops gave."""

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
    """torch then fills what is allocated with NaN, so that nothing that is left unwritten goes unseen."""
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
    """They can be computed with, but not saved for a backward pass: torch's error."""
    ours, torchs, _ = functions(kind)
    with torch.inference_mode():
        input, target, options = given(kind, device)
    if kind == "probabilities":
        options = {}  # those that are smoothed are new tensors to torch, which may be saved
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


# ---- autocast ----

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-10}


def outcome(loss: Callable[..., Tensor], input: Tensor, *others: Tensor, autocast: torch.dtype | None, **options):
    """Loss and gradient, or the type of the error."""
    leaf = input.detach().requires_grad_()
    try:
        with torch.autocast(input.device.type, dtype=autocast, enabled=autocast is not None):
            value = loss(leaf, *others, **options)
        return value.detach(), *torch.autograd.grad(value.sum(), leaf)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16, None], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_gives_torchs_dtypes(dtype, autocast, device):
    """Of loss and gradient, for every mixture; and torch's errors."""
    input = torch.randn(5, CLASSES, device=device).to(dtype)
    indices = torch.randint(0, CLASSES, (5,), device=device)
    weight, probabilities = torch.rand(CLASSES, device=device), torch.rand(5, CLASSES, device=device)
    cases = [("cross_entropy", (indices,)), ("cross_entropy", (indices.int(),))]
    for other in DTYPES:
        cases.append(("cross_entropy", (indices, weight.to(other))))
        cases.append(("cross_entropy", (probabilities.to(other),)))
        cases.append(("cross_entropy", (probabilities.to(dtype), weight.to(other))))
        cases.append(("mse_loss", (probabilities.to(other),)))
    for name, others in cases:
        for reduction in ("mean", "none"):
            torchs = outcome(getattr(F, name), input, *others, autocast=autocast, reduction=reduction)
            ours = outcome(getattr(fused, name), input, *others, autocast=autocast, reduction=reduction)
            what = f"{name}, {[t.dtype for t in others]}, {reduction}: {ours}, torch's {torchs}"
            if isinstance(torchs, type):
                if others[0].dtype != torch.int32:  # torch has no such indices
                    assert ours is torchs, what
                continue
            assert [t.dtype for t in ours] == [t.dtype for t in torchs], what
            # On CUDA torch rounds log-probabilities to the input's dtype, though their sum is of float32.
            in_float32 = autocast is not None and ours[0].dtype != dtype and device == "cpu"
            tolerance = CLOSE[torch.float32 if in_float32 else dtype]
            torch.testing.assert_close(ours[0], torchs[0], rtol=tolerance, atol=tolerance, msg=lambda m, w=what: w + m)
            tolerance = CLOSE[dtype]
            torch.testing.assert_close(ours[1], torchs[1], rtol=tolerance, atol=tolerance, msg=lambda m, w=what: w + m)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_may_be_switched_off_within(kind, device):
    ours, _, _ = functions(kind)
    input, target, options = given(kind, device, dtype=torch.bfloat16)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert ours(input, target, **options).dtype == torch.float32
        with torch.autocast(device, enabled=False):
            assert ours(input, target, **options).dtype == torch.bfloat16
    assert ours(input, target, **options).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_a_scaled_float16_backward_pass(kind, device):
    """What a gradient scaler does: the scale arrives in float32, and small gradients survive in float16."""
    ours, _, expected = functions(kind)
    input, target, options = given(kind, device, rows=300, dtype=torch.float16)
    scale = torch.tensor(2.0**12, device=device)
    with torch.autocast(device, dtype=torch.float16):
        loss, grad, _ = step(ours, input, target, scale, **options)
    exact_loss, exact_grad, _ = step(expected, input.double(), target, scale, **options)
    assert loss.dtype == torch.float32 and grad.dtype == torch.float16
    assert_exact(loss, exact_loss)
    assert_exact(grad, exact_grad)
    # Too large a scale becomes inf, never NaN nor a large number, so that a scaler finds it.
    with torch.autocast(device, dtype=torch.float16):
        grad = step(ours, input, target, torch.tensor(1e9, device=device), reduction="sum", **options)[1]
    exact_grad = step(expected, input.double(), target, torch.tensor(1e9, device=device), reduction="sum", **options)[1]
    too_large = exact_grad.abs() > 65520
    assert too_large.any() and torch.equal(grad.isinf(), too_large) and not grad.isnan().any()


def test_a_gradient_scaler(device):
    """The same steps skipped, the same scales, the same parameters as with torch's losses."""
    features = torch.randn(32, 6, device=device)
    target, values = torch.randint(0, CLASSES, (32,), device=device), torch.randn(32, CLASSES, device=device)
    start = nn.Linear(6, CLASSES, device=device)
    found = []
    for library in (fused, F):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**24, growth_interval=4)
        scales, losses = [], []
        for _ in range(16):
            optimizer.zero_grad()
            with torch.autocast(device, dtype=torch.float16):
                logits = model(features)
                loss = library.cross_entropy(logits, target) + library.mse_loss(logits, values.half())
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            losses.append(loss.item())
        found.append((scales, losses, model.weight.detach()))
    assert logits.dtype == torch.float16
    (scales, losses, weight), (torchs_scales, torchs_losses, torchs_weight) = found
    assert scales == torchs_scales and min(scales) < 2.0**24 and len(set(scales)) > 2
    assert losses == pytest.approx(torchs_losses, rel=2e-3) and losses[-1] < losses[0]
    torch.testing.assert_close(weight, torchs_weight, rtol=1e-2, atol=1e-3)


# ---- processes and threads ----


def results(seed: int, rows: int = 64, classes: int = 33) -> tuple[Tensor, ...]:
    """Losses and gradients of arguments that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(rows, classes, generator=generator).requires_grad_()
    target = torch.randint(0, classes, (rows,), generator=generator)
    other = torch.randn(rows, classes, generator=generator)
    losses = (
        fused.cross_entropy(input, target),
        fused.cross_entropy(input, other.softmax(1), label_smoothing=0.1),
        fused.mse_loss(input, other),
    )
    assert all(map(is_fused, losses))
    return *(loss.detach() for loss in losses), *torch.autograd.grad(sum(losses), input)


class Scored(Dataset):
    """Losses and gradient are computed by the worker that loads the item."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, seed: int) -> tuple[int, int, tuple[Tensor, ...]]:
        return seed, os.getpid(), results(seed)


def use_data_loader_workers() -> None:
    before = results(0, 2048, 512)  # the threads of this process have started
    loader = DataLoader(Scored(), batch_size=3, num_workers=2, timeout=120, multiprocessing_context="fork")
    seen, workers = [], set()
    for seeds, pids, batches in loader:
        for i, seed in enumerate(seeds.tolist()):
            for found, expected in zip(batches, results(seed), strict=True):
                assert torch.equal(found[i], expected)
            seen.append(seed)
        workers.update(pids.tolist())
        logits, target, _ = given("indices", "cpu", rows=9)
        assert_step("indices", fused.cross_entropy, logits, target)  # and here, between batches
    assert sorted(seen) == list(range(12)) and len(workers) == 2 and os.getpid() not in workers
    assert all(map(torch.equal, before, results(0, 2048, 512)))
    print("done")


def run_python(script: str, **environment: str) -> list[str]:
    """Words that a fresh process prints. Whatever hangs or dies in it does not take the tests with it."""
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.split()


def test_data_loader_workers():
    """In a process in which autograd has no threads of its own, for a GPU say: it refuses to work in a fork then."""
    script = "import test_modes; test_modes.use_data_loader_workers()"
    assert run_python(script, CUDA_VISIBLE_DEVICES="") == ["done"]


FORK = """
    import os, signal, sys, warnings
    warnings.simplefilter("ignore")
    import torch, torch.nn.functional as F
    import fusedloss.functional as fused

    def child_gives_the_same(library, name, shape, seconds, threads=None):
        x = torch.randn(shape, requires_grad=True)
        target = torch.randn(shape) if name == "mse_loss" else torch.zeros(shape[0], dtype=torch.int64)
        expected = getattr(library, name)(x, target)
        expected.backward()
        again = x.detach().requires_grad_()
        pid = os.fork()
        if pid == 0:  # computes nothing else, because the rest of torch may hang as well
            signal.alarm(seconds)  # ends the child where it hangs
            same = False
            try:
                if threads is not None:
                    torch.set_num_threads(threads)
                loss = getattr(library, name)(again, target)
                loss.backward()
                same = torch.equal(loss, expected) and torch.equal(again.grad, x.grad)
            finally:
                os._exit(0 if same else 7)
        return os.waitpid(pid, 0)[1] == 0

    torch.set_num_threads(2)
    x, target = torch.randn(4096, 512, requires_grad=True), torch.zeros(4096, dtype=torch.int64)
    for library in (F, fused):
        library.cross_entropy(x, target).backward()  # the threads of this process have started
    for name in ("cross_entropy", "mse_loss"):
        print(child_gives_the_same(fused, name, (64, 100), 60))
        print(child_gives_the_same(fused, name, (4096, 512), 60, threads=1))
        shape = (1, 30000)
        print(not child_gives_the_same(F, name, shape, 5) or child_gives_the_same(fused, name, shape, 60))
"""


def test_a_forked_child():
    """GNU OpenMP's threads do not survive a fork, and torch's losses hang then. Where those work, so do these."""
    assert run_python(FORK, CUDA_VISIBLE_DEVICES="") == ["True"] * 6


def test_threads_of_python():
    seeds = list(range(24))
    alone = [results(seed, 128, 300) for seed in seeds]
    for workers in (2, 8):
        with ThreadPoolExecutor(workers) as pool:
            together = list(pool.map(lambda seed: results(seed, 128, 300), seeds))
        for found, expected in zip(together, alone, strict=True):
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_for_several_threads(kind, device):
    ours, _, _ = functions(kind)
    input, target, options = given(kind, device, rows=200)
    send_one()
    expected = step(ours, input, target, torch.ones((), device=device), **options)[1]
    leaf = input.requires_grad_()
    loss = ours(leaf, target, **options)
    with ThreadPoolExecutor(8) as pool:
        grads = list(pool.map(lambda _: torch.autograd.grad(loss, leaf, retain_graph=True)[0], range(32)))
    assert all(torch.equal(grad, expected) for grad in grads)
    assert len({grad.data_ptr() for grad in grads}) == len(grads)  # to each its own


def test_autocast_is_of_one_thread():
    input, target, _ = given("indices", "cpu", dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16), ThreadPoolExecutor(1) as pool:
        assert pool.submit(fused.cross_entropy, input, target).result().dtype == torch.bfloat16
        assert fused.cross_entropy(input, target).dtype == torch.float32


# ---- tensor subclasses and function modes ----


class Kept(Tensor):
    """What torch's functions make of it is of this class again."""


class Tabled(Tensor):
    """Has its own versions of torch's functions, as unit or named tensors do."""

    table: dict = {}  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in cls.table:
            return cls.table[function](*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})


class Disabled(Tensor):
    """A subclass by name only, which torch's functions do not ask."""

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
    """It was filled with torch's functions, before anyone patched them."""
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
    # A function that is not in the table is computed, and the class kept.
    Tabled.table.clear()
    assert type(library.mse_loss(input, input.as_subclass(Tabled))) is Tabled


@pytest.mark.parametrize("kind", KINDS)
def test_subclasses_of_torch_dispatch(kind, patched, device):
    """Wrappers: both of the tensors within are computed with, by torch's own function."""
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
    """Notes torch's functions."""

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
    """The same numbers; in memory they have the other sign, and a bit says so. As the imaginary part of a conjugate."""
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
    """Values or errors."""
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


# ---- modules, errors ----


def test_functional_call(device):
    """The buffer of a module, replaced for a call."""
    input, target, _ = given("indices", device)
    module = fusedloss.CrossEntropyLoss(weight=torch.ones(CLASSES, device=device), reduction="sum")
    weight = torch.rand(CLASSES, device=device)
    loss = torch.func.functional_call(module, {"weight": weight}, (input.requires_grad_(), target))
    assert is_fused(loss)
    assert_exact(loss, reference.cross_entropy(input, target, weight, reduction="sum"), scale=10)
    assert torch.equal(module.weight, torch.ones(CLASSES, device=device))
    # Soft targets, weights that are differentiated, a stack of weights under vmap.
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
    """Of what is asked of it, of a hook in it, of another forward pass."""
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


# ---- debug ----


def conversions(target: Tensor) -> int:
    """How often a forward pass converts a tensor, `target.cpu()` of the check on the host among them."""
    logits = torch.zeros(*target.shape, CLASSES, device=target.device)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        fused.cross_entropy(logits, target)
    return sum(event.name == "aten::to" for event in profiler.events())


@pytest.fixture
def undo_debug() -> Iterator[None]:
    before = _backend._debug
    yield
    fusedloss.debug(before)


def test_debug_is_switched_on_and_off(undo_debug, device):
    target = torch.zeros(4, dtype=torch.int64, device=device)
    fusedloss.debug(False)
    without = conversions(target)
    fusedloss.debug()
    assert [conversions(target) for _ in range(2)] == [without + 1] * 2  # at every forward pass
    fusedloss.debug(False)
    assert conversions(target) == without


@pytest.mark.parametrize("enabled", [True, False])
def test_messages_of_the_check(enabled, undo_debug, device):
    if device == "cuda" and not enabled:
        pytest.skip("a device-side assertion, after which no other test could run")
    fusedloss.debug(enabled)
    logits, target = torch.randn(6, CLASSES, 4, device=device), torch.randint(0, CLASSES, (6, 4), device=device)
    target[0] = -1
    fused.cross_entropy(logits, target, ignore_index=-1)
    target[3, 2], target[5, 0] = CLASSES, -100
    for options in ({"ignore_index": -1}, {"ignore_index": -1, "label_smoothing": 0.1, "reduction": "none"}):
        with pytest.raises(
            IndexError, match=r"target\[3, 2\] is 7, expected a class index in \[0, 7\) or ignore_index -1"
        ):
            fused.cross_entropy(logits, target, **options)
    # As the op that a dispatch mode or the compiler calls.
    with pytest.raises(IndexError, match=r"target\[3, 2\] is 7"):
        torch.ops.fusedloss.cross_entropy_forward(logits, target, None, 1, -1, 0.0, False)
    # Probabilities are no indices, and what the kernels accept is not refused.
    assert_step("probabilities", fused.cross_entropy, *given("probabilities", device)[:2])
    assert_step("indices", fused.cross_entropy, *given("indices", device)[:2])


def test_a_module_that_is_loaded_later_is_told(undo_debug, monkeypatch):
    """Debugging may be asked for before the compiled part is found, or by the environment."""

    class Module:
        enabled = False

        def set_debug(self, enabled: bool) -> None:
            self.enabled = enabled

    monkeypatch.setattr(_backend, "_module", None)
    for enabled in (True, False):
        fusedloss.debug(enabled)
        _backend.use(module := Module())
        assert module.enabled is enabled
        monkeypatch.setattr(_backend, "_module", None)


def test_the_environment_switches_debug():
    script = """
        import torch, fusedloss.functional
        from torch.profiler import ProfilerActivity, profile

        def conversions():
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                fusedloss.functional.cross_entropy(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
            return sum(event.name == "aten::to" for event in profiler.events())

        with_check = conversions()
        fusedloss.debug(False)
        print(with_check - conversions())
    """
    assert run_python(script, FUSEDLOSS_DEBUG="1") == ["1"]
