"""What `make gpu` runs on a GPU, as far as it can be seen without one: its steps, its method, its choice of cases."""

import itertools
import json
import os
import subprocess
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
from benchmarks import copying, measure, peers, profiled, report, representative, suites, timing
from benchmarks.cases import Case, gradient_bytes
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
    start = Clock.now
    assert timing.cuda_timer(Step(pass_time(3), prepare), 5) == pytest.approx(3e-3)
    assert Clock.now - start == (15 if prepare is None else 515)


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


# The suite ------------------------------------------------------------------------------------------------------------


def test_the_suite_covers_what_it_says_within_a_gpus_memory() -> None:
    cases = suites.cuda()
    assert len(set(cases)) == len(cases) < 90
    assert {case.device for case in cases} == {"cuda"}
    large = [case for case in cases if case.loss == "cross_entropy" and case.rows > 128 and not case.inner]
    assert all(suites.CUDA_BYTES <= gradient_bytes(case) < 1.01 * suites.CUDA_BYTES for case in large)
    # The reference holds a few tensors of 8 bytes an element.
    assert max(gradient_bytes(case) // case.torch_dtype.itemsize for case in cases) <= 1 << 28
    contenders = {case: suites.cuda_contenders(case) for case in cases}
    assert all(names[0] == "eager" and names[-1] == "copy" and "fusedloss" in names for names in contenders.values())
    assert 10 <= sum("compile" in names for names in contenders.values()) <= 16
    assert {case.loss for case in cases} >= set(LOSSES) - set(CUSTOM), "every loss of the library"
    with_peers = [case for case, names in contenders.items() if {"liger", "quack"} <= set(names)]
    assert {case.step for case in with_peers} == {"forward", "forward+backward"}
    assert all(case.loss == "cross_entropy" and not case.variant and not case.inner for case in with_peers)


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
def test_the_suite_is_printed_written_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def small(case: Case) -> Case:
        classes = case.classes if case.classes == 1024 else 40  # with peers, and without
        return replace(case, rows=3, classes=classes, inner=tuple(2 for _ in case.inner), device="cpu")

    cases = list(dict.fromkeys(map(small, suites.cuda())))
    parse = command.parse

    def parse_without_a_gpu(arguments: list[str]) -> object:
        options = parse(["--suite", "cpu", *arguments])
        options.suite = "cuda"
        return options

    monkeypatch.setattr(command, "parse", parse_without_a_gpu)
    monkeypatch.setattr(suites, "cuda", lambda: cases)
    monkeypatch.setattr(command, "CUDA_EFFORT", BRIEF)
    files = [tmp_path / name for name in ("figures.json", "figures.svg")]
    command.main(["--no-compile", "--json", str(files[0]), "--plot", str(files[1])])
    printed = capsys.readouterr().out
    assert "note: quack is left out: ModuleNotFoundError" in printed
    assert "liger\npeak" not in printed and "vs" in printed and "of copy" in printed
    written = json.loads(files[0].read_text())
    assert written["peers"] == {"liger": "1.2.3"}
    figures = written["figures"]
    assert {figure["note"] for figure in figures} == {""}
    assert {figure["contender"] for figure in figures} == {"eager", "fusedloss", "liger", "copy"}
    assert all(figure["share_of_copy"] > 0 for figure in figures)
    assert {figure["pass"] for figure in figures if figure["contender"] == "liger"} == {"forward", "forward+backward"}
    drawn = files[1].read_text()
    assert "<svg" in drawn and len(drawn) > 10_000


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
    first, second = measure.measure_all([(SMALL, ["eager"])] * 4, BRIEF, Console(quiet=True))
    assert first == CaseResult(SMALL)
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
    assert printed.startswith(f"{len(some)} problems on cpu, 0 of ")
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


def test_the_profiler_sees_one_call_of_each_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    switched: list[str] = []
    monkeypatch.setattr(profiled, "SIZES", [(4, 3, "bfloat16")])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: switched.append(name))
    profiled.main("cpu")
    assert switched == ["start", "stop"] * 2
    assert capsys.readouterr().out.splitlines() == [
        "cross_entropy 4x3 bfloat16 forward",
        "cross_entropy 4x3 bfloat16 forward+backward",
    ]


# The script -----------------------------------------------------------------------------------------------------------

STUB = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
case "$*" in
    -c*xdist*) exit 1 ;;
    *setup.py*) echo built ;;
    *"$FAILS"*) echo broken; exit 3 ;;
    *) echo "end of ${*: -1}" ;;
esac
"""


def run_script(tmp_path: Path, *steps: str, fails: str = "nothing") -> tuple[subprocess.CompletedProcess, list[str]]:
    """The script's outcome, and what it called, with stubs of everything that it calls."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("python", "nvidia-smi", "nvcc", "compute-sanitizer", "ncu"):
        (tools / tool).write_text(STUB)
        (tools / tool).chmod(0o755)
    calls = tmp_path / "calls"
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python")}
    done = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh", tmp_path / "out", *steps],
        env={**os.environ, **environment, "CALLS": str(calls), "FAILS": fails},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, calls.read_text().splitlines() if calls.exists() else []


def test_all_steps_run_and_are_summed_up(tmp_path: Path) -> None:
    done, calls = run_script(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.partition("== summary")[2]
    names = ["build", "representative", "test_large", "test", "memcheck", "initcheck", "racecheck", "synccheck"]
    for name in [*names, "emulator", "bench", "profile"]:
        assert f"passed            0s  {name}" in summary.replace("   1s", "   0s"), name
    assert "build           built" in summary
    # Timed last, when nothing else runs.
    assert ["--suite cuda" in calls[-2], "ncu" in calls[-1]] == [True, True]
    assert not any("-n 8" in call for call in calls)  # without xdist
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"gpu.log", "sanitize.log", "emulator.log", "bench.log", "profile.log"}
    assert "racecheck" in (tmp_path / "out" / "sanitize.log").read_text()


def test_a_step_that_fails_stops_none_and_fails_the_whole(tmp_path: Path) -> None:
    done, calls = run_script(tmp_path, "representative", "bench", fails="-m benchmarks.representative --json")
    assert done.returncode == 1
    summary = done.stdout.partition("== summary")[2].splitlines()[1:]
    assert [line.split()[0] for line in summary] == ["failed", "passed"]
    assert "(3)" in summary[0] and summary[0].endswith("broken")
    assert not any("setup.py" in call or "-m pytest" in call for call in calls)


def test_without_a_gpu_nothing_runs(tmp_path: Path) -> None:
    done, calls = run_script(tmp_path, fails="is_available")
    assert done.returncode == 1 and done.stderr.endswith("gpu.sh: torch sees no GPU\n")
    assert not any("setup.py" in call or "-m" in call.split() for call in calls)


def test_an_unknown_step_is_one_sentence(tmp_path: Path) -> None:
    done, calls = run_script(tmp_path, "biuld")
    assert done.returncode == 2 and not calls
    assert done.stderr.startswith("gpu.sh: biuld is not one of: build representative test")


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
