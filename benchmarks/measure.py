"""One case from start to end: build the contenders, verify them, weigh their memory, time them side by side."""

import gc
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from .cases import Case, bytes_moved, gradient_bytes, make_inputs
from .contenders import OTHERS, eager, loss_of, make_step, overwrites_logits
from .contention import start_watch
from .losses import Loss
from .memory import peak_extra_bytes
from .timing import Effort, Step, Times, host_seconds, interleave, timer_for
from .worker import EagerWithHugePages

MAX_COPIES = 64
CHECKED_ELEMENTS = 1 << 28  # of logits, at most, that are compared with the reference, whose tensors are of float64
HOST_COUNTS_BELOW = 1 << 20  # bytes of logits: where a GPU takes less time than its host to launch the kernels
PAUSE_BETWEEN_PROCESSES = 0.02
# Of the loss, and of the largest entry of the gradient. Wide: the tests are the judge, this only keeps wrong kernels
# out of a table of speeds.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Measurement:
    """A contender's figures in one case, or the reason why it has none."""

    times: Times | None = None
    peak_extra_bytes: int | None = None
    note: str = ""
    host_seconds: float | None = None  # a call's, until the GPU has its work; of small cases on CUDA


@dataclass(frozen=True)
class CaseResult:
    case: Case
    measurements: dict[str, Measurement] = field(default_factory=dict)
    others_share: float | None = None  # of the cores, used by other programs while the case was timed

    def median(self, name: str) -> float | None:
        measurement = self.measurements.get(name)
        return measurement.times.median if measurement and measurement.times else None

    def ratio(self, name: str, to: str = "eager") -> float | None:
        """How many times faster `name` is than `to`: above 1 is ahead."""
        mine, theirs = self.median(name), self.median(to)
        return theirs / mine if mine and theirs else None

    def gb_per_s(self, name: str) -> float | None:
        median = self.median(name)
        moved = 2 * gradient_bytes(self.case) if name == "copy" else bytes_moved(self.case)
        return moved / median / 1e9 if median else None

    def share_of_copy(self, name: str) -> float | None:
        """Bytes that must move a second, as a part of those that a copy moves."""
        mine, limit = self.gb_per_s(name), self.gb_per_s("copy")
        return mine / limit if mine and limit else None


def measure_all(
    plan: Iterable[tuple[Case, list[str]]],
    effort: Effort,
    progress_console: Console,
    keep: Callable[[CaseResult], None] = lambda result: None,
) -> list[CaseResult]:
    """Every case of the plan with its contenders, under a progress bar where there is a terminal to draw it.

    `keep` is called with each result at once. An interrupt ends the run after the cases that are done.
    """
    plan = list(plan)
    results = []
    with quick_garbage_collection(), progress_bar(progress_console) as progress:
        task = progress.add_task("", total=len(plan))
        for case, names in plan:
            progress.update(task, description=str(case), refresh=True)
            try:
                results.append(measure_case(case, names, effort))
            except RuntimeError as error:  # no memory for a case of this size, or a device that has failed
                note = Measurement(note=first_line(error))
                results.append(CaseResult(case, dict.fromkeys(names, note)))
            except KeyboardInterrupt:
                break
            keep(results[-1])
            progress.advance(task)
    return results


@contextmanager
def quick_garbage_collection() -> Iterator[None]:
    """A case has two collections. They pass over what is there now: torch's modules are a great many objects."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # Refreshed by hand, between cases: a thread that redraws the bar would take a core from the kernels.
    with Progress(
        *columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
    ) as progress:
        yield progress


def measure_case(case: Case, names: list[str], effort: Effort) -> CaseResult:
    """A contender that fails, or is wrong, gets a note instead of figures and stops nobody else."""
    if case.device == "cuda":
        gc.collect()  # what the case before has left, and the allocator keeps in blocks of its sizes
        torch.cuda.empty_cache()
    inputs = [make_inputs(case, seed) for seed in range(copies(case))]
    checked, operands = part_to_check(case, inputs[0])
    reference = reference_results(checked, operands)
    steps: dict[str, Step] = {}
    notes: dict[str, str] = {}
    for name in names:
        try:
            if name in OTHERS:
                steps[name], notes[name] = OTHERS[name](case, inputs), ""
                continue
            loss, overwrites = loss_of(name, checked), overwrites_logits(name)
            notes[name] = disagreement(loss, checked, operands, reference, overwrites)
            if checked != case:
                loss = loss_of(name, case)  # anew: the compiler's code for a second size would be slower
            steps[name] = make_step(loss, case, inputs, overwrites)
            steps[name]()  # compiles what is compiled at first use
        except Exception as error:  # a compiler can raise anything
            notes[name] = first_line(error)
    del reference, operands
    sound = {name: step for name, step in steps.items() if not notes[name]}
    peaks = {name: peak_extra_bytes(step, case.device) for name, step in sound.items() if name not in OTHERS}
    helpers = [step for step in sound.values() if isinstance(step, EagerWithHugePages)]
    others_share = start_watch(lambda: sum(helper.core_seconds for helper in helpers))
    times = interleave(sound, timer_for(case.device), effort, pause=PAUSE_BETWEEN_PROCESSES if helpers else 0.0)
    for helper in helpers:
        helper.close()
    host_counts = case.device == "cuda" and gradient_bytes(case) < HOST_COUNTS_BELOW
    host = {name: host_seconds(step) for name, step in sound.items() if host_counts and name not in OTHERS}
    measurements = {name: Measurement(times.get(name), peaks.get(name), notes[name], host.get(name)) for name in names}
    return CaseResult(case, measurements, others_share())


def copies(case: Case) -> int:
    """On CUDA, as many inputs as it takes for the second-level cache to have lost one before its next turn."""
    if case.device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(case.device).L2_cache_size
    size = sum(operand.nbytes for operand in make_inputs(case))
    return min(MAX_COPIES, math.ceil(2 * cache / size) + 1)


def part_to_check(case: Case, operands: tuple[Tensor, ...]) -> tuple[Case, tuple[Tensor, ...]]:
    """The case, or one of its first rows alone where float64 of all would not fit beside what is timed."""
    rows = CHECKED_ELEMENTS // math.prod(case.shape[1:])
    if case.rows <= rows:
        return case, operands
    part = (operand.detach()[:rows].requires_grad_(operand.requires_grad) for operand in operands)
    return replace(case, rows=rows), tuple(part)


def reference_results(case: Case, operands: tuple[Tensor, ...]) -> list[Tensor]:
    """Torch's loss and gradients in float64."""
    exact_case = replace(case, dtype="float64", in_place=False)
    exact = tuple(
        operand.detach().double().requires_grad_(operand.requires_grad) if operand.is_floating_point() else operand
        for operand in operands
    )
    return loss_and_gradients(eager(exact_case), exact_case, exact)


def loss_and_gradients(
    loss: Loss, case: Case, operands: tuple[Tensor, ...], overwrites: bool = False
) -> list[Tensor | None]:
    """What one step computes, by the same path as the timed step, so that nothing else gets compiled for it."""
    first, *others = operands
    given = first * 1 if case.in_place or overwrites else first
    if case.step == "forward":
        with torch.no_grad():
            return [loss(given, *others)]
    value = loss(given, *others)
    value.backward()
    results = [value.detach()]
    for operand in operands:
        if operand.requires_grad:
            results.append(operand.grad)
            operand.grad = None
    return results


def disagreement(
    loss: Loss, case: Case, operands: tuple[Tensor, ...], reference: list[Tensor], overwrites: bool = False
) -> str:
    """Why the results are wrong, or nothing."""
    results = loss_and_gradients(loss, case, operands, overwrites)
    for index, (mine, exact) in enumerate(zip(results, reference, strict=True)):
        what = "gradient" if index else "loss"
        if mine is None:
            return f"no {what}"
        error = (mine.double() - exact).abs().max().item()
        scale = exact.abs().max().item()
        # The gradient of a large mean lies among float16's subnormal numbers: one step of those is no error.
        limits = torch.finfo(case.torch_dtype)
        allowed = TOLERANCE[case.dtype] * scale + limits.tiny * limits.eps
        if not error <= allowed:
            return f"wrong {what}: off by {error:.2g} where the largest entry is {scale:.2g}"
    return ""


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120] if text else ''}".rstrip(": ")
