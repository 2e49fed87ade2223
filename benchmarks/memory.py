"""Peak extra memory of one call, in bytes: the most that torch's allocators hold beyond what they held before.

The resident set of the process cannot be used here: it is counted in pages, includes memory that malloc does not
return to the system, and does not change when a call reuses memory that another has freed. So the figures come from the
allocators. Memory that a kernel takes without torch's allocators (buffers on its stack, a few kilobytes of scratch per
thread) is not included, for any contender.
"""

import os
from collections.abc import Callable

import torch

METHOD = {
    "cpu": "allocation events of torch's CPU allocator (torch.autograd.profiler, profile_memory) during one call",
    "cuda": "torch.cuda.max_memory_allocated during one call, less what was allocated before",
}


def peak_extra_bytes(step: Callable[[], None], device: str) -> int:
    """The most bytes that `step` held at any time, including its results."""
    return _peak_cuda(step) if device == "cuda" else _peak_cpu(step)


def _peak_cpu(step: Callable[[], None]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints each start and stop on stderr
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        step()
    events = (event for event in profiler.kineto_results.events() if event.name() == "[memory]")
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _peak_cuda(step: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
