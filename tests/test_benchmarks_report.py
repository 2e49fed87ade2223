"""What the benchmark prints, writes and draws, which cases its suites have, and its command line."""

import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
import torch
from helpers.benchmarks import BRIEF, composed_custom_loss
from matplotlib.figure import Figure
from rich.console import Console

import fusedloss
from benchmarks import __main__ as command
from benchmarks import contenders, machine, measure, plot, report, suites
from benchmarks.arguments import sizes
from benchmarks.cases import Case
from benchmarks.losses import CUSTOM, LOSSES
from benchmarks.measure import CaseResult, Measurement, measure_case
from benchmarks.timing import Times

TINY = ["--sizes", "4x3", "--no-compile"]


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "EFFORT", BRIEF)
    monkeypatch.setattr(command, "QUICK_EFFORT", BRIEF)


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
    """A result with figures as wide as any."""
    times = Times([0.8e-5, 1.2345e-5, 2.9e-5], 1)
    return CaseResult(case, {name: Measurement(times, 1023 * 2**20 + 12345) for name in names}, others_share=0.5)


@pytest.mark.parametrize("suite", [None, "cpu", "pointwise", "scaling", "goals", "cuda"])
def test_table_fits_80_columns(suite: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """The table fits both in a terminal and in a file, and has every figure."""
    options = SimpleNamespace(suite=suite, no_compile=False, device="cpu", loss=None, quick=True)
    options.sizes, options.dtype = command.SIZES, command.DEFAULT_DTYPES
    plan = command.plan_of(options)
    if suite in command.CUDA_SUITES:  # take the real shapes, since plan_of makes them tiny without a GPU
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
    if suite == "cpu":  # Each case starts a process, so the 16-bit cases of cross entropy are left out.
        cases = [case for case in cases if case.dtype == "float32" or case.loss == "mse"]

    def small(case: Case) -> Case:
        return replace(case, rows=min(case.rows, 3), classes=min(case.classes, 40), inner=tuple(2 for _ in case.inner))

    contenders_of = {
        "cpu": ["eager", "eager, THP", "fusedloss", "copy"],
        "pointwise": ["eager", "fusedloss", "copy"],
        "scaling": ["eager", "fusedloss"],
    }[suite]
    if suite == "pointwise":  # a process for each case is slow, and the suite 'cpu' covers it
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
