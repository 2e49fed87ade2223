"""The problems in which a planted bug must show."""

from __future__ import annotations

import random

from .emulator import DTYPES
from .pointwise_problems import FORMULAS, Pointwise
from .problems import TARGETS, TUNINGS, CrossEntropy, NegativeLogLikelihood, Problem, slice_of_padded


def problems_for_bugs(rng: random.Random, file: str) -> list[Problem]:
    """Problems of every kind, in random order after those that are made for this file. Each bug must show in one."""
    dtype = rng.choice(list(DTYPES))
    problems: list[Problem] = []
    of_file: list[Problem] = []
    if not file.startswith(("pointwise", "cross_entropy")):
        # The last one's classes are cut into tiles.
        shapes = [(5, 3, 1), (3, 257, 1), (2500, 4, 1), (2, 40, 300), (3, 9001, 1)]
        problems += [NegativeLogLikelihood(rng, dtype, shape, "mean") for shape in shapes]
    if not file.startswith(("pointwise", "nll_loss")):
        for layout in ("contiguous", "padded", "padded each", "inner"):
            for classes in (33, 257, 1031):
                target = rng.choice(TARGETS)
                problems.append(CrossEntropy(rng, dtype, classes, *target, rng.choice(["mean", "none"]), layout, 3))
        for tuning in TUNINGS:
            shapes = [("contiguous", 257, 6, 1), ("contiguous", 4099, 3, 1), ("inner", 40, 100, 3)]
            # Columns that a thread takes side by side, if their places are aligned, and many of one block.
            shapes += [("inner", 300, 12, 16), ("inner", 21, 3, 200)]
            if file.startswith("cross_entropy_few"):  # more than the blocks take at once, and the last one is not full
                shapes = [("contiguous", 10, 270, 1), ("contiguous", 15, 259, 1), ("contiguous", 16, 67, 1)]
            if file.startswith(("cross_entropy_column", "cross_entropy_plan_columns")) and tuning == "loops":
                shapes += [("inner", 2100, 3, 32)] * 2  # blocks take them in several turns
            for layout, classes, rows, inner in shapes:
                problem = CrossEntropy(rng, dtype, classes, *rng.choice(TARGETS), "mean", layout, rows, inner)
                problem.tuning, problem.grad_in_forward = tuning, not problem.in_place
                problems.append(problem)
    if file.startswith("cross_entropy_shifted"):
        problems, of_file = (
            [],
            [slice_of_padded(rng, dtype, classes, "warps", rows=5) for classes in (1543, 1551, 4101)],
        )
    if file.startswith(("cross_entropy_column", "cross_entropy_plan_columns")):
        for _ in range(3):  # kept, if the rows are aligned
            # Of the fewer classes, a thread has all. Of 65 to 68, eight threads have eight or nine each, which fit.
            for classes in (68, 9):
                problem = CrossEntropy(rng, dtype, classes, reduction="mean", layout="inner", rows=3, inner=104)
                problem.tuning, problem.grad_in_forward = "columns that keep", not problem.in_place
                of_file.append(problem)
    if not file.startswith(("cross_entropy", "nll_loss")):
        # One of many operands, any of which may repeat itself, and others.
        names = ["weighted_binary_cross_entropy_with_logits"] * 3 + rng.choices(list(FORMULAS), k=3)
        sizes = (130, 257, 1031, 9, 257, 20011)
        problems += [Pointwise(rng, name, dtype, numel, "mean") for name, numel in zip(names, sizes, strict=True)]
    rng.shuffle(problems)
    return of_file + problems
