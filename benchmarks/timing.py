"""Interleaved timing: in every round each contender runs once, so that a busy moment of the machine hits them all."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Timer = Callable[["Step", int], float]
WARM_UP_CALLS = 3
HOST_BATCHES, HOST_CALLS = 15, 50
# Of a GPU's clock, about 0.5 ms: three times what a host takes to queue a training step, because a virtual machine's
# host is sometimes late.
QUEUEING_CYCLES = 1_000_000


@dataclass(frozen=True)
class Step:
    """What is timed, and what must be done before each time, which is not."""

    run: Callable[[], None]
    prepare: Callable[[], None] | None = None

    def __call__(self) -> None:
        if self.prepare:
            self.prepare()
        self.run()

    def seconds(self, calls: int) -> float:
        """Per call, by the clock on the wall."""
        if self.prepare is None:
            start = time.perf_counter()
            for _ in range(calls):
                self.run()
            return (time.perf_counter() - start) / calls
        total = 0.0
        for _ in range(calls):
            self.prepare()
            start = time.perf_counter()
            self.run()
            total += time.perf_counter() - start
        return total / calls


@dataclass(frozen=True)
class Effort:
    """How long to measure a case: rounds until `seconds` are spent, but never fewer or more than the bounds."""

    min_rounds: int = 9
    max_rounds: int = 101
    seconds: float = 2.0
    batch_seconds: float = 2e-3  # what the fastest contender's share of a round lasts: far above a clock's step


@dataclass(frozen=True)
class Times:
    """Seconds per call, one sample a round, each the mean of `calls` calls."""

    samples: list[float]
    calls: int

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        first, _, third = statistics.quantiles(self.samples, n=4, method="inclusive")
        return first, third


def cpu_timer(step: Step, calls: int) -> float:
    """Seconds per call by the clock on the wall; of a step in another process, by the clock there."""
    return step.seconds(calls)


def cuda_timer(step: Step, calls: int) -> float:
    """Seconds per call between two events of the stream.

    The GPU is kept busy until the host has queued the batch: otherwise it would wait for the launches of short kernels,
    and the time would be the host's, which `host_seconds` takes. A step that waits for the GPU itself is not helped.

    A step that is prepared has a pair of events for each call, so that the GPU's time for preparing is not counted.
    """
    spans = 1 if step.prepare is None else calls
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(spans)]
    torch.cuda.synchronize()
    torch.cuda._sleep(calls * QUEUEING_CYCLES)
    for start, end in events:
        if step.prepare:
            step.prepare()
        start.record()
        for _ in range(calls // spans):
            step.run()
        end.record()
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in events) / 1e3 / calls


def host_seconds(step: Step) -> float:
    """Per call, until the host has handed its work to the GPU, which is not waited for; the median of a few batches.

    A batch has few enough launches for the queue to take them all: a full one would make the host wait.
    """
    batches = []
    for _ in range(HOST_BATCHES):
        torch.cuda.synchronize()
        batches.append(step.seconds(HOST_CALLS))
    torch.cuda.synchronize()
    return statistics.median(batches)


def timer_for(device: str) -> Timer:
    return cuda_timer if device == "cuda" else cpu_timer


def rotations(names: list[str]) -> Iterator[list[str]]:
    """The order of each round: everyone goes first, second, … equally often, so no one owns the warm cache."""
    first = 0
    while True:
        yield names[first:] + names[:first]
        first = (first + 1) % len(names)


def interleave(steps: Mapping[str, Step], timer: Timer, effort: Effort, pause: float = 0.0) -> dict[str, Times]:
    """Time all steps side by side; each must have been called before, so that nothing compiles in here.

    `pause` seconds pass before each sample: where steps run in several processes, until the threads of the one before,
    which go on spinning in wait of more, have gone to sleep. A call that is not counted then wakes this one's threads,
    and leaves the memory of its results where the next call finds it: as in training, step after step.
    """
    if not steps:
        return {}
    for step in steps.values():
        timer(step, WARM_UP_CALLS)
    fastest = min(timer(step, WARM_UP_CALLS) for step in steps.values())
    calls = max(1, math.ceil(effort.batch_seconds / max(fastest, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in steps}
    deadline = time.perf_counter() + effort.seconds
    with no_garbage_collection():
        for done, order in enumerate(rotations(list(steps))):
            late = time.perf_counter() >= deadline
            if done >= effort.max_rounds or (done >= effort.min_rounds and late):
                break
            for name in order:
                if pause:
                    time.sleep(pause)
                    timer(steps[name], 1)
                samples[name].append(timer(steps[name], calls))
    return {name: Times(values, calls) for name, values in samples.items()}


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """A collection in the middle of a sample would be charged to whoever runs then."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
