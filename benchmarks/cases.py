"""What is measured: a loss, its inputs and a pass; and the bytes that any implementation of it must move."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

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
    "logits, and as many of probabilities or 8·N of class indices; MSE reads 2·N·C·itemsize; backward writes one "
    "gradient, N·C·itemsize, more"
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
    inner: tuple[int, ...] = ()  # the dimensions d1, … of (N, C, d1, …)
    target: Literal["indices", "probabilities"] = "indices"
    label_smoothing: float = 0.0
    weighted: bool = False
    in_place: bool = False  # the logits are the result of an operation, and fusedloss writes the gradient over them

    def __str__(self) -> str:
        return " ".join(filter(None, (self.loss, self.size, self.dtype, self.variant, self.step)))

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, self.classes, *self.inner)

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def variant(self) -> str:
        """What differs from a mean over class indices into a new gradient."""
        return ", ".join(
            name
            for name, given in (
                ("probabilities", self.target == "probabilities"),
                (f"smoothing {self.label_smoothing:g}", self.label_smoothing),
                ("weights", self.weighted),
                ("in place", self.in_place),
            )
            if given
        )

    @property
    def options(self) -> dict[str, Any]:
        """Of the loss's module."""
        options: dict[str, Any] = {}
        if self.label_smoothing:
            options["label_smoothing"] = self.label_smoothing
        if self.weighted:
            generator = torch.Generator(self.device).manual_seed(1)
            weight = torch.rand(self.classes, generator=generator, device=self.device) + 0.5
            options["weight"] = weight.to(self.torch_dtype)
        return options

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
    matrix = gradient_bytes(case)
    indices = case.loss == "cross_entropy" and case.target == "indices"
    target = matrix // case.torch_dtype.itemsize // case.classes * torch.int64.itemsize if indices else matrix
    return matrix + target + (matrix if case.step == "forward+backward" else 0)


def gradient_bytes(case: Case) -> int:
    return math.prod(case.shape) * case.torch_dtype.itemsize


def make_inputs(case: Case, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A leaf of random logits and its target. Never zeros: they would make exp and the memory both too easy."""
    generator = torch.Generator(case.device).manual_seed(seed)
    # Drawn in float32, as not every device draws 16-bit normals, and rounded once.
    logits = torch.randn(case.shape, generator=generator, device=case.device).to(case.torch_dtype)
    if case.loss == "cross_entropy" and case.target == "indices":
        target = torch.randint(case.classes, (case.rows, *case.inner), generator=generator, device=case.device)
    else:
        target = torch.randn(case.shape, generator=generator, device=case.device)
        if case.loss == "cross_entropy":
            target = target.softmax(1)
        target = target.to(case.torch_dtype)
    return logits.requires_grad_(), target
