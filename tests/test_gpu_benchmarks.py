"""What `make gpu` runs on a GPU, as far as it can be seen without one: its steps, its method, its choice of cases."""

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import __main__ as command
from benchmarks import copying, kernels, measure, ncu, peers, profiled, report, representative, suites, sweep, timing
from benchmarks.cases import Case, gradient_bytes, make_inputs
from benchmarks.losses import CUSTOM, LOSSES
from benchmarks.measure import CaseResult, Measurement
from benchmarks.timing import Effort, Step, Times

ROOT = Path(__file__).resolve().parent.parent
BRIEF = Effort(min_rounds=2, max_rounds=2, seconds=0, batch_seconds=0)
SMALL = Case("cross_entropy", 4, 3, "float32", "forward")


# The clock ------------------------------------------------------------------------------------------------------------


class Clock:
    """A GPU's: steps move it, events read it."""

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
    kept_busy = 5  # while the host queues 5 calls
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
    # A few tensors of that size are there at once.
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
    # No loss sees two sizes: a compiled one would be slower code for any.

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
    """What liger's does: after the forward pass, the logits are the gradient."""

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
    # The compiler is needed for custom losses, and another file times those.
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


# The representative problems ------------------------------------------------------------------------------------------


def test_representative_problems_are_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = list(representative.problems())
    assert len(set(map(str, problems))) == len(problems)
    some = [*problems[::19], problems[-1]]
    assert {problem.dtype for problem in some} == set(representative.DTYPES)
    monkeypatch.setattr(representative, "problems", lambda: some)
    path = tmp_path / "outcomes.json"
    with pytest.raises(SystemExit) as stop:
        representative.main(["--device", "cpu", "--json", str(path)])
    printed = capsys.readouterr().out
    assert not stop.value.code, printed
    *begun, last = printed.splitlines()
    assert begun == list(map(str, some)) and last.startswith(f"{len(some)} of {len(some)} problems on cpu, 0 of ")
    outcomes = json.loads(path.read_text())
    assert set(outcomes) == set(map(str, some))
    names = {problem.loss: list(outcomes[str(problem)]) for problem in some}
    for problem in some:
        assert list(outcomes[str(problem)]) == names[problem.loss]
    assert "gradient in place error" in names["cross_entropy"] and "loss crc32" in names["mse_loss"]


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_result_fails(
    factor: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = representative.functional.mse_loss
    monkeypatch.setattr(
        representative.functional, "mse_loss", lambda *args, **options: exact(*args, **options) * factor
    )
    problem = representative.Problem("mse_loss", "float32", (9,), {"reduction": "mean"})
    monkeypatch.setattr(representative, "problems", lambda: [problem])
    with pytest.raises(SystemExit) as stop:
        representative.main(["--device", "cpu"])
    assert stop.value.code
    assert "wrong: mse_loss float32 9 reduction=mean: gradient error" in capsys.readouterr().out


@pytest.mark.parametrize("failure", [RuntimeError("CUDA error: an illegal access\nand more"), KeyboardInterrupt()])
def test_what_ends_the_problems_names_the_one_and_loses_none(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = representative.run

    def failing(problem: representative.Problem, device: str) -> dict[str, float]:
        if problem.shape == (4099,):
            raise failure
        return run(problem, device)

    monkeypatch.setattr(representative, "run", failing)
    problems = [representative.Problem("mse_loss", "float32", (n,), {}) for n in (1, 9, 4099, 2)]
    monkeypatch.setattr(representative, "problems", lambda: problems)
    path = tmp_path / "outcomes.json"
    with pytest.raises(type(failure)):
        representative.main(["--device", "cpu", "--json", str(path)])
    assert list(json.loads(path.read_text())) == ["mse_loss float32 1", "mse_loss float32 9"]
    name = f"{type(failure).__name__}: {str(failure)[:29]}"
    assert capsys.readouterr().out.splitlines()[-3:-1] == [
        "mse_loss float32 4099",
        f"failed at: mse_loss float32 4099: {name}",
    ]


def test_some_of_the_problems_can_be_chosen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(representative, "run", lambda problem, device: {})
    with pytest.raises(SystemExit):
        representative.main(["--device", "cpu", "--dtype", "bfloat16,float32", "--every", "2"])
    *chosen, _ = capsys.readouterr().out.splitlines()
    of_two = [str(p) for p in representative.problems() if p.dtype in ("bfloat16", "float32")]
    assert chosen == of_two[::2]


# The kernels ----------------------------------------------------------------------------------------------------------


def test_the_profiler_sees_one_call_of_each_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    switched: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: switched.append(name))
    profiled.main(["--device", "cpu"])
    assert switched == ["start", "stop"] * len(profiled.cases())
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(profiled.cases()) and printed[0] == "cross_entropy 3x40 bfloat16 forward+backward"
    profiled.main(["--device", "cpu", "--seconds", "0"])
    assert capsys.readouterr().out == "no time is left for the other cases\n"


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void fusedloss::cuda::(anonymous namespace)::forward_rows<float, false>(fusedloss::Options)", "forward_rows"),
        ("void at::native::reduce_kernel<4, at::native::ReduceOp<float>>(int)", "reduce_kernel"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD "),
        ("triton_red_fused_0", "triton_red_fused_0"),
    ],
)  # fmt: skip
def test_short_names_of_kernels(name: str, short: str) -> None:
    assert kernels.short_name(name) == short


def test_time_of_each_kernel_is_that_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def event(name: str, start: float, end: float) -> SimpleNamespace:
        span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(name=name, time_range=span, device_type=SimpleNamespace(name="CUDA"))

    events = [event("spin_kernel(long)", 0, 1000)]
    for call in range(kernels.CALLS):
        start = 1000 + 50 * call
        events += [
            event("void fill<int>(int)", start + 40, start + 43),
            event("void ns::rows<float>(int)", start, start + 30),
        ]
    profiler = contextlib.nullcontext(SimpleNamespace(events=lambda: events))
    monkeypatch.setattr(kernels, "profile", lambda **_: profiler)
    for name in ("synchronize", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    called: list[None] = []
    span, each = kernels.measure(Step(lambda: called.append(None)), "cuda")
    assert list(each.items()) == [("rows", pytest.approx(30)), ("fill", pytest.approx(3))]
    assert span == pytest.approx((4 * 50 + 43) / kernels.CALLS)
    assert len(called) == kernels.WARM_UP_CALLS + kernels.CALLS


NCU = """==PROF== Connected to process 77 (/usr/bin/python3.12)
==PROF== Profiling "forward_rows" - 0: 0%....50%....100% - 34 passes
"ID","Kernel Name","Block Size","Grid Size","gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",\
"gpu__time_duration.sum","launch__registers_per_thread","sm__warps_active.avg.pct_of_peak_sustained_active",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_long_scoreboard_not_issued_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_membar_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",\
"smsp__issue_active.avg.pct_of_peak_sustained_active"
"","","","","%","ns","register/thread","%","inst","inst","inst","inst","inst","%"
"0","void fusedloss::cuda::forward_rows<__nv_bfloat16, 0>(T1)","(256, 1, 1)","(8192, 1, 1)","88.61","350,123.00","64",\
"37.21","0.71","9.99","7.12","2.30","1.94","41.52"
==PROF== Disconnected from process 77
"1","forward_columns","(16, 16, 1)","(64, 2, 1)","","12,000","56","","","","","","",""
""".replace("\\\n", "")


def test_a_kernel_of_nsight_compute_is_one_line() -> None:
    assert ncu.lines(NCU) == [
        "forward_rows 8192 of 256: 350.1us, DRAM 89%, occupancy 37%, registers 64, issue 42%, "
        "stalls long_scoreboard 7.1, membar 2.3, wait 1.9",
        "forward_columns 64x2 of 16x16: 12.0us, DRAM -%, occupancy -%, registers 56, issue -%, stalls -",
    ]
    assert ncu.lines("==ERROR== ERR_NVGPUCTRPERM\n") == []


# The tuning -----------------------------------------------------------------------------------------------------------


def test_the_sweep_names_the_settings_that_gain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuning: dict[str, int] = {}
    asked: list[tuple[str, int]] = []
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now, sleep=lambda seconds: None)
    monkeypatch.setattr(timing, "time", clock)

    def set_tuning(name: str, value: int) -> None:
        asked.append((name, value))
        if name == "target_weight_rows":
            raise ValueError("no such tuning: target_weight_rows")
        tuning.clear()
        tuning.update({} if name == "defaults" else {name: value})

    def fused(case: Case) -> Callable[..., Tensor]:
        def loss(logits: Tensor, target: Tensor) -> Tensor:
            clock.now += 1e-3 if tuning == {"warp_bytes": 2048} else 4e-3
            return nn.functional.cross_entropy(logits, target) * (1.5 if "max_blocks" in tuning else 1)

        return loss

    monkeypatch.setattr(sweep._backend.extension(), "set_cuda_tuning", set_tuning, raising=False)
    monkeypatch.setattr(sweep, "fused", fused)
    monkeypatch.setattr(sweep, "CONTENDERS", {})
    monkeypatch.setattr(measure, "loss_of", lambda name, case: sweep.CONTENDERS[name](case))
    monkeypatch.setattr(sweep, "VALUES", {"warp_bytes": (2048,), "max_blocks": (1, 2), "target_weight_rows": (1,)})
    monkeypatch.setattr(sweep, "EFFORT", replace(BRIEF, min_rounds=1, max_rounds=1))  # the defaults are not last
    monkeypatch.setattr(sweep, "cases", lambda: [suites.on_cuda(8192, 32000)])
    path = tmp_path / "sweep.jsonl"
    sweep.main(["--device", "cpu", "--records", str(path)])
    printed = capsys.readouterr().out
    assert re.fullmatch(
        r"cross_entropy 3x40 bf16: defaults 4000\.0us warp_bytes=2048 \+300\.0%"
        r"; max_blocks=2: wrong loss: off by .*"
        r"; target_weight_rows=1: ValueError: no such tuning: target_weight_rows\n",
        printed,
    )
    (record,) = map(json.loads, path.read_text().splitlines())
    names = ["defaults", "warp_bytes=2048", "max_blocks=1", "max_blocks=2", "target_weight_rows=1"]
    assert [figure["contender"] for figure in record["figures"]] == names
    assert asked[-1] == ("defaults", 0) and tuning == {}


def test_without_a_way_to_set_the_tuning_the_sweep_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sweep._backend.extension(), "set_cuda_tuning", raising=False)
    with pytest.raises(SystemExit, match="the extension has no set_cuda_tuning"):
        sweep.main(["--device", "cpu"])


def test_every_name_that_is_swept_is_known() -> None:
    set_tuning = getattr(sweep._backend.extension(), "set_cuda_tuning", None)
    if set_tuning is None:
        pytest.skip("this extension has no set_cuda_tuning")
    try:
        for name, values in sweep.VALUES.items():
            for value in values:
                set_tuning(name, value)
    finally:
        set_tuning("defaults", 0)
    with pytest.raises(ValueError):
        set_tuning("no_such_name", 1)


# The script -----------------------------------------------------------------------------------------------------------

STUB = r"""#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
[[ "$*" == *"${HANGS:-nothing}"* ]] && {
    trap 'echo interrupted, and printed what there is; exit 1' INT
    for _ in {1..300}; do sleep 0.1; done
}
[[ "$*" == *"$FAILS"* && ${FAILED_PRINTS:-} ]] && case "$*" in
    -c*) exit 0 ;;
    *"-m pytest"*) printf 'a line of noise\nFAILED tests/test_a.py::test_b - AssertionError\n' ;;
    *racecheck*) printf 'a line of noise\n========= Error: Race reported between\n========= RACECHECK SUMMARY: 1\n' ;;
    *representative*) printf 'a line of noise\nwrong: problem: gradient error 3\n' ;;
    *--suite*) echo lines of a case ;;
esac
case "$*" in
    -c*xdist*) exit 1 ;;
    *setup.py*) echo built ;;
    *"$FAILS"*) echo broken; exit 3 ;;
    *) echo "end of ${*: -1}" ;;
esac
"""


def run_script(
    tmp_path: Path, *steps: str, fails: str = "nothing", **environment: str
) -> tuple[subprocess.CompletedProcess, list[str]]:
    """The script's outcome, and what it called, with stubs of everything that it calls."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("python", "nvidia-smi", "nvcc", "compute-sanitizer", "ncu"):
        (tools / tool).write_text(STUB)
        (tools / tool).chmod(0o755)
    calls = tmp_path / "calls"
    stubs = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python")}
    done = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh", tmp_path / "out", *steps],
        env={**os.environ, **stubs, "CALLS": str(calls), "FAILS": fails, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, calls.read_text().splitlines() if calls.exists() else []


def outcomes(done: subprocess.CompletedProcess) -> dict[str, str]:
    """Of each step in the summary."""
    lines = done.stdout.partition("== summary\n")[2].splitlines()
    matched = [re.fullmatch(r"(.*?) +\d+s  (\w+)(: .*)?", line) for line in lines]
    assert all(matched), lines
    return {match[2]: match[1] for match in matched if match}


STEPS = [
    "build", "representative", "kernels", "goals", "sweep", "profile", "bench", "memcheck", "racecheck", "initcheck",
    "synccheck", "test", "test_compiler", "test_large",
]  # fmt: skip
FIRST = ["build", "representative", "kernels", "goals", "sweep", "profile", "memcheck", "racecheck", "test"]


@pytest.mark.parametrize(
    ("asked_for", "steps"),
    [
        (["all"], STEPS),
        ([], FIRST),
        (["first"], FIRST),
        (["second"], ["build", "representative", "kernels", "bench"]),
        (["second", "synccheck"], ["build", "representative", "kernels", "bench", "synccheck"]),
    ],
    ids=str,
)
def test_steps_run_and_are_summed_up(asked_for: list[str], steps: list[str], tmp_path: Path) -> None:
    done, calls = run_script(tmp_path, *asked_for)
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcomes(done).keys() == set(steps) and set(outcomes(done).values()) == {"passed"}
    assert not any("setup.py" in call for call in calls), "what is prebuilt is taken"
    assert not any("-n 8" in call for call in calls)  # without xdist
    # What is timed runs first, and alone: whatever comes later begins when it has ended.
    timed = [place for place, call in enumerate(calls) if re.search("kernels|--suite|sweep", call)]
    beside = [place for place, call in enumerate(calls) if re.search("compute-sanitizer|-m pytest", call)]
    assert timed and (not beside or max(timed) < min(beside))
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written >= {"output.txt", *(f"{name}.log" for name in steps)}
    assert (tmp_path / "out" / "output.txt").read_text() == done.stdout


def test_without_a_prebuilt_extension_it_is_built(tmp_path: Path) -> None:
    done, calls = run_script(tmp_path, "build", fails="fusedloss.describe")
    assert outcomes(done) == {"build": "passed"} and sum("setup.py" in call for call in calls) == 1


def test_a_step_that_fails_stops_none_and_fails_the_whole(tmp_path: Path) -> None:
    done, calls = run_script(tmp_path, "representative", "bench", fails="-m benchmarks.representative --device")
    assert done.returncode == 1
    assert outcomes(done) == {"representative": "failed (3)", "bench": "passed"}
    assert "== representative: failed (3)\nbroken\n" in done.stdout
    assert not any("setup.py" in call or "-m pytest" in call for call in calls)


def test_what_matters_of_a_steps_output_is_shown(tmp_path: Path) -> None:
    done, _ = run_script(tmp_path, "test", "racecheck", "goals", "representative", fails="-m", FAILED_PRINTS="1")
    assert set(outcomes(done).values()) == {"failed (3)"}
    for shown in (
        "== test: failed (3)\nFAILED tests/test_a.py::test_b - AssertionError\nbroken\n",
        "== racecheck: failed (3)\n========= Error: Race reported between\n",
        "== representative: failed (3)\nwrong: problem: gradient error 3\n",
        "\nlines of a case\n",
    ):
        assert shown in done.stdout
    assert "a line of noise" not in done.stdout


def test_a_step_is_interrupted_at_its_limit_and_the_next_one_runs(tmp_path: Path) -> None:
    done, _ = run_script(tmp_path, "kernels", "sweep", KERNELS_SECONDS="1", HANGS="benchmarks.kernels")
    assert outcomes(done) == {"kernels": "ended at 1s", "sweep": "passed"} and done.returncode == 1
    assert "interrupted, and printed what there is" in done.stdout


def test_what_is_left_of_the_time_in_all_limits_a_step(tmp_path: Path) -> None:
    done, calls = run_script(tmp_path, "kernels", "sweep", SECONDS_IN_ALL="6", HANGS="benchmarks.kernels")
    assert re.fullmatch("ended at [56]s", outcomes(done)["kernels"]) and outcomes(done)["sweep"] == "skipped"
    assert not any("sweep" in call for call in calls)


def test_without_a_gpu_nothing_runs(tmp_path: Path) -> None:
    done, calls = run_script(tmp_path, fails="is_available")
    assert done.returncode == 1 and done.stdout.endswith("gpu.sh: torch sees no GPU\n")
    assert not any("setup.py" in call or "-m" in call.split() for call in calls)


def test_the_documents_name_every_step() -> None:
    document = (ROOT / "docs" / "benchmarks.md").read_text()
    assert [step for step in STEPS if f"`{step}`" not in document] == []


def test_make_gpu_runs_the_script() -> None:
    arguments = ["make", "--no-print-directory", "-n", "gpu", "STEPS=second test", "OUT=folder", "PYTHON=python9"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "PYTHON=python9 bash benchmarks/gpu.sh folder second test\n"


def test_an_unknown_step_is_one_sentence(tmp_path: Path) -> None:
    done, calls = run_script(tmp_path, "biuld")
    assert done.returncode == 2 and not calls
    assert done.stderr.startswith("gpu.sh: biuld is not one of: first second all build representative kernels")


def test_the_script_runs_on_the_cpu_too(tmp_path: Path) -> None:
    """With everything real, at tiny sizes."""
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh", out, "representative", "kernels", "goals", "sweep", "memcheck"],
        env={**os.environ, "DEVICE": "cpu", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=180,
    )
    found = outcomes(done)
    if not hasattr(sweep._backend.extension(), "set_cuda_tuning"):
        assert found.pop("sweep") == "failed (1)" and "no set_cuda_tuning" in done.stdout
    assert found == {**dict.fromkeys(found, "passed"), "memcheck": "skipped"}, done.stdout + done.stderr
    assert "representative: passed\n15 of 15 problems on cpu, 0 of " in done.stdout
    assert "cross_entropy 3x40 bf16: " in done.stdout and "cross_entropy_forward_with_grad " in done.stdout
    for name in ("kernels.jsonl", "goals.jsonl"):
        assert len((out / name).read_text().splitlines()) >= len(kernels.cases())
    assert len(json.loads((out / "goals.json").read_text())["figures"]) >= 3 * len(suites.goals())
    assert (out / "goals.png").stat().st_size > 10_000
    assert len(done.stdout) < 10_000


def test_files_of_tests_that_need_what_is_missing_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "test_here.py").write_text("def test(): pass\n")
    (tmp_path / "test_left_out.py").write_text("import no_such_package\n")

    def run() -> subprocess.CompletedProcess:
        arguments = ["-p", "benchmarks.leave_out", "-p", "no:cacheprovider", "-c", os.devnull, "-ra", tmp_path]
        return subprocess.run(
            [sys.executable, "-m", "pytest", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
        )

    done = run()
    assert done.returncode == 0, done.stdout
    assert "no_such_package is not installed" in done.stdout and "1 passed, 1 skipped" in done.stdout
    (tmp_path / "test_ours.py").write_text("import fusedloss.no_such_module\n")
    assert "1 error" in run().stdout
