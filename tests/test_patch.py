"""`fusedloss.patch`: torch's functions are replaced and restored, and unchanged models then use the fused losses."""

import copy
import inspect
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fusedloss
import fusedloss.functional as fused

ROOT = Path(__file__).parent.parent
TORCHS = {"cross_entropy": F.cross_entropy, "mse_loss": F.mse_loss}
OURS = {"cross_entropy": fused.cross_entropy, "mse_loss": fused.mse_loss}
CLASSES = 7


def installed() -> dict[str, Callable]:
    return {name: getattr(F, name) for name in TORCHS}


@pytest.fixture(autouse=True)
def torchs_functions_before_and_after(monkeypatch) -> Iterator[None]:
    """monkeypatch restores the functions of F after the test, whatever the test did."""
    for name, function in TORCHS.items():
        monkeypatch.setattr(F, name, function)
    yield
    fusedloss.unpatch()
    assert not fusedloss._patch._active


def computed_by(run: Callable[[], object]) -> dict[str, int]:
    """How many losses each fused kernel computed, and how many torch's own functions did."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    found = Counter()
    for event in profiler.events():
        if fused_forward := re.match(r"fusedloss::(\w+)_forward", event.name):
            found[fused_forward[1]] += 1
        elif event.name in ("aten::_log_softmax", "aten::mse_loss"):
            found["torch"] += 1
    return dict(found)


def given(name: str, device: str = "cpu") -> tuple[Tensor, Tensor]:
    input = torch.randn(5, CLASSES, device=device)
    target = torch.randint(0, CLASSES, (5,), device=device) if name == "cross_entropy" else torch.randn_like(input)
    return input, target


# ---- replacing and restoring ----


def test_a_call():
    fusedloss.patch()
    assert installed() == OURS
    fusedloss.unpatch()
    assert installed() == TORCHS
    fusedloss.unpatch()  # there is nothing left to undo
    assert installed() == TORCHS


def test_calls_do_not_add_up():
    """One unpatch() undoes all calls of patch()."""
    for _ in range(3):
        fusedloss.patch()
    fusedloss.unpatch()
    assert installed() == TORCHS


def test_a_block():
    with fusedloss.patch() as handle:
        assert isinstance(handle, fusedloss.patch) and installed() == OURS
        with fusedloss.patch():
            assert installed() == OURS
        assert installed() == OURS
    assert installed() == TORCHS


def test_a_block_that_raises():
    with pytest.raises(ValueError, match="from within"), fusedloss.patch():
        assert installed() == OURS
        raise ValueError("from within")
    assert installed() == TORCHS


def test_a_block_may_be_entered_again():
    handle = fusedloss.patch()
    for _ in range(2):
        with handle:
            assert installed() == OURS
        assert installed() == TORCHS


def test_unpatch_within_a_block():
    with fusedloss.patch(), fusedloss.patch():
        fusedloss.unpatch()
        assert installed() == TORCHS
        with fusedloss.patch():
            assert installed() == OURS
        assert installed() == TORCHS
    assert installed() == TORCHS


def test_two_handles_in_any_order():
    for first_to_go in (0, 1):
        handles = [fusedloss.patch(), fusedloss.patch()]
        handles.pop(first_to_go).__exit__(None, None, None)
        assert installed() == OURS  # the outer patch is still active
        handles.pop().__exit__(None, None, None)
        assert installed() == TORCHS


def test_a_block_within_a_call():
    fusedloss.patch()
    with fusedloss.patch():
        pass
    assert installed() == OURS  # the call of patch() is not undone


def test_a_decorator():
    seen = []

    @fusedloss.patch()
    def loss(input: Tensor, target: Tensor, *, depth: int = 0) -> Tensor:
        """As it was."""
        seen.append(installed())
        if depth > 0:
            loss(input, target, depth=depth - 1)
            assert installed() == OURS
        return F.cross_entropy(input, target)

    assert installed() == TORCHS  # defining the function patches nothing
    input, target = given("cross_entropy")
    for _ in range(2):
        result = loss(input.requires_grad_(), target, depth=2)
        assert "fusedloss" in result.grad_fn.name() and installed() == TORCHS
    assert len(seen) == 6 and all(found == OURS for found in seen)
    assert (loss.__name__, loss.__doc__) == ("loss", "As it was.")
    assert list(inspect.signature(loss).parameters) == ["input", "target", "depth"]


def test_a_decorated_function_that_raises():
    @fusedloss.patch()
    def refuse() -> None:
        assert installed() == OURS
        raise ValueError("from within")

    for _ in range(2):
        with pytest.raises(ValueError, match="from within"):
            refuse()
        assert installed() == TORCHS


def theirs(*args, **options) -> str:
    return "theirs"


def test_a_replacement_that_was_there_first():
    F.cross_entropy = theirs
    with fusedloss.patch():
        assert installed() == OURS
    assert installed() == {**TORCHS, "cross_entropy": theirs}


def test_a_replacement_that_came_later_is_kept():
    with fusedloss.patch():
        F.cross_entropy = theirs
        assert F.mse_loss is fused.mse_loss
    assert installed() == {**TORCHS, "cross_entropy": theirs}
    with fusedloss.patch():
        assert installed() == OURS
    assert installed() == {**TORCHS, "cross_entropy": theirs}


def test_a_replacement_that_calls_what_it_replaced():
    """Another library wraps F.cross_entropy in a logger, before or after patch()."""
    logged = []

    def around(function: Callable) -> Callable:
        def call(*args, **options):
            logged.append(function)
            return function(*args, **options)

        return call

    arguments = given("cross_entropy")
    with fusedloss.patch():
        F.cross_entropy = around(F.cross_entropy)
        found = F.cross_entropy(*arguments)
    assert logged == [fused.cross_entropy]
    torch.testing.assert_close(found, TORCHS["cross_entropy"](*arguments))
    F.cross_entropy = around(TORCHS["cross_entropy"])
    with fusedloss.patch():
        F.cross_entropy(*arguments)
    assert len(logged) == 1  # our function does not call it


def test_threads_that_patch_at_once():
    failed = []

    def work() -> None:
        for _ in range(200):
            with fusedloss.patch():
                if installed() != OURS:
                    failed.append(installed())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and installed() == TORCHS


# ---- what computes the losses ----

MODULES = {"cross_entropy": nn.CrossEntropyLoss, "mse_loss": nn.MSELoss}


@pytest.mark.parametrize("name", TORCHS)
def test_functions_and_modules_are_fused(name, device):
    input, target = given(name, device)
    module = MODULES[name](reduction="sum")  # constructed before patch()

    def steps() -> list[Tensor]:
        grads = []
        for loss in (getattr(F, name), module, MODULES[name]()):
            leaf = input.detach().requires_grad_()
            value = loss(leaf, target)
            value.backward()
            grads += [value.detach(), leaf.grad]
        return grads

    expected = steps()
    assert computed_by(steps) == {"torch": 3}
    with fusedloss.patch():
        assert computed_by(steps) == {name: 3}
        found = steps()
    assert computed_by(steps) == {"torch": 3}
    torch.testing.assert_close(found, expected)


def test_the_original_modules_keep_their_class_and_state():
    module = nn.CrossEntropyLoss(weight=torch.rand(CLASSES), label_smoothing=0.1)
    before = copy.deepcopy(module)
    with fusedloss.patch():
        assert type(module) is nn.CrossEntropyLoss and repr(module) == repr(before)
        input, target = given("cross_entropy")
        torch.testing.assert_close(
            module(input, target), fusedloss.CrossEntropyLoss(before.weight, label_smoothing=0.1)(input, target)
        )
    torch.testing.assert_close(module(input, target), before(input, target))


@pytest.mark.parametrize("name", TORCHS)
def test_what_the_kernels_do_not_cover_is_torchs(name, device):
    input, target = given(name, device)
    torchs = TORCHS[name]

    def all_kinds(loss: Callable[..., Tensor]) -> list:
        def of_input(x: Tensor) -> Tensor:
            return loss(x, target)

        meta = loss(input.to("meta"), target.to("meta"), reduction="none")
        assert meta.is_meta
        return [
            torch.func.grad(of_input)(input),
            torch.func.vmap(loss)(input, target),
            torch.func.jvp(of_input, (input,), (input.sin(),)),
            torch.func.hessian(of_input)(input),
            torch.empty_like(meta, device="cpu").zero_(),
            loss(input, torch.ones_like(input).double() / CLASSES),
        ]

    expected = all_kinds(torchs)
    with fusedloss.patch():
        found: list[Tensor] = []
        computed = computed_by(lambda: found.extend(all_kinds(lambda *args, **o: getattr(F, name)(*args, **o))))
    assert computed.keys() == {"torch"}
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", TORCHS)
def test_errors_are_torchs(name):
    input, target = given(name)
    with fusedloss.patch():
        with pytest.raises(ValueError, match="average is not a valid value for reduction"):
            getattr(F, name)(input, target, reduction="average")
        with pytest.raises((ValueError, RuntimeError), match="target"):
            getattr(F, name)(input, target[:3])


# ---- the compiler ----

OPS = {f"fusedloss.{name}_{way}" for name in ("cross_entropy", "pointwise") for way in ("forward", "backward")}


class Losses(nn.Module):
    """A model that uses modules and functions of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.cross_entropy, self.mse = nn.CrossEntropyLoss(label_smoothing=0.1), nn.MSELoss(reduction="sum")

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(input, input.detach().softmax(1))
        return loss + self.cross_entropy(input, target) + self.mse(input, input.detach() * 2)


def eager(loss: Callable[..., Tensor], input: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """The loss's value and gradient."""
    leaf = input.detach().requires_grad_()
    value = loss(leaf, *others)
    value.backward()
    return value.detach(), leaf.grad


def compiled(loss: Callable[..., Tensor], *arguments: Tensor) -> tuple[tuple[Tensor, Tensor], set[str]]:
    """The loss's value and gradient, and the losses in the graphs of its forward and backward pass."""
    from torch._dynamo.testing import AotEagerAndRecordGraphs  # must not be imported before patch()

    recorded = AotEagerAndRecordGraphs()
    found = eager(torch.compile(loss, backend=recorded, fullgraph=True), *arguments)
    nodes = [node for graph in recorded.fw_graphs + recorded.bw_graphs for node in graph.graph.nodes]
    names = {str(node.target).removesuffix(".default") for node in nodes if node.op == "call_function"}
    return found, {name for name in names if any(part in name for part in ("fusedloss", "nll_loss", "mse_loss"))}


def test_compiled_before_and_while_patched():
    arguments = given("cross_entropy")
    model = Losses()
    expected = eager(model, *arguments)
    for patched in (False, True, False):
        torch._dynamo.reset()
        if patched:
            fusedloss.patch()
        found, names = compiled(model, *arguments)
        fusedloss.unpatch()
        torch.testing.assert_close(found, expected)
        assert names == OPS if patched else names and not OPS & names
    # Compiled functions stay right without a reset of the compiler.
    torch._dynamo.reset()
    kept = torch.compile(model, backend="aot_eager", fullgraph=True)
    for context in (torch.enable_grad, fusedloss.patch, torch.enable_grad):
        with context():
            torch.testing.assert_close(eager(kept, *arguments), expected)


def compile_while_patched() -> None:
    input, target = given("cross_entropy")
    model, torchs = Losses(), TORCHS["cross_entropy"]
    expected = eager(model, input, target)
    fusedloss.patch()
    found, names = compiled(model, input, target)
    torch.testing.assert_close(found, expected)
    assert names == OPS, names
    print("fused")
    # Calls that the op does not cover use torch's own function, which the compiler has not traced yet.
    for weight, of in ((torch.rand(CLASSES), target), (torch.rand(CLASSES, requires_grad=True), input.softmax(1))):
        found, names = compiled(lambda x, t, w: F.cross_entropy(x, t, w), input, of, weight)
        torch.testing.assert_close(found, eager(torchs, input, of, weight))
        assert bool(OPS & names) is not weight.requires_grad, names
    found, _ = compiled(lambda x, t: F.mse_loss(x, t), input, input[0].sin())  # broadcast
    torch.testing.assert_close(found, eager(lambda x, t: (x - t).pow(2).mean(), input, input[0].sin()))
    gradient = torch.func.grad(lambda x: F.cross_entropy(x, target))
    found = torch.compile(gradient, backend="aot_eager", fullgraph=True)(input)
    torch.testing.assert_close(found, eager(torchs, input, target)[1])
    print("composed")
    fusedloss.unpatch()
    torch._dynamo.reset()
    found, names = compiled(model, input, target)
    torch.testing.assert_close(found, expected)
    assert names and not OPS & names, names
    print("torch's")


def test_compiled_while_patched_before_the_compiler_was_ever_used():
    """This needs a fresh process, since the compiler determines only once which functions are torch's."""
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import test_patch; test_patch.compile_while_patched()"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines() == ["fused", "composed", "torch's"]


# ---- models of another library ----

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # set before the import, so that nothing is downloaded
VOCABULARY = 101


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="the demonstration on its models needs the transformers library")


SIZES = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "hidden_size": 32, "num_attention_heads": 2}


def gpt2(transformers, device: str) -> tuple[nn.Module, dict]:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return transformers.GPT2LMHeadModel(config).to(device), causal_batch(device)


def llama(transformers, device: str) -> tuple[nn.Module, dict]:
    config = transformers.LlamaConfig(**SIZES, intermediate_size=48, num_hidden_layers=2, num_key_value_heads=1)
    return transformers.LlamaForCausalLM(config).to(device), causal_batch(device)


def causal_batch(device: str) -> dict:
    tokens = torch.randint(0, VOCABULARY, (3, 16), device=device)
    labels = tokens.clone()
    labels[:, :4] = -100  # the prompt is ignored
    labels[0, 12:] = -100  # the padding is ignored
    return {"input_ids": tokens, "labels": labels}


def bert(transformers, device: str, classes: int) -> tuple[nn.Module, dict]:
    config = transformers.BertConfig(
        **SIZES, intermediate_size=48, num_hidden_layers=1, num_labels=classes, hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )  # fmt: skip
    labels = torch.randint(0, classes, (4,), device=device) if classes > 1 else torch.randn(4, device=device)
    model = transformers.BertForSequenceClassification(config).to(device)
    return model, {"input_ids": torch.randint(0, VOCABULARY, (4, 10), device=device), "labels": labels}


MODELS = {
    "GPT-2": (gpt2, "cross_entropy"),
    "Llama": (llama, "cross_entropy"),
    "BERT classifier": (lambda t, d: bert(t, d, classes=4), "cross_entropy"),
    "BERT regression": (lambda t, d: bert(t, d, classes=1), "mse_loss"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name, transformers, device):
    """Loss and gradients agree with the unpatched ones, the fused kernel computes, and training gives the same."""
    build, loss = MODELS[name]
    model, batch = build(transformers, device)
    start = copy.deepcopy(model.state_dict())

    def first_step() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        value = model(**batch).loss
        value.backward()
        return value.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def train() -> list[float]:
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        curve = []
        for _ in range(8):
            optimizer.zero_grad()
            value = model(**batch).loss
            value.backward()
            optimizer.step()
            curve.append(value.item())
        return curve

    assert "fusedloss" not in model(**batch).loss.grad_fn.name()
    (expected, expected_grads), expected_curve = first_step(), train()
    model.load_state_dict(start)
    with fusedloss.patch():
        assert computed_by(first_step) == {loss: 1}
        (found, grads), curve = first_step(), train()
    torch.testing.assert_close(found, expected)
    assert len(grads) > 10
    torch.testing.assert_close(grads, expected_grads)
    assert curve == pytest.approx(expected_curve, rel=1e-3, abs=1e-5)
    assert curve[-1] < curve[0]
    if "labels" in batch and batch["input_ids"].shape == batch["labels"].shape:  # the model predicts the next token
        model.load_state_dict(start)
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].double()
        labels = batch["labels"][:, 1:]
        by_hand = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100].mean()
        torch.testing.assert_close(found.double(), by_hand.detach(), rtol=1e-5, atol=1e-6)
