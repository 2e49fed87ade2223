"""The machine's own copy. No loss that writes a new gradient can be faster.

On the CPU the copy goes to newly mapped memory. On CUDA it goes to memory that is already allocated, because torch's
allocator reuses memory for a gradient there.
"""

import ctypes
import itertools
import mmap

import torch
from torch import Tensor

from .timing import Step, cuda_timer

HUGE_PAGES_FROM = 4 << 20  # bytes; the same limit as in csrc/ops/huge_pages.h


def make_copy(sources: list[Tensor]) -> Step:
    """Build a step that copies one of `sources` to other memory. Each call copies the next one."""
    return make_cuda_copy(sources) if sources[0].is_cuda else make_cpu_copy(sources[0])


def make_cuda_copy(sources: list[Tensor]) -> Step:
    """The faster of the driver's copy, which `copy_` uses on CUDA, and a kernel that reads and writes each element."""
    # A slice is made dense first, because a copy of rows with gaps between them is slower.
    dense = [source.detach().contiguous() for source in sources]
    memory = torch.empty_like(dense[0])
    turns = itertools.cycle(dense)
    ways = [Step(lambda: memory.copy_(next(turns))), Step(lambda: torch.mul(next(turns), 1, out=memory))]
    return min(ways, key=lambda way: min(cuda_timer(way, 10) for _ in range(5)))


def make_cpu_copy(source: Tensor) -> Step:
    """Copy into new memory, which is mapped like the gradients of fusedloss."""
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
