"""Bugs planted in copies of the kernels, all in one library; a number selects the active one at run time.

Besides the listed bugs, each single barrier and fence of the kernels can be removed.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

BARRIER = re.compile(r"\b(__syncthreads|__syncwarp|__threadfence|cluster_sync)\w*\([^()]*\);")


@dataclass(frozen=True)
class Bug:
    what: str
    file: str  # in csrc/kernels/cuda
    start: int  # of the expression or statement in the file's text
    end: int
    wrong: str  # what replaces it


# The bug, the file, the text to search for (what is replaced stands between the two @), and the replacement.
LISTED = [
    ("lanes of missing warps take part", "reduce.cuh", "of_warp[lane] : @none@", "value"),
    (
        "lanes of a row's missing warps take part",
        "reduce.cuh",
        "of_warp[turn % 2][from] : @empty_row_state<A>()@",
        "of_warp[turn % 2][0]",
    ),
    ("warps of two successive rows in one place", "reduce.cuh", "of_warp[@turn % 2@][threadIdx.x / kWarp]", "0"),
    ("lanes of another row merged", "reduce.cuh", "lanes_merge<kSpread>(state, @int(blockDim.x)@)", "kWarp"),
    ("lanes not rescaled", "reduce.cuh", "@state = rescale(state, lanes_max(state.max, lanes));@", ""),
    ("both turns of a cluster in one place", "reduce.cuh", "states.of_block[@turn % 2@]", "0"),
    ("states stored by the receiver's rank", "reduce.cuh", "(&of_block[@rank@]) + i", "threadIdx.x"),
    ("a block of a cluster left out", "reduce.cuh", "if (int(threadIdx.x) < @blocks@) {", "blocks - 1"),
    ("one arrival barrier for both turns", "reduce.cuh", "&states.arrived[@turn % 2@]", "0"),
    (
        "a block's bytes not expected",
        "reduce.cuh",
        "expect_arrivals(arrived, unsigned(@blocks@ * sizeof(RowState<A>)))",
        "(blocks - 1)",
    ),
    (
        "more bytes expected than are sent",
        "reduce.cuh",
        "expect_arrivals(arrived, unsigned(blocks * @sizeof(RowState<A>)@))",
        "sizeof(RowState<A>) + sizeof(uint4)",
    ),
    ("arrival barriers not initialised", "reduce.cuh", "@start_arrivals(cluster_states<A>().arrived);@", ""),
    ("arrivals not waited for", "reduce.cuh", "@wait_for_arrivals(arrived, parity);@", ""),
    ("the wrong parity", "reduce.cuh", "parity = @turn / 2@ % 2;", "turn / 2 + 1"),
    ("always the first phase's parity", "reduce.cuh", "parity = turn / 2 % @2@;", "1"),
    (
        "one vector too many",
        "vec.cuh",
        "{size, head, @(size - head) / kVectorSize<T>@}",
        "(size - head) / kVectorSize<T> + 1",
    ),
    ("vectors from a misaligned start", "vec.cuh", "head = @to_boundary < size ? to_boundary : size@", "Index(0)"),
    ("alignment of other tensors ignored", "vec.cuh", "return @aligned@ ?", "true"),
    ("single elements in the wrong place", "vec.cuh", "return @unit < head@ ?", "true"),
    ("read off by one", "vec.cuh", "vector.element = @*p@;", "p[1]"),
    ("read past a row's end", "cross_entropy_row.cuh", "vectors[k] = @is_there(k)@ ? load", "true"),
    ("vectors after a row's end", "cross_entropy_tile.cuh", "return kWhole || @k < count@;", "true"),
    (
        "shifted stores: the beginning of the wrong vector",
        "cross_entropy_shifted_stores.cuh",
        "lane == 0 ? @lanes_here - 1@ : lane - 1;",
        "lane",
    ),
    (
        "shifted stores: lanes after the row's end",
        "cross_entropy_shifted_stores.cuh",
        "(kWhole || @lane < lanes_here@)",
        "true",
    ),
    (
        "shifted stores: the end of the vectors left out",
        "cross_entropy_shifted_stores.cuh",
        "behind = @place < bytes@ ?",
        "false",
    ),
    (
        "more tiles than there are slots",
        "cross_entropy_row_pipeline.cuh",
        "for_each_tile(@depth@, range, [&](auto is_whole, int number) {\n        wait_for_copies",
        "tiles",
    ),
    (
        "a copy that is not waited for",
        "cross_entropy_row_pipeline.cuh",
        "wait_for_copies(@depth - 1 - number@)",
        "depth",
    ),
    (
        "a kernel not prepared for its shared memory",
        "cross_entropy_cuda.cuh",
        "resident_blocks(kernel, @plan.shape(o, false)@, resident)",
        "LaunchShape{}",
    ),
    ("a copy past a row's end", "cross_entropy_row_pipeline.cuh", "if (@unit >= source.vectors@) continue", "false"),
    (
        "copies of all tiles in the first one's slots",
        "cross_entropy_row_pipeline.cuh",
        "slot = @number * kVectors + k@;",
        "k",
    ),
    (
        "the next row not copied",
        "cross_entropy_row_pipeline.cuh",
        "        start_copy(@next@, number);",
        "Source{}",
    ),
    (
        "vectors kept in another thread's place",
        "cross_entropy_tile.cuh",
        "dynamic_shared_memory + @thread / kWarp * (o.plan.slots * kSlotsOfVector * kWarp) + thread % kWarp@)",
        "0",
    ),
    (
        "target class treated like the others",
        "cross_entropy_row_gradient.cuh",
        "if (@is_own_target@) row.grad[",
        "false",
    ),
    ("target class written by the wrong thread", "cross_entropy_row_gradient.cuh", "== @range.thread@;", "0"),
    ("tiles not rescaled", "cross_entropy_row.cuh", "@state = rescale(state, max);@", "state.max = max;"),
    (
        "large targets not checked",
        "cross_entropy_options.cuh",
        "|| @uint64_t(index) >= uint64_t(classes)@ ?",
        "index < 0",
    ),
    (
        "rows after the last one",
        "cross_entropy_rows.cuh",
        "const bool is_row = @number < plan.rows@;\n    const int64_t next_number",
        "true",
    ),
    (
        "without a gradient: rows after the last one",
        "cross_entropy_rows.cuh",
        "const bool is_row = @number < plan.rows@;\n    const Row",
        "true",
    ),
    (
        "in lanes: rows after the last one",
        "cross_entropy_rows.cuh",
        "const bool is_row = @number < o.plan.rows@;",
        "true",
    ),
    (
        "in lanes: a gradient for rows that do not contribute",
        "cross_entropy_rows.cuh",
        "if (@!row.contributes()@) {",
        "false",
    ),
    ("a gradient assumed to be aligned", "cross_entropy_plan_rows.h", "&& @!are_aligned_alike(o)@;", "false"),
    (
        "ignored rows not written",
        "cross_entropy_row_gradient.cuh",
        "unit < @range.template units<kWidth>()@; unit +=",
        "0",
    ),
    (
        "all states of a split row in one place",
        "cross_entropy_rows.cuh",
        "[number * plan.blocks + @rank@] = state",
        "0",
    ),
    (
        "a split row's last block left out",
        "cross_entropy_sums.cuh",
        "block < @o.plan.blocks@; block",
        "o.plan.blocks - 1",
    ),
    (
        "one sum for all blocks of split rows",
        "cross_entropy_sums.cuh",
        "sums[@blockIdx.x@] = sum",
        "0",
    ),
    ("columns: rows side by side though misaligned", "cross_entropy_plan_columns.h", "return @all_fit@ ?", "true"),
    (
        "columns: rows side by side across outer indices",
        "cross_entropy_plan_columns.h",
        "all_fit = @o.inner % width == 0@ &&",
        "true",
    ),
    (
        "columns: the states of a block's threads in one place",
        "cross_entropy_column_exchange.cuh",
        "store_state(@threadIdx.y / threads_of_set@,",
        "0",
    ),
    (
        "few classes: rows without the gap",
        "cross_entropy_few_classes.cuh",
        "int(threadIdx.x) * @pitch@);",
        "row_bytes()",
    ),
    (
        "few classes: rows after the last one",
        "cross_entropy_few_classes.cuh",
        "int(@smaller(o.plan.rows - first, int64_t(kFewClassesThreads))@ * o.classes);",
        "kFewClassesThreads",
    ),
    (
        "few classes: elements after the last vector left out",
        "cross_entropy_few_classes.cuh",
        "if (@i < elements()@) f(",
        "false",
    ),
    (
        "few classes: every gradient in the first rows' place",
        "cross_entropy_few_classes.cuh",
        "(o.grad_logits) + @first@ * o.classes",
        "0",
    ),
    (
        "few classes: one class too many",
        "cross_entropy_few_classes.cuh",
        "if (@c < row.o.classes@) f(c)",
        "c <= row.o.classes",
    ),
    (
        "few classes: target class treated like the others",
        "cross_entropy_few_classes.cuh",
        "@staged[row.y] = narrow<T>(logit_gradient(e, scale, row.coefficient(), grad_output));@",
        "",
    ),
    (
        "columns: lanes of a warp not added up",
        "cross_entropy_column_exchange.cuh",
        "if (@distance < int(blockDim.x)@) continue",
        "true",
    ),
    (
        "columns: tiles not rescaled",
        "cross_entropy_column_tiles.cuh",
        "@raise_maximum<is_spread(kTarget)>(state[i], math::max(state[i].max, largest[i]));@",
        "state[i].max = math::max(state[i].max, largest[i]);",
    ),
    (
        "columns: all tiles kept in one place",
        "cross_entropy_column_tiles.cuh",
        "memcpy_async(&slots.logits(@first + k@), p",
        "k",
    ),
    (
        "columns: read past the last class",
        "cross_entropy_column_tiles.cuh",
        "vectors[k] = @this->is_there(k)@ ? load",
        "true",
    ),
    (
        "columns: another class's logit in place of the target's",
        "cross_entropy_column_gradient.cuh",
        "&slots.logits(@vector@))[row_of_block",
        "0",
    ),
    (
        "columns: another class's logit in place of the target's, in the row's only thread",
        "cross_entropy_column_tiles.cuh",
        "logits(@c@))[i]",
        "0",
    ),
    (
        "columns: another row's target",
        "cross_entropy_columns.cuh",
        "o.target_index[@first + i@]",
        "first",
    ),
    (
        "columns: another row's two class indices",
        "cross_entropy_columns.cuh",
        "(o.target_index + first + @i@);",
        "0",
    ),
    (
        "columns: target class written by the wrong thread",
        "cross_entropy_column_gradient.cuh",
        "rows.o, y) == @int(threadIdx.y)@ ?",
        "0",
    ),
    (
        "columns: target class treated like the others",
        "cross_entropy_column_gradient.cuh",
        "@rows.grad[in_row + y * stride] = factors.of_target(i);@",
        "",
    ),
    (
        "columns: the states of blocks in one place",
        "cross_entropy_columns.cuh",
        "number * plan.blocks + @block.rank@] = merged",
        "0",
    ),
    (
        "columns: a block continues to the last class",
        "cross_entropy_columns.cuh",
        "end = int(@smaller(begin + plan.columns.classes_of_block, o.classes)@);",
        "o.classes",
    ),
    (
        "columns: class indices assumed to be aligned",
        "cross_entropy_columns.cuh",
        "if (o.target_index && @reinterpret_cast<uintptr_t>(o.target_index) % sizeof(longlong2) == 0@) {",
        "true",
    ),
    (
        "columns: rows after the last one",
        "cross_entropy_columns.cuh",
        "is_there = @first + threadIdx.x < columns.units@",
        "true",
    ),
    (
        "one sum of weights for all blocks",
        "cross_entropy_sums.cuh",
        "static_cast<double*>(o.scratch)[@blockIdx.x@]",
        "0",
    ),
    (
        "one sum for all blocks",
        "cross_entropy_row_loss.cuh",
        "static_cast<LossSum*>(o.scratch)[@blockIdx.x@] = sum",
        "0",
    ),
    ("one sum for all blocks", "nll_loss_cuda.cu", "static_cast<LossSum*>(o.scratch)[@blockIdx.x@] = sum", "0"),
    ("rows after the last one", "nll_loss_cuda.cu", "y[k] = @row < rows@ ?", "true"),
    ("a run left out", "nll_loss_cuda.cu", "int run = @threadIdx.y@; run", "threadIdx.y + 1"),
    ("large targets not checked", "nll_loss_cuda.cu", "y < 0 || @y >= classes@ ?", "false"),
    (
        "rows of other tiles",
        "nll_loss_cuda.cu",
        "if (@y < tile.first_class || y >= tile.first_class + tile.classes@)",
        "y < 0",
    ),
    ("one sum for all blocks", "pointwise.cuh", "(o.scratch)[@blockIdx.x@] = of_block", "0"),
    ("elements past the end", "pointwise.cuh", "if (@unit + p * step >= units@) continue", "false"),
    ("the same vector again", "pointwise.cuh", "vectors[p - 1][k] = @vectors[p][k]@;", "vectors[0][k]"),
    ("one value treated as many", "pointwise.cuh", "return @k > 0 && o.operand_period[k] == 1@;", "false"),
    ("a row read past its end", "pointwise.cuh", "place = @place + 1 == period ? 0 : place + 1@;", "place + 1"),
    (
        "a row assumed to be aligned",
        "pointwise.cuh",
        "(row) % 16 == 0 && @(place | period) % kWidth == 0@) return",
        "true",
    ),
    (
        "a gradient in the first one's place",
        "pointwise.cuh",
        "static_cast<T*>(@o.grad[kOperand]@) + i, grad",
        "o.grad[0] != nullptr ? o.grad[0] : o.grad[kOperand]",
    ),
    (
        "a gradient without the mean's division",
        "pointwise.cuh",
        "return @o.reduction == Reduction::kMean@ ? g",
        "false",
    ),
    (
        "a gradient for grad_output = 1 used for another grad_output",
        "loss_values.cuh",
        "return o.grad_ready && @is_one@;",
        "true",
    ),
]


def listed_bugs(csrc: Path) -> list[Bug]:
    found = []
    for what, file, where, wrong in LISTED:
        before, right, after = where.split("@")
        text = (csrc / "kernels" / "cuda" / file).read_text()
        assert text.count(before + right + after) == 1, f"{file} has changed: update where to plant this bug: {what}"
        start = text.index(before + right + after) + len(before)
        found.append(Bug(f"{what} ({file})", file, start, start + len(right), wrong))
    return found


def missing_barriers(csrc: Path) -> list[Bug]:
    """Removals of each barrier and fence of the kernels."""
    found = []
    for path in sorted([*csrc.glob("kernels/cuda/*.cu"), *csrc.glob("kernels/cuda/*.cuh")]):
        text = path.read_text()
        for number, match in enumerate(BARRIER.finditer(text), 1):
            what = f"without barrier {number} ({path.name}: {match[0]})"
            found.append(Bug(what, path.name, match.start(), match.end(), ""))
    return found


def all_bugs(csrc: Path) -> list[Bug]:
    return [*listed_bugs(csrc), *missing_barriers(csrc)]


def plant(csrc: Path, copy: Path, bugs: list[Bug]) -> None:
    """Copies the kernels, so that `planted_bug == n` activates the n-th bug, counted from 1, and 0 none of them."""
    shutil.copytree(csrc, copy)
    # From the end of a file to its start, so that the offsets stay valid.
    for number, bug in sorted(enumerate(bugs, 1), key=lambda numbered: -numbered[1].start):
        path = copy / "kernels" / "cuda" / bug.file
        text = path.read_text()
        right = text[bug.start : bug.end]
        if right.endswith(";"):
            both = f"{{ if (planted_bug == {number}) {{ {bug.wrong} }} else {{ {right} }} }}"
        else:
            both = f"(planted_bug == {number} ? ({bug.wrong}) : ({right}))"
        path.write_text(text[: bug.start] + both + text[bug.end :])
