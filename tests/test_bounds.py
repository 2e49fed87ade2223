"""Nothing is read beyond an input's last byte: the inputs end where an unreadable page begins.

A read beyond the end would kill the process, so the checks run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = r"""
import ctypes, mmap, itertools, torch
import fusedloss.functional as fused

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = mmap.PAGESIZE

def guarded(tensor, at_end=True):
    # A copy whose last byte is the last, or whose first byte is the first, before or after a page without access.
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // PAGE) + 1
    access, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANON
    start = libc.mmap(None, (pages + 1) * PAGE, access, kind, -1, 0)
    assert libc.mprotect(start, PAGE, 0) == 0 and libc.mprotect(start + pages * PAGE, PAGE, 0) == 0
    first = start + pages * PAGE - size if at_end else start + PAGE
    copy = torch.frombuffer((ctypes.c_char * size).from_address(first), dtype=tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)

def check(shape, dtype, at_end):
    rows = (shape[0], *shape[2:])
    x = guarded(torch.randn(shape).to(dtype), at_end)
    t = guarded(torch.randint(0, shape[1], rows), at_end)
    p = guarded(torch.rand(shape).to(dtype), at_end)
    w = guarded(torch.rand(shape[1]).to(dtype), at_end)
    x.requires_grad_()
    for target, smoothing in itertools.product((t, p), (0.0, 0.1)):
        loss = fused.cross_entropy(x, target, w, label_smoothing=smoothing, reduction="none")
        loss.backward(guarded(torch.randn(rows).to(dtype), at_end))
    fused.mse_loss(x, p, reduction="none").backward(guarded(torch.randn(shape).to(dtype), at_end))

for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for shape in [
        (1, 1), (3, 5), (2, 15), (2, 16), (3, 17), (1, 67), (2, 2049),
        (2, 3, 5), (1, 7, 17), (1, 3, 257), (2, 1, 19), (1, 40, 9),
    ]:
        for at_end in (True, False):
            check(shape, dtype, at_end)
# The harness itself: a read one byte beyond does end the process.
print("checked", flush=True)
ctypes.string_at(guarded(torch.zeros(3)).data_ptr(), 13)
print("not reached")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect")
def test_inputs_are_not_read_beyond_their_ends():
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    run = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True)
    assert run.stdout == "checked\n", run.stdout + run.stderr[-2000:]
    assert run.returncode < 0  # killed by the deliberate read
