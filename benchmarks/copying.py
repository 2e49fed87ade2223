"""The machine's own copy into fresh memory: no loss that makes a new gradient is faster."""

import ctypes
import mmap

import torch
from torch import Tensor

from .timing import Step

HUGE_PAGES_FROM = 4 << 20  # bytes; what csrc/huge_pages.h does


def make_copy(source: Tensor) -> Step:
    """Reads as many bytes as `source` has and writes them into new memory, mapped as fusedloss's gradients are."""
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
