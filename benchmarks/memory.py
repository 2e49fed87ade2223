"""Peak extra memory of one call, to the byte: the most that torch's allocators hold beyond what they held before.

The resident set of a process would be the wrong witness here: it is counted in pages, keeps what malloc does not hand
back, and sees nothing when a call reuses memory that another has freed. So the allocators themselves are asked. What a
kernel takes behind torch's back (buffers on its stack, a few kilobytes of scratch a thread) is not in it, for any
contender.
"""

import os
from collections.abc import Callable

import torch

METHOD = {
    "cpu": "allocation events of torch's CPU allocator (torch.autograd.profiler, profile_memory) during one call",
    "cuda": "torch.cuda.max_memory_allocated during one call, less what was allocated before",
}


def peak_extra_bytes(step: Callable[[], None], device: str) -> int:
    """Bytes that `step` held at its worst moment, its results among them."""
    return _peak_cuda(step) if device == "cuda" else _peak_cpu(step)


def _peak_cpu(step: Callable[[], None]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would announce each start and stop on stderr
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
