"""Measures one case: builds the contenders, verifies them, measures their memory and times them side by side."""

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
CHECKED_ELEMENTS = 1 << 28  # at most, of the logits that are compared with the reference, which is in float64
HOST_COUNTS_BELOW = 1 << 20  # bytes of logits; below it a GPU runs the kernels faster than its host launches them
PAUSE_BETWEEN_PROCESSES = 0.02
# Relative to the loss, and to the largest entry of the gradient. The tolerance is wide: it only keeps wrong kernels out
# of a table of speeds. The tests check the accuracy.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Measurement:
    """A contender's figures in one case, or the reason why there are none."""

    times: Times | None = None
    peak_extra_bytes: int | None = None
    note: str = ""
    host_seconds: float | None = None  # per call, until the work is queued on the GPU; only for small cases on CUDA


@dataclass(frozen=True)
class CaseResult:
    case: Case
    measurements: dict[str, Measurement] = field(default_factory=dict)
    others_share: float | None = None  # of the cores, used by other programs during the timing

    def median(self, name: str) -> float | None:
        measurement = self.measurements.get(name)
        return measurement.times.median if measurement and measurement.times else None

    def ratio(self, name: str, to: str = "eager") -> float | None:
        """How many times faster `name` is than `to`: above 1 is faster."""
        mine, theirs = self.median(name), self.median(to)
        return theirs / mine if mine and theirs else None

    def gb_per_s(self, name: str) -> float | None:
        median = self.median(name)
        moved = 2 * gradient_bytes(self.case) if name == "copy" else bytes_moved(self.case)
        return moved / median / 1e9 if median else None

    def share_of_copy(self, name: str) -> float | None:
        """The bandwidth, counted in bytes that must move, as a fraction of the bandwidth of a copy."""
        mine, limit = self.gb_per_s(name), self.gb_per_s("copy")
        return mine / limit if mine and limit else None


def measure_all(
    plan: Iterable[tuple[Case, list[str]]],
    effort: Effort,
    progress_console: Console,
    keep: Callable[[CaseResult], None] = lambda result: None,
) -> list[CaseResult]:
    """Measure every case of the plan with its contenders, and show a progress bar if there is a terminal.

    `keep` is called with each result as soon as it is measured. An interrupt ends the run and keeps the finished cases.
    """
    plan = list(plan)
    results = []
    with quick_garbage_collection(), progress_bar(progress_console) as progress:
        task = progress.add_task("", total=len(plan))
        for case, names in plan:
            progress.update(task, description=str(case), refresh=True)
            try:
                results.append(measure_case(case, names, effort))
            except RuntimeError as error:  # too little memory for a case of this size, or a failed device
                note = Measurement(note=first_line(error))
                results.append(CaseResult(case, dict.fromkeys(names, note)))
            except KeyboardInterrupt:
                break
            keep(results[-1])
            progress.advance(task)
    return results


@contextmanager
def quick_garbage_collection() -> Iterator[None]:
    """Exclude the objects that exist now, which include torch's many modules, from the two collections of each case."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # The bar is refreshed between cases. A thread that redraws it would take a core from the kernels.
    with Progress(
        *columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
    ) as progress:
        yield progress


def measure_case(case: Case, names: list[str], effort: Effort) -> CaseResult:
    """Measure a case. A contender that fails or is wrong gets a note instead of figures; the others are still timed."""
    if case.device == "cuda":
        gc.collect()  # frees what the previous case left, which the allocator keeps in blocks of that case's sizes
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
                loss = loss_of(name, case)  # a new loss: the compiler's code for a second size would be slower
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
    """The number of inputs. On CUDA it is so large that the L2 cache has evicted an input before its next turn."""
    if case.device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(case.device).L2_cache_size
    size = sum(operand.nbytes for operand in make_inputs(case))
    return min(MAX_COPIES, math.ceil(2 * cache / size) + 1)


def part_to_check(case: Case, operands: tuple[Tensor, ...]) -> tuple[Case, tuple[Tensor, ...]]:
    """The case, or only its first rows if a float64 copy of all would not fit into memory beside what is timed."""
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
    """Compute the results of one step in the same way as the timed step, so that nothing else is compiled for it."""
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
    """Return why the results are wrong, or an empty string if they are right."""
    results = loss_and_gradients(loss, case, operands, overwrites)
    for index, (mine, exact) in enumerate(zip(results, reference, strict=True)):
        what = "gradient" if index else "loss"
        if mine is None:
            return f"no {what}"
        error = (mine.double() - exact).abs().max().item()
        scale = exact.abs().max().item()
        # The gradient of a large mean may be subnormal in float16. A difference of one subnormal step is allowed.
        limits = torch.finfo(case.torch_dtype)
        allowed = TOLERANCE[case.dtype] * scale + limits.tiny * limits.eps
        if not error <= allowed:
            return f"wrong {what}: off by {error:.2g} where the largest entry is {scale:.2g}"
    return ""


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120] if text else ''}".rstrip(": ")
