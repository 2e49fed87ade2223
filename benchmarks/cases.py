"""What is measured: a loss, its inputs and a pass; and how many bytes any implementation of it must move."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .losses import CLASS_PROBABILITIES, LOSSES, Operand, TimedLoss

Pass = Literal["forward", "forward+backward"]
PASSES: tuple[Pass, ...] = ("forward", "forward+backward")
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

BYTES_FORMULA = (
    "GB/s: the bytes that must move over the median. Of N rows and C classes a loss reads N·C·itemsize of input (NLL: "
    "N·itemsize) and as many of any other tensor, or 8·N of class indices; backward writes one gradient more (Gaussian "
    "NLL: two), N·C·itemsize each"
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
    padding: int = 0  # unused classes at the end of each row in memory: the input is a slice, as of a padded vocabulary

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
        """How the case differs from a mean over class indices whose gradient is a new tensor."""
        return ", ".join(
            name
            for name, given in (
                ("probabilities", self.target == "probabilities"),
                (f"smoothing {self.label_smoothing:g}", self.label_smoothing),
                ("weights", self.weighted),
                ("in place", self.in_place),
                (f"slice of {self.classes + self.padding}", self.padding),
            )
            if given
        )

    @property
    def timed_loss(self) -> TimedLoss:
        return LOSSES[self.loss]

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The tensors that the loss is called with, the input first."""
        first, *others = self.timed_loss.operands
        return (first, CLASS_PROBABILITIES) if self.target == "probabilities" else (first, *others)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of torch's loss and of fusedloss's."""
        options: dict[str, Any] = {}
        if self.label_smoothing:
            options["label_smoothing"] = self.label_smoothing
        if self.weighted:
            generator = torch.Generator(self.device).manual_seed(1)
            for name in self.timed_loss.weights:
                weight = torch.rand(self.classes, generator=generator, device=self.device) + 0.5
                options[name] = weight.to(self.torch_dtype)
        return options

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def all_cases(
    losses: Iterable[str], sizes: Iterable[tuple[int, int]], dtypes: Iterable[str], device: str
) -> list[Case]:
    """Every combination, in the order of the table. All losses have inputs of the same sizes."""
    return [
        Case(loss, rows, classes, dtype, step, device)
        for loss, dtype, (rows, classes), step in itertools.product(losses, dtypes, sizes, PASSES)
    ]


def bytes_moved(case: Case) -> int:
    """The least memory traffic that the formula needs: a second read of the input does not count.

    The loss itself, which is one number, and the weights are left out. A target needs no gradient, as in training.
    """
    elements = math.prod(case.shape)
    read = {
        "all": gradient_bytes(case),
        "one of a row": elements // case.classes * case.torch_dtype.itemsize,
        "indices": elements // case.classes * torch.int64.itemsize,
    }
    gradients = sum(operand.differentiable for operand in case.operands) if case.step == "forward+backward" else 0
    return sum(read[operand.read] for operand in case.operands) + gradients * gradient_bytes(case)


def gradient_bytes(case: Case) -> int:
    return math.prod(case.shape) * case.torch_dtype.itemsize


def make_inputs(case: Case, seed: int = 0) -> tuple[Tensor, ...]:
    """Random operands. Zeros would make both exp and the memory accesses too cheap."""
    generator = torch.Generator(case.device).manual_seed(seed)
    # The values are rounded once, to the dtype.
    first, *others = (
        values.to(case.torch_dtype) if values.is_floating_point() else values
        for values in (operand.draw(case.shape, generator) for operand in case.operands)
    )
    if case.padding:
        memory = first.new_zeros(case.rows, case.classes + case.padding, *case.inner)
        first = memory[:, : case.classes].copy_(first)
    return tuple(
        values.requires_grad_(operand.differentiable)
        for values, operand in zip((first, *others), case.operands, strict=True)
    )
