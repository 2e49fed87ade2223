"""The share of the cores that other programs used during a measurement, because a busy machine distorts the times."""

import os
import time
from collections.abc import Callable
from pathlib import Path

WORTH_A_NOTE = 0.1  # of the cores; below it the medians are reliable
BUSY_FIELDS = (1, 2, 3, 6, 7, 8)  # indices in a line of /proc/stat: user, nice, system, irq, softirq, steal


def usable_cores() -> set[int]:
    """The cores that this process may use. In a container they can be fewer than the machine has."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def core_seconds_of_others() -> float | None:
    """Core seconds that other programs, or the hypervisor, have used on our cores since the machine started."""
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    except OSError:
        return None
    names = {f"cpu{core}" for core in usable_cores()}
    ticks = sum(int(line[field]) for line in lines if line[0] in names for field in BUSY_FIELDS)
    mine = os.times()
    return ticks / os.sysconf("SC_CLK_TCK") - mine.user - mine.system


def start_watch(of_helpers: Callable[[], float] = lambda: 0.0) -> Callable[[], float | None]:
    """Return a function that returns the share of the cores, 0 to 1, that other programs have used since this call.

    `of_helpers` returns the core seconds that our own other processes have used.
    """
    before, helped, start = core_seconds_of_others(), of_helpers(), time.perf_counter()

    def share() -> float | None:
        after = core_seconds_of_others()
        if before is None or after is None:
            return None
        cores = (time.perf_counter() - start) * len(usable_cores())
        return min(1.0, max(0.0, (after - before - (of_helpers() - helped)) / cores))

    return share
