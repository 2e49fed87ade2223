"""How the benchmark measures: what it counts, in which order it times, and which results it refuses."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.benchmarks import BRIEF, composed_custom_loss
from torch import nn

import fusedloss
from benchmarks import contenders, contention, measure, report
from benchmarks.cases import Case, all_cases, bytes_moved, make_inputs
from benchmarks.losses import CUSTOM, LOSSES
from benchmarks.measure import CaseResult, measure_case
from benchmarks.memory import peak_extra_bytes
from benchmarks.timing import Effort, Step, Times, interleave
from benchmarks.worker import EagerWithHugePages

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
        second = torch.empty(500)  # 2,000 bytes more: the peak
        del first, second
        torch.empty(250)

    before = torch.empty(10_000)  # does not belong to the step, and is not freed in it
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
    assert contention.start_watch()() == pytest.approx(0.2)  # 4 of 2 cores x 10 seconds


def test_own_work_is_not_counted_as_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    one_core = "cpu  9 9 9 9 9 9 9 9\ncpu0 100 10 200 5000 60 3 4 1000 0 0\ncpu1 9 9 9 9 9 9 9 9\n"
    monkeypatch.setattr(contention.Path, "read_text", lambda self: one_core)
    monkeypatch.setattr(contention, "usable_cores", lambda: {0})
    monkeypatch.setattr(contention.os, "times", lambda: SimpleNamespace(user=1.0, system=2.0))
    monkeypatch.setattr(contention.os, "sysconf", lambda name: 100)
    # All fields but idle (5000) and iowait (60) add up to 1317 ticks of a hundredth of a second.
    assert contention.core_seconds_of_others() == pytest.approx(13.17 - 3)


def test_a_busy_machine_is_a_note() -> None:
    case = Case("mse", 4, 3, "float32", "forward")
    assert report.unrest([CaseResult(case, others_share=0.05), CaseResult(case, others_share=None)]) == []
    (note,) = report.unrest([CaseResult(case, others_share=0.05), CaseResult(case, others_share=0.35)])
    assert note.startswith("other programs had 20% of the cores during the timing, 35% in the worst case")
