"""What is measured: a loss, a size, a dtype and a pass; and the bytes that any implementation of it must move."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Pass = Literal["forward", "forward+backward"]
PASSES: tuple[Pass, ...] = ("forward", "forward+backward")
LOSSES: tuple[str, ...] = ("cross_entropy", "mse")
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

BYTES_FORMULA = (
    "GB/s: the bytes that must move over the median. Cross entropy of N rows and C classes reads N·C·itemsize of "
    "logits and 8·N of targets; MSE reads 2·N·C·itemsize; backward writes one gradient, N·C·itemsize, more"
)


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    loss: str
    rows: int
    classes: int
    dtype: str
    step: Pass
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.loss} {self.rows}x{self.classes} {self.dtype} {self.step}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def all_cases(
    losses: Iterable[str], sizes: Iterable[tuple[int, int]], dtypes: Iterable[str], device: str
) -> list[Case]:
    """Every combination, in the order of the table; an MSE case has as many elements as its cross entropy sibling."""
    return [
        Case(loss, rows, classes, dtype, step, device)
        for loss, dtype, (rows, classes), step in itertools.product(losses, dtypes, sizes, PASSES)
    ]


def bytes_moved(case: Case) -> int:
    """The least traffic the mathematics admits; an implementation that reads the logits twice gets no credit for it.

    The loss itself, one number, is left out. MSE's target needs no gradient, as in training.
    """
    matrix = case.rows * case.classes * case.torch_dtype.itemsize
    read = matrix + case.rows * torch.int64.itemsize if case.loss == "cross_entropy" else 2 * matrix
    return read + (matrix if case.step == "forward+backward" else 0)


def make_inputs(case: Case, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A leaf of random logits and its target. Never zeros: they would make exp and the memory both too easy."""
    generator = torch.Generator(case.device).manual_seed(seed)
    shape = (case.rows, case.classes)
    # Drawn in float32, as not every device draws 16-bit normals, and rounded once.
    logits = torch.randn(shape, generator=generator, device=case.device).to(case.torch_dtype)
    if case.loss == "cross_entropy":
        target = torch.randint(case.classes, (case.rows,), generator=generator, device=case.device)
    else:
        target = torch.randn(shape, generator=generator, device=case.device).to(case.torch_dtype)
    return logits.requires_grad_(), target
