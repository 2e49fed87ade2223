"""The benchmark's method: what it counts, in which order it times, what it refuses to time, what it writes down."""

import json
import re
import runpy
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn

import fusedloss
from benchmarks import __main__ as command
from benchmarks import contenders, contention, machine, measure, plot, report, suites
from benchmarks.arguments import sizes
from benchmarks.cases import Case, all_cases, bytes_moved, make_inputs
from benchmarks.losses import CUSTOM, LOSSES
from benchmarks.measure import CaseResult, Measurement, measure_case
from benchmarks.memory import peak_extra_bytes
from benchmarks.timing import Effort, Step, Times, interleave
from benchmarks.worker import EagerWithHugePages
from fusedloss.expression import parse, to_torch

BRIEF = Effort(min_rounds=3, max_rounds=3, seconds=0, batch_seconds=0)
TINY = ["--sizes", "4x3", "--no-compile"]


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "EFFORT", BRIEF)
    monkeypatch.setattr(command, "QUICK_EFFORT", BRIEF)


def composed_custom_loss(expression: str, **parameters: float):
    """What `fusedloss.custom_loss` computes, by torch's operations, without a compiler."""
    value = to_torch(parse(expression, ("input", "target"), tuple(parameters)), ("input", "target", *parameters))
    return lambda input, target: value(input, target, *parameters.values()).mean()


# What is counted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "dtype", "step", "expected"),
    [
        ("cross_entropy", "float32", "forward", 6 * 5 * 4 + 6 * 8),
        ("cross_entropy", "float32", "forward+backward", 2 * 6 * 5 * 4 + 6 * 8),
        ("cross_entropy", "bfloat16", "forward+backward", 2 * 6 * 5 * 2 + 6 * 8),
        ("mse", "float64", "forward", 2 * 6 * 5 * 8),
        ("bce", "float32", "forward+backward", 3 * 6 * 5 * 4),
        ("gaussian_nll", "float32", "forward", 3 * 6 * 5 * 4),
        ("gaussian_nll", "float32", "forward+backward", 5 * 6 * 5 * 4),
        ("nll", "float32", "forward", 6 * 4 + 6 * 8),
        ("nll", "bfloat16", "forward+backward", 6 * 2 + 6 * 8 + 6 * 5 * 2),
        ("log_cosh", "bfloat16", "forward+backward", 3 * 6 * 5 * 2),
        ("mse", "float16", "forward+backward", 3 * 6 * 5 * 2),
    ],
)
def test_bytes_that_must_move(loss: str, dtype: str, step: str, expected: int) -> None:
    assert bytes_moved(Case(loss, 6, 5, dtype, step)) == expected


def test_bytes_are_those_of_the_tensors_that_are_timed() -> None:
    for case in all_cases(set(LOSSES) - {"nll"}, [(7, 3)], ["float32", "bfloat16"], "cpu"):
        operands = make_inputs(case)
        gradients = [operand.nbytes for operand in operands if operand.requires_grad]
        written = sum(gradients) if case.step == "forward+backward" else 0
        assert bytes_moved(case) == sum(operand.nbytes for operand in operands) + written


def test_bytes_of_other_shapes_and_targets() -> None:
    for options in ({"inner": (4, 2)}, {"target": "probabilities"}, {"weighted": True, "label_smoothing": 0.1}):
        case = Case("cross_entropy", 7, 3, "float32", "forward+backward", **options)
        logits, target = make_inputs(case)
        assert logits.shape == case.shape and target.shape[0] == 7
        assert bytes_moved(case) == 2 * logits.nbytes + target.nbytes


def test_inputs_are_random_leaves_of_the_dtype() -> None:
    for case in all_cases(["cross_entropy", "mse"], [(50, 20)], ["float32", "float16"], "cpu"):
        logits, _ = make_inputs(case)
        assert logits.is_leaf and logits.requires_grad and logits.dtype == case.torch_dtype
        assert 0.9 < logits.detach().float().std().item() < 1.1
        assert not torch.equal(logits, make_inputs(case, seed=1)[0])


def test_values_are_those_of_training() -> None:
    def operands(loss: str) -> list[torch.Tensor]:
        return [operand.detach() for operand in make_inputs(Case(loss, 50, 20, "float32", "forward"))]

    for loss in LOSSES:
        for operand in operands(loss):
            assert operand.float().std() > 0.02
    assert set(operands("soft_margin")[1].unique().tolist()) == {-1.0, 1.0}
    assert set(operands("focal")[1].unique().tolist()) == {0.0, 1.0}
    _, target = operands("bce")
    assert 0 <= target.min() < 0.1 and 0.9 < target.max() <= 1
    _, counts = operands("poisson_nll")
    assert torch.equal(counts, counts.round()) and counts.min() == 0 and counts.max() > 3
    assert operands("gaussian_nll")[2].min() >= 0.1
    for log_probabilities in (operands("kl_div")[0], operands("nll")[0]):
        torch.testing.assert_close(log_probabilities.exp().sum(1), torch.ones(50))
    torch.testing.assert_close(operands("kl_div")[1].sum(1), torch.ones(50))


def test_weights_are_one_a_class_for_each_option_that_takes_them() -> None:
    for loss, names in (("cross_entropy", {"weight"}), ("bce", {"weight", "pos_weight"})):
        options = Case(loss, 4, 30, "bfloat16", "forward", weighted=True).options
        assert set(options) == names
        for weight in options.values():
            assert weight.shape == (30,) and weight.dtype == torch.bfloat16 and weight.unique().numel() > 20


def test_peak_memory_is_exact() -> None:
    def two_at_a_time() -> None:
        first = torch.empty(1000)  # 4,000 bytes
        second = torch.empty(500)  # 2,000 beside them: the peak
        del first, second
        torch.empty(250)

    before = torch.empty(10_000)  # not the step's, and freed in none of its calls
    assert peak_extra_bytes(two_at_a_time, "cpu") == 6000
    del before


def test_peak_memory_of_a_backward_holds_the_gradient() -> None:
    logits = torch.randn(64, 32, requires_grad=True)

    def step() -> None:
        logits.sum().backward()
        logits.grad = None

    scalars = 1024
    assert logits.nbytes <= peak_extra_bytes(step, "cpu") < logits.nbytes + scalars


# In which order it is timed -------------------------------------------------------------------------------------------


def test_rounds_interleave_and_rotate() -> None:
    called: list[str] = []
    steps = {name: (lambda name=name: called.append(name)) for name in "abc"}

    def timer(step, calls: int) -> float:
        step()
        return 1.0

    effort = Effort(min_rounds=4, max_rounds=4, seconds=0)
    times = interleave(steps, timer, effort)
    warm_up = 2 * len(steps)
    assert "".join(called[warm_up:]) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(times[name].samples) for name in steps} == {"a": 4, "b": 4, "c": 4}


def test_small_steps_are_called_often_and_all_equally() -> None:
    cost = {"slow": 1e-2, "fast": 1e-4}
    asked: dict[str, int] = {}

    def timer(step, calls: int) -> float:
        asked[step.__name__] = calls
        return cost[step.__name__]

    def slow() -> None: ...
    def fast() -> None: ...

    times = interleave({"slow": slow, "fast": fast}, timer, Effort(2, 2, seconds=0, batch_seconds=2e-3))
    assert asked == {"slow": 20, "fast": 20}
    assert times["fast"].calls == 20
    assert times["slow"].median == 1e-2


def test_rounds_end_at_the_upper_bound_however_much_time_is_left() -> None:
    times = interleave({"a": lambda: None}, lambda step, calls: 1.0, Effort(2, 5, seconds=3600))
    assert len(times["a"].samples) == 5


def test_quartiles() -> None:
    times = Times([5.0, 1.0, 3.0, 2.0, 4.0], calls=1)
    assert times.median == 3.0
    assert times.quartiles == (2.0, 4.0)
    assert Times([7.0], calls=1).quartiles == (7.0, 7.0)


def test_a_step_leaves_no_gradient_and_takes_turns() -> None:
    seen = []

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        assert logits.grad is None
        seen.append((logits, torch.is_grad_enabled()))
        return nn.functional.cross_entropy(logits, target)

    for step, grad_enabled in (("forward", False), ("forward+backward", True)):
        case = Case("cross_entropy", 4, 3, "float32", step)
        inputs = [make_inputs(case, seed) for seed in range(2)]
        call = contenders.make_step(loss, case, inputs)
        seen.clear()
        for _ in range(4):
            call()
        assert all(logits.grad is None for logits, _ in inputs)
        assert [enabled for _, enabled in seen] == [grad_enabled] * 4
        first, second, third, fourth = (logits for logits, _ in seen)
        assert first is third and second is fourth and first is not second


def test_preparation_is_not_timed() -> None:
    step = Step(run=lambda: None, prepare=lambda: time.sleep(0.01))
    assert step.seconds(3) < 0.005


def test_logits_in_place_are_made_anew() -> None:
    case = Case("cross_entropy", 40, 3, "float32", "forward+backward", in_place=True)
    logits, target = make_inputs(case)
    seen = []

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append((logits.data_ptr(), logits.detach().clone()))
        return contenders.fused(case)(logits, target)

    step = contenders.make_step(loss, case, [(logits, target)])
    step()
    step()
    (place, first), (same_place, second) = seen
    assert place == same_place and torch.equal(first, logits) and torch.equal(second, logits)
    with pytest.raises(RuntimeError, match="leaf"):
        contenders.fused(case)(logits, target)


def test_huge_pages_are_asked_for_in_another_process() -> None:
    eager = EagerWithHugePages(Case("cross_entropy", 4, 3, "float32", "forward+backward", inner=(2,)))
    try:
        environment = Path(f"/proc/{eager.process.pid}/environ").read_bytes().split(b"\0")
        assert b"THP_MEM_ALLOC_ENABLE=1" in environment
        assert eager.seconds(3) > 0 and eager.core_seconds > 0
    finally:
        eager.close()
    assert eager.process.returncode == 0


# What it refuses to time ----------------------------------------------------------------------------------------------


class OffByALittle(nn.CrossEntropyLoss):
    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super().forward(logits, target) * 1.01


class WrongGradient(nn.CrossEntropyLoss):
    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        value = super().forward(logits, target)
        return value.detach() + 1.01 * (value - value.detach())


class Broken(nn.CrossEntropyLoss):
    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no kernel\nfor this")


@pytest.mark.parametrize(
    ("module", "note"),
    [
        (OffByALittle, "wrong loss: off by"),
        (WrongGradient, "wrong gradient: off by"),
        (Broken, "NotImplementedError: no kernel"),
    ],
)
def test_a_wrong_or_failing_contender_has_a_note_and_no_figures(
    module: type[nn.Module], note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(contenders.CONTENDERS, "fusedloss", lambda case: module())
    case = Case("cross_entropy", 8, 5, "float32", "forward+backward")
    result = measure_case(case, ["eager", "fusedloss"], BRIEF)
    assert result.measurements["fusedloss"].note.startswith(note)
    assert "\n" not in result.measurements["fusedloss"].note
    assert result.measurements["fusedloss"].times is None
    assert result.ratio("fusedloss") is None
    assert result.median("eager") is not None
    assert report.verdict([result]).startswith("fusedloss ahead of eager in 0 of 1 rows")
    assert report.notes([result]) == [
        f"cross_entropy 8x5 float32 forward+backward: fusedloss: {result.measurements['fusedloss'].note}"
    ]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_torch_and_fusedloss_pass_the_check_in_every_dtype(dtype: str) -> None:
    for case in all_cases(["cross_entropy", "mse"], [(128, 10), (512, 1000)], [dtype], "cpu"):
        result = measure_case(case, ["eager", "fusedloss"], Effort(1, 1, seconds=0, batch_seconds=0))
        assert [measurement.note for measurement in result.measurements.values()] == ["", ""]


@pytest.mark.parametrize("loss", CUSTOM)
def test_custom_losses_are_the_eager_ones(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusedloss, "custom_loss", composed_custom_loss)
    case = Case(loss, 40, 30, "float64", "forward+backward")
    operands = make_inputs(case)
    reference = measure.reference_results(case, operands)
    assert len(reference) == 2 and reference[0].item() > 0.01
    assert measure.disagreement(contenders.fused(case), case, operands, reference) == ""


def test_every_gradient_is_checked() -> None:
    case = Case("gaussian_nll", 8, 5, "float32", "forward+backward")
    operands = make_inputs(case)
    reference = measure.reference_results(case, operands)
    assert len(reference) == 3

    def without_gradient_of_var(input: torch.Tensor, target: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        return nn.functional.gaussian_nll_loss(input, target, var.detach())

    assert measure.disagreement(contenders.eager(case), case, operands, reference) == ""
    assert measure.disagreement(without_gradient_of_var, case, operands, reference) == "no gradient"
    contenders.make_step(contenders.eager(case), case, [operands])()
    assert all(operand.grad is None for operand in operands)


def test_a_compiler_that_fails_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("no working C++ compiler found")

    monkeypatch.setattr(torch, "compile", no_compiler)
    result = measure_case(Case("mse", 4, 3, "float32", "forward"), ["eager", "compile", "fusedloss"], BRIEF)
    assert result.measurements["compile"].note == "RuntimeError: no working C++ compiler found"
    assert result.ratio("fusedloss") is not None


# How quiet the machine was --------------------------------------------------------------------------------------------


def test_other_programs_are_told_from_our_own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, others = iter([0.0, 10.0]), iter([100.0, 104.0])
    monkeypatch.setattr(contention.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(contention, "core_seconds_of_others", lambda: next(others))
    monkeypatch.setattr(contention, "usable_cores", lambda: {0, 1})
    assert contention.start_watch()() == pytest.approx(0.2)  # 4 of the 2 x 10 seconds


def test_own_work_is_not_counted_as_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    one_core = "cpu  9 9 9 9 9 9 9 9\ncpu0 100 10 200 5000 60 3 4 1000 0 0\ncpu1 9 9 9 9 9 9 9 9\n"
    monkeypatch.setattr(contention.Path, "read_text", lambda self: one_core)
    monkeypatch.setattr(contention, "usable_cores", lambda: {0})
    monkeypatch.setattr(contention.os, "times", lambda: SimpleNamespace(user=1.0, system=2.0))
    monkeypatch.setattr(contention.os, "sysconf", lambda name: 100)
    # All but idle (5000) and iowait (60) is 1317 ticks of a hundredth of a second.
    assert contention.core_seconds_of_others() == pytest.approx(13.17 - 3)


def test_a_busy_machine_is_a_note() -> None:
    case = Case("mse", 4, 3, "float32", "forward")
    assert report.unrest([CaseResult(case, others_share=0.05), CaseResult(case, others_share=None)]) == []
    (note,) = report.unrest([CaseResult(case, others_share=0.05), CaseResult(case, others_share=0.35)])
    assert note.startswith("other programs had 20% of the cores during the timing, 35% in the worst case")


# What it prints and writes --------------------------------------------------------------------------------------------


def result_with(eager: float, fused: float | None) -> CaseResult:
    def measurement(seconds: float | None) -> Measurement:
        return Measurement(Times([seconds], 1) if seconds else None, 0)

    case = Case("cross_entropy", 1000, 1000, "float32", "forward")
    return CaseResult(case, {"eager": measurement(eager), "fusedloss": measurement(fused)})


def test_ratio_and_bandwidth() -> None:
    result = result_with(eager=4e-3, fused=1e-3)
    assert result.ratio("fusedloss") == 4.0
    assert result.gb_per_s("fusedloss") == pytest.approx(4.008)  # 4,008,000 bytes in a millisecond


def test_share_of_the_copy() -> None:
    result = result_with(eager=4e-3, fused=1e-3)
    copy = Measurement(Times([1e-3], 1))  # reads and writes 4,000,000 bytes each in a millisecond
    result = CaseResult(result.case, {**result.measurements, "copy": copy})
    assert result.share_of_copy("fusedloss") == pytest.approx(4.008 / 8)


def test_ratios_are_green_ahead_and_red_behind() -> None:
    assert "green" in str(report.ratio(1.01).style)
    assert "red" in str(report.ratio(0.99).style)


def test_verdict_counts_rows_ahead() -> None:
    results = [result_with(2e-3, 1e-3), result_with(1e-3, 2e-3), result_with(1e-3, None)]
    assert report.verdict(results) == "fusedloss ahead of eager in 1 of 3 rows (forward 1 of 3)"


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**31, "2 GiB")])
def test_size_is_readable(count: int, text: str) -> None:
    assert report.size(Measurement(peak_extra_bytes=count)) == text


@pytest.mark.usefixtures("brief")
def test_table_is_whole_in_a_narrow_place(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    command.main([*TINY, "--dtype", "bfloat16"])
    printed, errors = capsys.readouterr()
    for step in ("fwd", "fwd+bwd"):
        rows = [line for line in printed.splitlines() if line.split()[:3] == ["4x3", "bf16", step]]
        assert len(rows) >= 4 and len(rows) % 2 == 0, "of each loss, in each part of the table"
        assert all(re.fullmatch(r" *4x3 bf16 \S+( +(\d\S*|±\d+%|B|KiB))+ *", row) for row in rows), rows
    assert "…" not in printed
    assert re.fullmatch(r"fusedloss ahead of eager in \d of 4 rows \(.*\)", printed.strip().splitlines()[-1])
    assert errors == "", "no progress bar outside a terminal"


def drawn_up(case: Case, names: list[str]) -> CaseResult:
    """Figures that take as much place as any."""
    times = Times([0.8e-5, 1.2345e-5, 2.9e-5], 1)
    return CaseResult(case, {name: Measurement(times, 1023 * 2**20 + 12345) for name in names}, others_share=0.5)


@pytest.mark.parametrize("suite", [None, "cpu", "pointwise", "scaling", "goals", "cuda"])
def test_table_fits_80_columns(suite: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether it goes to a terminal or to a file, with every figure in it."""
    options = SimpleNamespace(suite=suite, no_compile=False, device="cpu", loss=None, quick=True)
    options.sizes, options.dtype = command.SIZES, command.DEFAULT_DTYPES
    plan = command.plan_of(options)
    if suite in command.CUDA_SUITES:  # their own shapes, which plan_of makes tiny without a GPU
        plan = [(case, suites.cuda_contenders(case)) for case in getattr(suites, suite)()]
    results = [drawn_up(case, names) for case, names in plan]
    names = [name for name in report.COLUMNS if any(name in each for _, each in plan)]
    for terminal in (True, False):
        console = Console(soft_wrap=True, width=80, force_terminal=terminal, no_color=True)
        for part in report.tables(console, results, names, "cpu"):
            console.print(part)
        lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
        assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
        timed = sum(len(each) for _, each in plan)
        assert sum(line.count("±") for line in lines) == timed
        assert sum(line.count("x ") for line in lines if line.startswith("   ")) >= timed - 2 * len(plan)
    wide = Console(width=400)
    assert len(report.tables(wide, results, names, "cpu")) == 1


def test_plot_leaves_gaps_and_says_how_busy_the_machine_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    results = [result_with(40e-3, 1e-3), result_with(1e-3, 2e-3), result_with(3e-3, None)]
    results[0].measurements["compile"] = Measurement(Times([2e-3], 1))
    results = [replace(result, others_share=0.5) for result in results]
    axis = Figure().subplots()
    plot.draw_ratios(axis, results)
    assert axis.get_xscale() == "log"
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axis.patches]
    assert bars == [(1, 40), (1, 0.5), (1, 2)], "against eager, and once against compile"
    assert sorted(text.get_text() for text in axis.texts) == ["0.5", "2", "40"]
    plot.save(tmp_path / "plot.svg", results, "a machine", plot.draw_ratios)
    drawn = (tmp_path / "plot.svg").read_text()
    assert "a machine" in drawn and "note: other programs had 50% of the cores" in drawn


@pytest.mark.parametrize(("module", "missing"), [("benchmarks", "rich"), ("benchmarks.demo", "matplotlib")])
def test_what_is_not_installed_is_one_sentence(module: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "argv", [module])
    with pytest.raises(SystemExit, match=f"{missing}.*pip install.*{missing}"):
        runpy.run_module(module, run_name="__main__")


def test_plot_without_matplotlib_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        command.parse(["--plot", "figures.png"])
    assert "--plot draws with matplotlib: pip install matplotlib" in capsys.readouterr().err


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("suite", ["cpu", "pointwise", "scaling"])
def test_a_suite_is_printed_written_and_drawn(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = getattr(suites, suite)()
    assert len(set(cases)) == len(cases)

    def small(case: Case) -> Case:
        return replace(case, rows=min(case.rows, 3), classes=min(case.classes, 40), inner=tuple(2 for _ in case.inner))

    contenders_of = {
        "cpu": ["eager", "eager, THP", "fusedloss", "copy"],
        "pointwise": ["eager", "fusedloss", "copy"],
        "scaling": ["eager", "fusedloss"],
    }[suite]
    if suite == "pointwise":  # a process for each case takes long, and 'cpu' has it
        monkeypatch.setattr(suites, "CPU_CONTENDERS", contenders_of)
        monkeypatch.setattr(fusedloss, "custom_loss", composed_custom_loss)
    monkeypatch.setattr(suites, suite, lambda: list(dict.fromkeys(map(small, cases))))
    monkeypatch.setattr(command, "SUITE_EFFORT", BRIEF)
    files = [tmp_path / name for name in ("figures.json", "figures.svg")]
    command.main(["--suite", suite, "--no-compile", "--json", str(files[0]), "--plot", str(files[1])])
    printed = capsys.readouterr().out
    assert "note:" not in printed.replace("note: other programs", "")
    if suite == "cpu":
        assert all(option in printed for option in ("probabilities", "smoothing 0.1", "weights", "in place"))
        assert "% of copy bandwidth: fusedloss's GB/s over the copy's" in printed
        assert re.search(r"^.*% of copy\b.*\n.*\bbandwidth\b", printed, re.MULTILINE), "the column's title"
        assert re.search(r"^ +3x21x2x2 fp32 .*%", printed, re.MULTILINE)
    figures = json.loads(files[0].read_text())["figures"]
    assert {figure["contender"] for figure in figures} == set(contenders_of)
    assert "<svg" in files[1].read_text()


@pytest.mark.usefixtures("brief")
def test_json_holds_every_figure_and_where_it_came_from(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    command.main([*TINY, "--json", str(path)])
    written = json.loads(path.read_text())
    assert written["schema"] == report.SCHEMA
    assert written["date"].endswith("+00:00")
    assert set(written["commit"]) == {"hash", "dirty"}
    assert set(written["machine"]) == {
        "cpu", "cpu_capability", "cores", "threads", "memory_bytes", "gpu", "os",
    }  # fmt: skip
    assert written["machine"]["memory_bytes"] > 2**20
    assert set(written["software"]) == {"torch", "cuda", "fusedloss", "python", "compiler"}
    assert written["software"]["torch"] == torch.__version__
    assert set(written["memory_mapping"]) == {"thp_enabled", "thp_defrag", "THP_MEM_ALLOC_ENABLE"}

    figures = written["figures"]
    keys = {(f["loss"], f["dtype"], f["pass"], f["contender"]) for f in figures}
    assert len(keys) == len(figures) == 2 * 2 * 2 * 2  # losses, dtypes, passes, contenders
    for figure in figures:
        assert figure["note"] == ""
        assert (figure["rows"], figure["classes"], figure["device"]) == (4, 3, "cpu")
        assert len(figure["samples_s"]) == BRIEF.max_rounds
        assert min(figure["samples_s"]) <= figure["first_quartile_s"] <= figure["median_s"]
        assert figure["median_s"] <= figure["third_quartile_s"] <= max(figure["samples_s"])
        assert figure["gb_per_s"] == pytest.approx(figure["bytes_moved"] / figure["median_s"] / 1e9)
        assert figure["peak_extra_bytes"] > 0
        if figure["contender"] == "eager":
            assert figure["times_faster_than_eager"] == 1.0


def test_without_git_the_environment_names_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "run", lambda *command: None)
    monkeypatch.setenv("FUSEDLOSS_COMMIT", "abc")
    assert machine.commit() == {"hash": "abc", "dirty": None}


def test_the_pointwise_suite_has_every_loss_at_one_size() -> None:
    cases = suites.pointwise()
    assert {case.loss for case in cases} == set(LOSSES) - {"cross_entropy"}
    assert {case.rows * case.classes for case in cases} == {10**7}
    assert [case.loss for case in cases if case.dtype == "bfloat16"] == ["mse", "huber", "bce"]
    assert [(case.loss, case.classes) for case in cases if case.weighted] == [("bce", 100)]
    losses = [case.loss for case in cases]
    assert losses == sorted(losses, key=losses.index), "the rows of a loss stand together"


def test_every_loss_of_the_library_is_timed() -> None:
    modules = {name for name in fusedloss.__all__ if name.endswith("Loss")}
    timed = {type(loss.fused()).__name__ for name, loss in LOSSES.items() if name not in CUSTOM}
    assert timed == modules


def test_quick_has_a_row_of_the_family_and_of_custom_losses() -> None:
    def added(*arguments: str) -> list[Case]:
        plan = command.plan_of(command.parse(["--no-compile", *arguments]))
        return [case for case, _ in plan if case.loss not in command.DEFAULT_LOSSES]

    size = command.QUICK_SIZES[-1]
    assert added("--quick") == [Case(loss, *size, "float32", "forward+backward") for loss in ("bce", "log_cosh")]
    assert added() == added("--quick", "--loss", "mse") == []


def test_custom_losses_are_compiled_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def custom_loss(expression: str, **_: float) -> None:
        made.append(expression)
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(fusedloss, "custom_loss", custom_loss)
    contenders.warm_up("cpu", ["mse", "log_cosh"])
    assert made == ["log(cosh(input - target))"]
    result = measure_case(Case("log_cosh", 4, 3, "float32", "forward"), ["eager", "fusedloss"], BRIEF)
    assert result.measurements["fusedloss"].note == "RuntimeError: no C++ compiler"


def test_quick_compiles_only_what_training_runs() -> None:
    quick, full = command.parse(["--quick"]), command.parse([])
    forward, both = (Case("mse", 128, 10, "float32", step) for step in ("forward", "forward+backward"))
    assert command.contenders_of(forward, quick) == ["eager", "fusedloss"]
    assert command.contenders_of(both, quick) == ["eager", "compile", "fusedloss"]
    assert command.contenders_of(forward, full) == ["eager", "compile", "fusedloss"]
    assert quick.sizes[0] == (128, 10) and quick.dtype == ["float32", "bfloat16"]


# Arguments ------------------------------------------------------------------------------------------------------------


def test_sizes() -> None:
    assert sizes("128x10, 4096X1000") == [(128, 10), (4096, 1000)]


def test_lists_may_be_repeated_or_comma_separated() -> None:
    options = command.parse(["--dtype", "float16,float64", "--dtype", "float32", "--loss", "mse"])
    assert options.dtype == ["float16", "float64", "float32"]
    assert options.loss == ["mse"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--sizes", "12"], "'12' is not a size: give rows x classes, such as 128x10"),
        (["--sizes", "0x10"], "'0x10' is not a size"),
        (["--sizes", "4x-3"], "'4x-3' is not a size"),
        (["--sizes", "4x3x2"], "'4x3x2' is not a size"),
        (["--dtype", "float8"], "'float8' is not one of float32, bfloat16, float16, float64"),
        (["--loss", "hinge"], "'hinge' is not one of cross_entropy, mse, l1"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--plot", "figures.gif"], "--plot figures.gif: expected a name that ends in .png or .svg"),
        (["--suite", "cpu", "--quick"], "--suite cpu is a fixed set of cases, which --quick cannot change"),
        (["--suite", "cpu", "--dtype", "float32", "--device", "cpu"], "which --dtype and --device cannot change"),
        (["--json", "/no/such/place/figures.json"], "the directory /no/such/place does not exist"),
    ],
)
def test_bad_arguments_are_one_sentence(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err.strip().splitlines()[-1]


def test_cuda_without_a_gpu_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for option in ("--device", "--suite"):
        with pytest.raises(SystemExit):
            command.main([option, "cuda"])
        assert f"{option} cuda needs a GPU, and torch sees none" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("brief")
def test_cuda_is_timed_by_events_on_rotating_inputs(tmp_path: Path) -> None:
    assert measure.copies(Case("mse", 4, 3, "float32", "forward", "cuda")) > 1
    path = tmp_path / "figures.json"
    command.main([*TINY, "--device", "cuda", "--json", str(path)])
    figures = json.loads(path.read_text())["figures"]
    assert {figure["note"] for figure in figures} == {""}
    assert all(figure["peak_extra_bytes"] > 0 and figure["median_s"] > 0 for figure in figures)


def test_progress_is_drawn_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("mse", 4, 3, "float32", "forward")
    for terminal in (True, False):
        console = Console(force_terminal=terminal, record=True, width=100)
        measure.measure_all([(case, ["eager"])], BRIEF, console)
        assert ("mse 4x3 float32 forward" in console.export_text()) == terminal
