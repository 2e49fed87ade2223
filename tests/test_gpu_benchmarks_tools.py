"""What `make gpu` runs beside the benchmark: representative problems, profiles, kernel times and the sweep."""

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from benchmarks import kernels, measure, ncu, profiled, representative, suites, sweep, timing
from benchmarks.cases import Case
from benchmarks.timing import Effort, Step

BRIEF = Effort(min_rounds=2, max_rounds=2, seconds=0, batch_seconds=0)


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
    # In a single round the defaults are not timed last, so the sweep must restore them.
    monkeypatch.setattr(sweep, "EFFORT", replace(BRIEF, min_rounds=1, max_rounds=1))
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
