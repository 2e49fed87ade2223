"""Access to the emulated kernels and their memory with ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # as csrc/kernels/dtypes.h has them
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
INT, LONG, POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class Strides(ctypes.Structure):
    _fields_ = [("outer", LONG), ("classes", LONG), ("inner", LONG)]


class CudaTuning(ctypes.Structure):
    _fields_ = [
        *[("thread_classes", LONG), ("warp_bytes", LONG), ("lane_vectors", LONG), ("min_lanes", LONG)],
        *[("block_threads", LONG), ("other_threads", LONG)],
        *[("split_classes", LONG), ("target_weight_rows", LONG)],
        *[("max_blocks", LONG), ("waves", LONG), ("overlap", LONG)],
        *[("multiprocessors", LONG), ("kept_bytes", LONG), ("cluster_blocks", LONG)],
    ]

    @classmethod
    def of(cls, **given: int) -> CudaTuning:
        defaults = {
            "thread_classes": 16,
            "warp_bytes": 4096,
            "lane_vectors": 8,
            "min_lanes": 2,
            "block_threads": 256,
            "other_threads": 128,
            "split_classes": 8192,
            "target_weight_rows": 8192,
            "max_blocks": 8192,
            "waves": 1,
            "overlap": 0,
        }
        # With one multiprocessor, there are never so few rows that several blocks share one.
        return cls(**{**defaults, "multiprocessors": 1, "kept_bytes": 16384, "cluster_blocks": 1, **given})


class Launch(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in ("grid", "block_x", "block_y", "cluster", "shared_bytes")]


class CrossEntropyOptions(ctypes.Structure):
    _fields_ = [
        *[("dtype", INT), ("loss_dtype", INT), ("reduction", INT)],
        *[("outer", LONG), ("classes", LONG), ("inner", LONG)],
        *[("ignore_index", LONG), ("label_smoothing", ctypes.c_double)],
        *[("logits", POINTER), ("logits_strides", Strides)],
        *[("target_index", POINTER), ("target_probability", POINTER), ("target_strides", Strides)],
        *[("weight", POINTER), ("row_max", POINTER), ("row_scale", POINTER)],
        *[("total_weight", POINTER), ("weight_sum", POINTER)],
        *[("loss", POINTER), ("scratch", POINTER)],
        *[("grad_output", POINTER), ("grad_output_stride", LONG)],
        *[("grad_logits", POINTER), ("grad_strides", Strides)],
        *[("grad_ready", ctypes.c_bool), ("grad_output_was_one", POINTER), ("tuning", CudaTuning)],
    ]


class PointwiseOptions(ctypes.Structure):
    _fields_ = [
        *[("dtype", INT), ("loss_dtype", INT), ("reduction", INT), ("numel", LONG), ("divisor", ctypes.c_double)],
        *[
            ("operands", ctypes.c_int),
            ("operand", POINTER * 8),
            ("operand_period", LONG * 8),
        ],
        *[("parameter", ctypes.c_double * 16), ("loss", POINTER), ("scratch", POINTER)],
        *[("grad_output", POINTER), ("grad_output_stride", LONG), ("grad", POINTER * 8)],
        *[("grad_ready", ctypes.c_bool), ("grad_output_was_one", POINTER), ("tuning", CudaTuning)],
    ]


class NLLLossOptions(ctypes.Structure):
    _fields_ = [
        *[("dtype", INT), ("loss_dtype", INT), ("reduction", INT)],
        *[("outer", LONG), ("classes", LONG), ("inner", LONG), ("ignore_index", LONG)],
        *[("input", POINTER), ("input_strides", Strides), ("target_index", POINTER)],
        *[("weight", POINTER), ("total_weight", POINTER), ("loss", POINTER), ("scratch", POINTER)],
        *[("grad_output", POINTER), ("grad_output_stride", LONG)],
        *[("grad_input", POINTER), ("grad_strides", Strides), ("tuning", CudaTuning)],
    ]


class Emulator:
    """A library of kernels. Usage: `reset`, create buffers, call a launcher, inspect the buffers and `complaints`."""

    def __init__(self, path: Path):
        self.path, self.library = path, ctypes.CDLL(str(path))
        self.library.emulator_message.restype = ctypes.c_char_p
        self.library.emulator_bytes_not_written.restype = ctypes.c_uint64
        self.library.emulator_bytes_not_written.argtypes = [POINTER]
        self.library.emulator_launch_number.restype = ctypes.POINTER(Launch)
        for name in ("cross_entropy", "pointwise", "nll_loss"):
            getattr(self.library, f"{name}_scratch").restype = LONG
        assert self.library.size_of_cross_entropy_options() == ctypes.sizeof(CrossEntropyOptions)
        assert self.library.size_of_pointwise_options() == ctypes.sizeof(PointwiseOptions)
        assert self.library.size_of_nll_loss_options() == ctypes.sizeof(NLLLossOptions)
        assert self.library.offset_of_parameter() == PointwiseOptions.parameter.offset
        assert self.library.offset_of_weight_sum() == CrossEntropyOptions.weight_sum.offset
        self._memory: list[Tensor] = []

    @contextlib.contextmanager
    def without_clusters(self) -> Iterator[None]:
        """In this context the device can hold no cluster, like a partition of a GPU that is too small for one."""
        self.library.emulator_set_clusters(False)
        try:
            yield
        finally:
            self.library.emulator_set_clusters(True)

    def reset(self, seed: int = 0, preempt_every: int = 0, planted_bug: int = 0) -> None:
        """Forgets memory and complaints. The seed chooses the schedule. A thread performs at most `preempt_every`
        accesses before another thread continues; with 0, it runs until it waits."""
        self.library.emulator_forget_buffers()
        self.library.emulator_forget_messages()
        self.library.emulator_schedule(seed, preempt_every)
        self.library.emulator_plant(planted_bug)
        self._memory = []

    def input(self, values: Tensor, name: str, offset: int = 0, read_only: bool = True) -> Tensor:
        """-> a copy of the values in the kernels' memory, `offset` elements after a multiple of 256 bytes."""
        return self._allocate(values.numel(), values.dtype, name, offset, read_only, True).copy_(values.reshape(-1))

    def output(self, numel: int, dtype: torch.dtype, name: str, offset: int = 0) -> Tensor:
        """-> memory that must be written before it is read."""
        return self._allocate(numel, dtype, name, offset, False, False)

    @contextlib.contextmanager
    def far_apart(self, pieces: Tensor, stride: int, name: str, is_output: bool = False) -> Iterator[list[Tensor]]:
        """-> the rows of `pieces`, `stride` elements apart. The memory in between is never touched or committed."""
        size, step = pieces[0].nbytes, stride * pieces.element_size()
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = POINTER
        libc.mmap.argtypes = [POINTER, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, LONG]
        span = (len(pieces) - 1) * step + size
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        start = libc.mmap(None, span, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        assert start not in (None, ctypes.c_void_p(-1).value), f"mmap: {ctypes.get_errno()}"
        try:
            rows = []
            for i, piece in enumerate(pieces):
                memory = (ctypes.c_uint8 * size).from_address(start + i * step)
                rows.append(torch.frombuffer(memory, dtype=pieces.dtype).copy_(piece))
                begin, written = POINTER(start + i * step), int(not is_output)
                self.library.emulator_add_buffer(begin, ctypes.c_size_t(size), written, written, f"{name} {i}".encode())
            yield rows
        finally:
            self.library.emulator_forget_buffers()
            libc.munmap(POINTER(start), ctypes.c_size_t(span))

    def _allocate(self, numel, dtype, name, offset, read_only, is_written) -> Tensor:
        size = torch.empty((), dtype=dtype).element_size()
        gap = 4096  # on both sides, outside of all buffers
        raw = torch.full((numel * size + offset * size + 2 * gap + 256,), 0xA5, dtype=torch.uint8)
        start = -raw.data_ptr() % 256 + gap + offset * size
        tensor = raw[start : start + numel * size].view(dtype)
        begin, bytes_ = POINTER(raw.data_ptr() + start), ctypes.c_size_t(numel * size)
        if numel > 0:
            self.library.emulator_add_buffer(begin, bytes_, int(read_only), int(is_written), name.encode())
        self._memory.append(raw)
        return tensor

    def bytes_not_written(self, output: Tensor) -> int:
        return self.library.emulator_bytes_not_written(output.data_ptr()) if output.numel() else 0

    def call(self, launcher: str, options: ctypes.Structure, *more: bytes) -> int:
        """-> the cudaError_t. The name of a pointwise loss follows the options."""
        return getattr(self.library, launcher)(ctypes.byref(options), *more)

    def launches(self) -> list[Launch]:
        """-> the launches since `reset`."""
        return [self.library.emulator_launch_number(i)[0] for i in range(self.library.emulator_launch_count())]

    def complaints(self) -> list[str]:
        """-> what the checks have found since `reset`, with source lines in place of addresses."""
        messages = [self.library.emulator_message(i).decode() for i in range(self.library.emulator_message_count())]
        return [re.sub(r"@(0x[0-9a-f]+)", lambda match: self._source_line(match[1]), message) for message in messages]

    def _source_line(self, address: str) -> str:
        command = ["addr2line", "-i", "-s", "-e", str(self.path), address]
        try:
            lines = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
        except OSError:  # no binutils
            return address
        return "[" + " in ".join(line for line in lines if line and "cuda_on_cpu.h" not in line) + "]"
