"""How much of the cores went to other programs meanwhile: a time taken on a busy machine should say so."""

import os
import time
from collections.abc import Callable
from pathlib import Path

WORTH_A_NOTE = 0.1  # of the cores; below it the medians hold
BUSY_FIELDS = (1, 2, 3, 6, 7, 8)  # of a line of /proc/stat: user, nice, system, irq, softirq, steal


def usable_cores() -> set[int]:
    """Cores this process may use, which in a container can be fewer than the machine has."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def core_seconds_of_others() -> float | None:
    """Seconds for which other programs, or the hypervisor, have had our cores since the machine started."""
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    except OSError:
        return None
    names = {f"cpu{core}" for core in usable_cores()}
    ticks = sum(int(line[field]) for line in lines if line[0] in names for field in BUSY_FIELDS)
    mine = os.times()
    return ticks / os.sysconf("SC_CLK_TCK") - mine.user - mine.system


def start_watch(of_helpers: Callable[[], float] = lambda: 0.0) -> Callable[[], float | None]:
    """The function returned tells which share of the cores, 0 to 1, others have had since.

    `of_helpers` tells the core seconds that our own other processes have used.
    """
    before, helped, start = core_seconds_of_others(), of_helpers(), time.perf_counter()

    def share() -> float | None:
        after = core_seconds_of_others()
        if before is None or after is None:
            return None
        cores = (time.perf_counter() - start) * len(usable_cores())
        return min(1.0, max(0.0, (after - before - (of_helpers() - helped)) / cores))

    return share
