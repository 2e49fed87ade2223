"""The machine's own copy: no loss that makes a new gradient is faster.

On the CPU into fresh memory; on CUDA into memory that is there already, as torch's allocator hands a gradient out.
"""

import ctypes
import itertools
import mmap

import torch
from torch import Tensor

from .timing import Step, cuda_timer

HUGE_PAGES_FROM = 4 << 20  # bytes; what csrc/huge_pages.h does


def make_copy(sources: list[Tensor]) -> Step:
    """Reads as many bytes as one of `sources` has and writes them elsewhere; each call takes the next."""
    return make_cuda_copy(sources) if sources[0].is_cuda else make_cpu_copy(sources[0])


def make_cuda_copy(sources: list[Tensor]) -> Step:
    """The faster of the driver's copy (what `copy_` is there) and of a kernel that reads and writes each element."""
    # What is a slice has to be dense for that: a copy of rows apart is slower.
    dense = [source.detach().contiguous() for source in sources]
    memory = torch.empty_like(dense[0])
    turns = itertools.cycle(dense)
    ways = [Step(lambda: memory.copy_(next(turns))), Step(lambda: torch.mul(next(turns), 1, out=memory))]
    return min(ways, key=lambda way: min(cuda_timer(way, 10) for _ in range(5)))


def make_cpu_copy(source: Tensor) -> Step:
    """Into new memory, mapped as fusedloss's gradients are."""
    source = source.detach()

    def copy() -> None:
        fresh = torch.empty_like(source)
        prefer_huge_pages(fresh)
        fresh.copy_(source)

    return Step(copy)


def prefer_huge_pages(fresh: Tensor) -> None:
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or fresh.nbytes < HUGE_PAGES_FROM:
        return
    begin = -(-fresh.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (fresh.data_ptr() + fresh.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)
