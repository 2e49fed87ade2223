"""How the benchmark measures on a GPU, and its suites for one, tested without a GPU."""

import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import __main__ as command
from benchmarks import copying, measure, peers, report, suites, timing
from benchmarks.cases import Case, gradient_bytes, make_inputs
from benchmarks.losses import CUSTOM, LOSSES
from benchmarks.measure import CaseResult, Measurement
from benchmarks.timing import Effort, Step, Times

BRIEF = Effort(min_rounds=2, max_rounds=2, seconds=0, batch_seconds=0)
SMALL = Case("cross_entropy", 4, 3, "float32", "forward")


# The clock ------------------------------------------------------------------------------------------------------------


class Clock:
    """A simulated clock of a GPU: steps advance it, and events read it."""

    now = 0.0


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Clock.now

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


def pass_time(milliseconds: float) -> Callable[[], None]:
    def pass_it() -> None:
        Clock.now += milliseconds

    return pass_it


@pytest.mark.parametrize("prepare", [None, pass_time(100)])
def test_events_count_the_run_alone(prepare: Callable[[], None] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: pass_time(cycles / timing.QUEUEING_CYCLES)())
    start = Clock.now
    assert timing.cuda_timer(Step(pass_time(3), prepare), 5) == pytest.approx(3e-3)
    kept_busy = 5  # for as long as the host queues 5 calls
    assert Clock.now - start == kept_busy + (15 if prepare is None else 515)


def test_time_of_the_host_is_without_that_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: time.sleep(0.01))
    called: list[None] = []
    assert 0 < timing.host_seconds(Step(lambda: called.append(None))) < 1e-3
    assert len(called) == timing.HOST_BATCHES * timing.HOST_CALLS


def test_time_of_the_host_is_a_note_and_a_figure() -> None:
    times = Times([1e-4], 1)
    result = CaseResult(SMALL, {"eager": Measurement(times, 0, "", 2.5e-5), "copy": Measurement(times)})
    (line,) = report.host_times([result, CaseResult(SMALL, {"eager": Measurement(times)})])
    assert line == "cross_entropy 4x3 float32 forward: microseconds of the host, the GPU not waited for: eager 25"
    assert [figure["host_s"] for figure in report.as_json([result], {})["figures"]] == [2.5e-5, None]


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.read: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        self.read.append((args[1] if "copy_" in str(func) else args[0]).data_ptr())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("seconds", "op"), [([1.0, 2.0], "aten.copy_.default"), ([2.0, 1.0], "aten.mul.out")])
def test_the_faster_copy_is_the_limit(seconds: list[float], op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = itertools.chain.from_iterable([second] * 5 for second in seconds)
    monkeypatch.setattr(copying, "cuda_timer", lambda step, calls: next(taken))
    sources = [torch.randn(8, requires_grad=True) for _ in range(2)]
    copy = copying.make_cuda_copy(sources)
    with Ops() as ops:
        for _ in range(3):
            copy()
    assert set(ops.names) >= {op} and len(set(ops.names) & {"aten.copy_.default", "aten.mul.out"}) == 1
    read = [place for name, place in zip(ops.names, ops.read, strict=True) if name == op]
    assert read == [sources[0].data_ptr(), sources[1].data_ptr(), sources[0].data_ptr()]


def test_the_copy_of_a_slice_is_of_dense_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "cuda_timer", lambda step, calls: 1.0)
    sources = [torch.randn(4, 8)[:, :5].requires_grad_()]
    copy = copying.make_cuda_copy(sources)
    with Ops() as ops:
        copy()
    assert ops.names == ["aten.copy_.default"] and ops.read != [sources[0].data_ptr()]


# The suite ------------------------------------------------------------------------------------------------------------


def test_the_goals_have_the_shapes_that_models_have() -> None:
    cases = suites.goals()
    assert {case.device for case in cases} == {"cuda"} and len(set(cases)) == len(cases)

    def sizes(step: str, dtype: str) -> set[tuple[int, ...]]:
        plain = [case for case in cases if case.loss == "cross_entropy" and not case.variant]
        return {case.shape for case in plain if (case.step, case.dtype) == (step, dtype)}

    training = sizes("forward+backward", "bfloat16")
    assert training >= {(8192, classes) for classes in (32000, 50257, 50304, 128256, 262144)}
    assert training >= {(65536, 1000), (32768, 4096), (524288, 256), (1342178, 100), (65536, 100)}
    assert training >= {(8, 32000, 1024), (8, 32000, 128), (16, 21, 512, 512)}
    assert sizes("forward+backward", "float32") >= {(8192, 32000), (8192, 128256), (128, 10)}
    assert {classes for _, classes in sizes("forward", "bfloat16")} == {1 << power for power in range(11, 19)}
    variants = {case.variant: case.shape for case in cases if case.variant}
    assert variants == {
        **dict.fromkeys(("probabilities", "smoothing 0.1", "weights"), (8192, 32000)),
        "slice of 50304": (8192, 50257),
    }
    assert {case.loss for case in cases} == set(LOSSES) - set(CUSTOM), "every loss of the library"


def test_the_suite_has_the_goals_first_and_more_of_each_dtype() -> None:
    cases = suites.cuda()
    goals = suites.goals()
    assert cases[: len(goals)] == goals and len(set(cases)) == len(cases) < 90
    more = [case for case in cases if case.loss == "cross_entropy" and case.classes in suites.CUDA_CLASSES]
    assert {(case.classes, case.dtype, case.step) for case in more if case.rows > 8} >= set(
        itertools.product(suites.CUDA_CLASSES, ("bfloat16", "float32"), ("forward", "forward+backward"))
    )
    assert all(gradient_bytes(suites.of_cuda_bytes(n, "float32")) >= suites.CUDA_BYTES for n in suites.CUDA_CLASSES)
    # A few tensors of that size exist at the same time.
    assert max(gradient_bytes(case) for case in cases) < 5 * 2**30
    contenders = {case: suites.cuda_contenders(case) for case in cases}
    assert all(names[0] == "eager" and names[-1] == "copy" and "fusedloss" in names for names in contenders.values())
    assert 8 <= sum("compile" in names for names in contenders.values()) <= 12, "it takes seconds each"
    with_peers = [case for case, names in contenders.items() if {"liger", "quack"} <= set(names)]
    assert {case.shape for case in with_peers} == set(suites.AGAINST_ALL)
    assert all(case.loss == "cross_entropy" and not case.variant for case in with_peers)


def test_a_slice_of_padded_classes_is_timed_as_one() -> None:
    case = Case("cross_entropy", 4, 5, "bfloat16", "forward+backward", padding=3)
    logits, _ = make_inputs(case)
    assert logits.shape == (4, 5) and logits.stride() == (8, 1) and logits.is_leaf and logits.requires_grad
    assert torch.equal(logits, make_inputs(replace(case, padding=0))[0])
    result = measure.measure_case(case, ["eager", "fusedloss"], BRIEF)
    assert {measurement.note for measurement in result.measurements.values()} == {""}
    assert report.brief(case) == "cross_entropy 4x5 bf16 slice of 8"


def test_what_is_too_large_for_float64_is_checked_in_its_first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CHECKED_ELEMENTS", 7 * 5)
    seen: list[tuple[int, ...]] = []
    loss_of = measure.loss_of
    # No loss is called with two sizes, since a compiled one would become slower for all sizes.

    def watched(name: str, case: Case) -> Callable[..., Tensor]:
        def loss(logits: Tensor, target: Tensor) -> Tensor:
            assert logits.shape == case.shape
            seen.append(tuple(logits.shape))
            wrong = 1.5 if case.rows == 3 and name == "eager" else 1
            return loss_of(name, case)(logits, target) * wrong

        return loss

    monkeypatch.setattr(measure, "loss_of", watched)
    small = Case("cross_entropy", 7, 5, "float32", "forward+backward")
    measure.measure_case(small, ["fusedloss"], BRIEF)
    assert set(seen) == {(7, 5)}
    seen.clear()
    large = replace(small, rows=8, classes=10)
    result = measure.measure_case(large, ["eager", "fusedloss"], BRIEF)
    assert set(seen) == {(3, 10), (8, 10)}
    assert result.measurements["eager"].note.startswith("wrong loss") and result.median("fusedloss")


class GradientOverLogits(torch.autograd.Function):
    """A loss that writes the gradient over the logits in the forward pass, as liger's does."""

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor) -> Tensor:
        assert logits.abs().max() > 0.5, "logits that have been overwritten"
        with torch.enable_grad():
            leaf = logits.detach().clone().requires_grad_()
            loss = nn.functional.cross_entropy(leaf, target)
            (gradient,) = torch.autograd.grad(loss, leaf)
        logits.data.copy_(gradient)
        ctx.save_for_backward(logits.detach())
        return loss.detach()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * grad, None


@pytest.fixture
def liger_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(peers.PEERS["liger"].module)
    module.LigerCrossEntropyLoss = lambda: GradientOverLogits.apply
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "quack", None)  # cannot be imported

    def version(package: str) -> str:
        if package != "liger-kernel":
            raise peers.metadata.PackageNotFoundError(package)
        return "1.2.3"

    monkeypatch.setattr(peers.metadata, "version", version)


@pytest.mark.usefixtures("liger_alone")
@pytest.mark.parametrize("suite", ["goals", "cuda"])
def test_the_suite_is_tried_out_without_a_gpu(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / name for name in ("figures.json", "figures.svg", "figures.jsonl")}
    # Custom losses need the compiler, and another test file times them.
    cases = [case for case in getattr(suites, suite)() if case.loss not in CUSTOM][::4]
    monkeypatch.setattr(suites, suite, lambda: cases)
    warmed_up: list[list[str]] = []
    monkeypatch.setattr(command, "warm_up", lambda device, losses: warmed_up.append(list(losses)))
    json_file, svg_file, records = (str(path) for path in files.values())
    arguments = ["--suite", suite, "--device", "cpu", "--no-compile"]
    command.main([*arguments, "--records", records, "--json", json_file, "--plot", svg_file])
    printed = capsys.readouterr().out
    assert warmed_up == [[]], "no custom loss is compiled before the first case"
    assert "note: quack is left out: ModuleNotFoundError" in printed
    lines = [line for line in printed.splitlines() if "us " in line]
    assert [line.split()[0] for line in lines] == [case.loss for case in cases]
    assert lines[0].startswith("cross_entropy 3x40 bf16 ") and " of " in lines[0] and " liger " in lines[0]
    assert "liger\npeak" not in printed and "peak" not in printed, "no table"
    written = json.loads(files["figures.json"].read_text())
    assert written["peers"] == {"liger": "1.2.3"}
    figures = written["figures"]
    assert {figure["note"] for figure in figures} == {""}
    assert {figure["contender"] for figure in figures} == {"eager", "fusedloss", "liger", "copy"}
    assert all(figure["share_of_copy"] > 0 for figure in figures)
    first, *others = map(json.loads, files["figures.jsonl"].read_text().splitlines())
    assert first["peers"] == {"liger": "1.2.3"} and first["at"]
    assert [figure for record in others for figure in record["figures"]] == figures
    drawn = files["figures.svg"].read_text()
    assert "<svg" in drawn and len(drawn) > 10_000


def test_a_case_is_one_line() -> None:
    case = Case("cross_entropy", 10, 10, "float32", "forward")
    times = {name: Measurement(Times([seconds], 1)) for name, seconds in (("eager", 3e-4), ("copy", 1e-4))}
    fused = Measurement(Times([1.5e-4], 1), host_seconds=2.5e-5)
    result = CaseResult(case, {**times, "fusedloss": fused, "quack": Measurement(note="Error: no")})
    assert report.line(result) == (
        "cross_entropy 10x10 fp32 forward 150.0us 40% of 100.0us eager 2.00 host: fusedloss 25us; quack: Error: no"
    )


def test_quack_is_asked_for_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("quack.cross_entropy")
    module.cross_entropy = nn.functional.cross_entropy
    monkeypatch.setitem(sys.modules, "quack", ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.cross_entropy", module)
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    assert torch.equal(peers.PEERS["quack"].load()(logits, target), nn.functional.cross_entropy(logits, target))


def test_what_is_measured_survives_a_failure_and_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = iter([CaseResult(SMALL), RuntimeError("CUDA error: out of memory"), KeyboardInterrupt(), "never asked"])

    def measure_case(*_: object) -> CaseResult:
        outcome = next(outcomes)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(measure, "measure_case", measure_case)
    kept: list[CaseResult] = []
    first, second = measure.measure_all([(SMALL, ["eager"])] * 4, BRIEF, Console(quiet=True), kept.append)
    assert kept == [first, second] and first == CaseResult(SMALL)
    assert report.notes([second]) == [f"{SMALL}: eager: RuntimeError: CUDA error: out of memory"]
    assert next(outcomes) == "never asked"


@pytest.mark.parametrize(
    ("results", "complaint"),
    [
        ([], "interrupted after 0 of 2 cases"),
        ([CaseResult(SMALL, {"fusedloss": Measurement(note="wrong")})] * 2, "fusedloss has no figures"),
    ],
)
def test_a_run_that_shows_less_than_asked_for_fails(
    results: list[CaseResult], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "measure_all", lambda *_: results)
    with pytest.raises(SystemExit, match=complaint):
        command.main(["--sizes", "4x3", "--dtype", "float32", "--loss", "mse", "--no-compile", "--quick"])
