"""Bugs planted in copies of the kernels, all in one library; a number says at run time which of them is there.

Besides the bugs that are listed, every single barrier and fence that the kernels have can be taken out.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

BARRIER = re.compile(r"\b__(syncthreads|syncwarp|threadfence)\w*\([^()]*\);")


@dataclass(frozen=True)
class Bug:
    what: str
    file: str  # in csrc/cuda
    start: int  # of the expression or statement, in the file's text
    end: int
    wrong: str  # what takes its place


# What, in which file, where (the expression or statement between the two @), and what takes its place.
LISTED = [
    ("lanes without a warp", "reduce.cuh", "of_warp[lane] : @none@", "value"),
    ("warps not rescaled", "reduce.cuh", "@state = rescale(state, warp_max(state.max));@", ""),
    ("one vector too many", "vec.cuh", "{size, head, @(size - head) / kVector<T>@}", "(size - head) / kVector<T> + 1"),
    ("vectors from a misaligned start", "vec.cuh", "head = @to_boundary < size ? to_boundary : size@", "Index(0)"),
    ("alignment of other tensors ignored", "vec.cuh", "return @aligned@ ?", "true"),
    ("single elements in the wrong place", "vec.cuh", "return @unit < head@ ?", "true"),
    ("read off by one", "vec.cuh", "pack.element = @*p@;", "p[1]"),
    ("read past a row's end", "cross_entropy_cuda.cu", "if (@unit < units@) x[k]", "true"),
    ("tiles not rescaled", "cross_entropy_cuda.cu", "@state = rescale(state, max);@", "state.max = max;"),
    ("large targets not checked", "cross_entropy_cuda.cu", "|| @index >= o.classes@ ?", "false"),
    ("ignored rows not written", "cross_entropy_cuda.cu", "@write_zeros<1>(grad, 1, share);@", ""),
    ("one sum for all blocks", "cross_entropy_cuda.cu", "(o.scratch)[@blockIdx.x@] = sum", "0"),
    ("one sum for all blocks", "pointwise_cuda.cu", "(o.scratch)[@blockIdx.x@] = of_block", "0"),
    ("pair past the end", "pointwise_cuda.cu", "if (@unit + k * step >= units@) continue", "false"),
]


def listed_bugs(csrc: Path) -> list[Bug]:
    found = []
    for what, file, where, wrong in LISTED:
        before, right, after = where.split("@")
        text = (csrc / "cuda" / file).read_text()
        assert text.count(before + right + after) == 1, f"{file} has changed, say anew where to plant: {what}"
        start = text.index(before + right + after) + len(before)
        found.append(Bug(f"{what} ({file})", file, start, start + len(right), wrong))
    return found


def missing_barriers(csrc: Path) -> list[Bug]:
    """Each barrier and fence of the kernels, taken out."""
    found = []
    for path in sorted([*csrc.glob("cuda/*.cu"), *csrc.glob("cuda/*.cuh")]):
        text = path.read_text()
        for number, match in enumerate(BARRIER.finditer(text), 1):
            what = f"without barrier {number} ({path.name}: {match[0]})"
            found.append(Bug(what, path.name, match.start(), match.end(), ""))
    return found


def plant(csrc: Path, copy: Path, bugs: list[Bug], max_blocks: int) -> None:
    """A copy of the kernels in which `planted_bug == n` makes the n-th bug, counted from 1, and 0 none of them. Its
    grids are so small that blocks take several shares of small problems."""
    shutil.copytree(csrc, copy)
    # From the end of a file to its start, so that offsets hold.
    for number, bug in sorted(enumerate(bugs, 1), key=lambda numbered: -numbered[1].start):
        path = copy / "cuda" / bug.file
        text = path.read_text()
        right = text[bug.start : bug.end]
        if right.endswith(";"):
            both = f"if (planted_bug == {number}) {{ {bug.wrong} }} else {{ {right} }}"
        else:
            both = f"(planted_bug == {number} ? ({bug.wrong}) : ({right}))"
        path.write_text(text[: bug.start] + both + text[bug.end :])
    launch = copy / "cuda" / "launch.cuh"
    text, replaced = re.subn(r"kMaxBlocks = \d+", f"kMaxBlocks = {max_blocks}", launch.read_text())
    assert replaced == 1, "launch.cuh has changed: where is kMaxBlocks?"
    launch.write_text(text)
