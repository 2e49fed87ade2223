"""Interleaved timing: each contender runs once per round, so that a busy moment of the machine slows them all."""

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
# Cycles of a GPU's clock, about 0.5 ms: three times as long as a host takes to queue a training step, because the host
# of a virtual machine is sometimes late.
QUEUEING_CYCLES = 1_000_000


@dataclass(frozen=True)
class Step:
    """What is timed (`run`), and what must be done before each call but is not timed (`prepare`)."""

    run: Callable[[], None]
    prepare: Callable[[], None] | None = None

    def __call__(self) -> None:
        if self.prepare:
            self.prepare()
        self.run()

    def seconds(self, calls: int) -> float:
        """Wall-clock seconds per call."""
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
    batch_seconds: float = 2e-3  # how long the fastest contender runs in a round: far more than the clock's resolution


@dataclass(frozen=True)
class Times:
    """Seconds per call: one sample per round, each the mean of `calls` calls."""

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
    """Wall-clock seconds per call. A step in another process is timed by that process."""
    return step.seconds(calls)


def cuda_timer(step: Step, calls: int) -> float:
    """Seconds per call between two events of the stream.

    The GPU is kept busy until the host has queued the batch. Otherwise it would wait for the launches of short kernels,
    and the result would be the host's time, which `host_seconds` measures. This does not help a step that itself waits
    for the GPU.

    A step with `prepare` has a pair of events for each call, so that the GPU's time for preparing is not counted.
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
    """Seconds per call until the host has queued its work on the GPU; the median of a few batches.

    The host does not wait for the GPU: a batch has so few launches that they all fit into the queue.
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
    """The order of each round. Each contender is first, second, … equally often: none profits from a warm cache."""
    first = 0
    while True:
        yield names[first:] + names[:first]
        first = (first + 1) % len(names)


def interleave(steps: Mapping[str, Step], timer: Timer, effort: Effort, pause: float = 0.0) -> dict[str, Times]:
    """Time all steps side by side. Each must have been called before, so that nothing is compiled here.

    `pause` is for steps that run in several processes: the seconds to wait before each sample until the threads of the
    previous process, which spin while they wait for work, are asleep. One call that is not counted then wakes this
    process's threads. The next call reuses the memory of its results, as in training.
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
    """Disable garbage collection, which would be charged to the contender that runs at the time."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
