"""The CUDA kernels, executed on the CPU: their values, their races and their accesses to memory.

tests/cuda_emulator/README.md tells how, and what such a run cannot show.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from cuda_emulator import build, planted_bugs
from cuda_emulator.bug_problems import problems_for_bugs
from cuda_emulator.emulator import (
    DTYPES,
    POINTER,
    REDUCTIONS,
    CrossEntropyOptions,
    CudaTuning,
    Emulator,
    NLLLossOptions,
    PointwiseOptions,
    Strides,
)
from cuda_emulator.pointwise_problems import FORMULAS, Pointwise
from cuda_emulator.problems import (
    LAYOUTS,
    TARGETS,
    TUNINGS,
    CrossEntropy,
    NegativeLogLikelihood,
    Placement,
    slice_of_padded,
    statistic,
)

from fusedloss import _build

MISSING = build.missing()
pytestmark = pytest.mark.skipif(MISSING != "", reason=MISSING or "not skipped")
CSRC = _build.csrc_directory()
BUGS = planted_bugs.all_bugs(CSRC)

# Threads that share a row: one alone (up to 16 classes), some lanes of a warp (a few thousand), a block. Sizes that
# vectors divide, and others.
CLASSES = [1, 2, 7, 16, 17, 33, 100, 1000, 1031, 8195]
# One, and around a vector; more than one block (1024 vectors), and what does not fill it.
SIZES = [0, 1, 3, 8, 9, 31, 257, 1000, 4099, 20011]


@pytest.fixture(scope="session")
def emulator(emulated_kernels: Path) -> Emulator:
    return Emulator(emulated_kernels)


@pytest.fixture
def rng() -> random.Random:
    """For choices; values come from torch's generator. Both start from the session's seed."""
    return random.Random(int(torch.randint(1 << 30, ())))


# ---- Values, over everything that the options say


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy(dtype, classes, emulator, rng):
    for target in TARGETS if classes < 1000 else rng.sample(TARGETS, 4):
        CrossEntropy(rng, dtype, classes, *target).check(emulator)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype, layout, emulator, rng):
    for reduction in REDUCTIONS:
        target = rng.choice(TARGETS)
        CrossEntropy(rng, dtype, rng.choice([5, 33, 1027]), *target, reduction, layout).check(emulator)


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mse(dtype, numel, emulator, rng):
    for reduction in REDUCTIONS:
        Pointwise(rng, "mse_loss", dtype, numel, reduction).check(emulator)


@pytest.mark.parametrize("name", FORMULAS)
def test_pointwise(name, emulator, rng):
    for dtype in DTYPES:
        for reduction in REDUCTIONS:
            Pointwise(rng, name, dtype, rng.choice(SIZES[:-2]), reduction).check(emulator)


def test_every_pointwise_formula_is_tested():
    text = (CSRC / "kernels" / "formulas" / "pointwise-inl.h").read_text()
    assert re.findall(r"^ *X\((\w+), \w+\)", text, flags=re.MULTILINE) == list(FORMULAS)


# Rows of one block, of several (1024 each) and of many; tiles (8192) of whole rows, of a part of one; of classes whose
# rows are neighbours, and of a part of those.
NLL_SHAPES = [(1, 1, 1), (5, 3, 1), (3, 257, 1), (2500, 4, 1), (2, 9001, 1), (3, 5, 7), (2, 40, 300), (1, 3, 3000)]


@pytest.mark.parametrize("shape", NLL_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nll_loss(dtype, shape, emulator, rng):
    for reduction in REDUCTIONS:
        NegativeLogLikelihood(rng, dtype, shape, reduction).check(emulator)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows_of_nll_loss(reduction, emulator):
    emulator.reset()
    o = NLLLossOptions()
    o.reduction, o.classes, o.inner, o.tuning = REDUCTIONS[reduction], 7, 1, CudaTuning.of()
    loss, total = (emulator.output(1, torch.float32, name) for name in ("loss", "total_weight"))
    o.loss, o.total_weight = loss.data_ptr(), total.data_ptr() if reduction == "mean" else None
    assert emulator.call("nll_loss_scratch", o) == 0
    assert emulator.call("nll_loss_forward", o) == emulator.call("nll_loss_backward", o) == 0
    assert emulator.complaints() == []
    if reduction != "none":
        assert loss.isnan() and total == 0 if reduction == "mean" else loss == 0


@pytest.mark.parametrize("bad", [-1, 33, 2**40, -(2**40)])
def test_target_of_nll_loss_out_of_range(bad, emulator, rng):
    """Forward stops with a device assert; backward, called all the same, writes zeros."""
    problem = NegativeLogLikelihood(rng, torch.float32, (3, 33, 2), "sum")
    problem.ignore_index = -100
    problem.target[0] = bad
    emulator.reset(1)
    o = NLLLossOptions()
    problem.set_forward(emulator, o)
    assert emulator.call("nll_loss_forward", o) != 0
    (complaint,) = emulator.complaints()
    assert complaint.startswith("DEVICE ASSERT") and "target" in complaint
    emulator.reset(1)
    problem.set_forward(emulator, o)
    assert (problem.backward(emulator, o)[0] == 0).all()


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel(dtype, tuning, emulator, rng):
    """Whoever shares a row; with the last tuning, each has several rows."""
    many = 100 if tuning == "loops" else 1
    for classes, rows in [(3, 6 * many), (40, 7), (300, 3), (1031, 5), (4099, 2)]:
        for layout in ("contiguous", rng.choice(["padded", "inner", "expanded"])):
            problem = CrossEntropy(rng, dtype, classes, *rng.choice(TARGETS), layout=layout, rows=rows)
            problem.tuning, problem.schedules = tuning, problem.schedules[:1]
            problem.check(emulator)


@pytest.mark.parametrize("tuning", ["default", "warps", "clusters that keep", "split", "loops"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_slice_of_padded_classes(dtype, tuning, emulator, rng):
    """Whole tiles and others, of a few lanes and of whole warps; every place between two boundaries."""
    for classes in (101, 1543, 4101):
        slice_of_padded(rng, dtype, classes, tuning, rows=9).check(emulator)


# What the launch of the rows must look like, so that the test above is about what it says.
SHAPES = {
    "default": lambda shape: shape.block_x == 128 and shape.shared_bytes == 16384 and shape.cluster == 1,
    "nothing kept": lambda shape: shape.shared_bytes == 0,
    "warps": lambda shape: (shape.block_x, shape.block_y) == (32, 4),
    "blocks": lambda shape: shape.block_y == 1 and shape.cluster == 1,
    "clusters": lambda shape: shape.cluster == 8 and shape.shared_bytes == 0,
    "clusters that keep": lambda shape: shape.cluster == 4 and shape.shared_bytes == 6144,
    "split": lambda shape: shape.grid > 5 and shape.cluster == 1,
    "split in two": lambda shape: shape.grid == 10 and shape.cluster == 1,
    "columns that keep": lambda shape: shape.cluster == 1,
    "many multiprocessors": lambda shape: shape.cluster == 1,
    "loops": lambda shape: shape.grid == 2 and shape.cluster == 2,
}


@pytest.mark.parametrize("tuning", TUNINGS)
def test_the_launch_of_the_rows(tuning, emulator, rng):
    problem = CrossEntropy(rng, torch.float32, 4099, reduction="sum", layout="contiguous", rows=5)
    problem.tuning, problem.grad_in_forward, problem.in_place = tuning, True, False
    problem.schedules = [(1, 0)]
    problem.check(emulator)
    assert SHAPES[tuning](emulator.launches()[0])


@pytest.mark.parametrize("tuning", ["clusters", "clusters that keep"])
def test_a_device_that_holds_no_cluster(tuning, emulator, rng):
    """A block then takes each row, without a cluster; before scratch is allocated, that is known."""
    problem = CrossEntropy(rng, torch.float32, 4099, reduction="sum", layout="contiguous", rows=5)
    problem.tuning, problem.grad_in_forward, problem.in_place = tuning, True, False
    with emulator.without_clusters():
        problem.check(emulator)
    assert (emulator.launches()[0].grid, emulator.launches()[0].cluster) == (5, 1)


@pytest.mark.parametrize(("classes", "with_grad", "alone"), [(17, 2, 2), (64, 2, 2), (100, 4, 4), (512, 16, 8)])
def test_some_lanes_of_a_warp(classes, with_grad, alone, emulator, rng):
    """With a gradient, a row must fit into the registers of its lanes, so that more of them may take it."""
    for target in TARGETS:
        problem = CrossEntropy(rng, torch.float32, classes, *target, layout="contiguous", rows=131)
        problem.tuning = "default"
        problem.check(emulator)
        if target == TARGETS[0]:
            launch = emulator.launches()[int(problem.reduction == "mean" and problem.grad_in_forward)]
            lanes = with_grad if problem.grad_in_forward else alone
            assert (launch.block_x, launch.block_y) == (lanes, 128 // lanes)


@pytest.mark.parametrize(("classes", "block"), [(40, (32, 4)), (700, (16, 16))])
def test_columns_of_several_threads_a_row(classes, block, emulator, rng):
    """Rows that no 16-byte access can reach together."""
    for target in TARGETS:
        problem = CrossEntropy(rng, torch.float32, classes, *target, layout="inner", rows=5, inner=3)
        problem.tuning = "many multiprocessors"
        problem.check(emulator)
    launch = next(launch for launch in emulator.launches() if launch.block_y > 1)
    assert (launch.block_x, launch.block_y) == block


# Rows a thread takes side by side, or not; few rows, and more than a block takes at once; classes that are kept, or
# of which several blocks have some.
COLUMNS = [(16, 21, 3), (64, 40, 1), (8, 700, 2), (24, 300, 1), (5, 40, 2), (1024, 3, 2), (1040, 9, 1), (8, 2100, 1)]


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns(dtype, tuning, emulator, rng):
    for inner, classes, outer in rng.sample(COLUMNS, 5):
        problem = CrossEntropy(rng, dtype, classes, *rng.choice(TARGETS), layout="inner", rows=outer, inner=inner)
        problem.tuning, problem.schedules = tuning, problem.schedules[:1]
        problem.check(emulator)


@pytest.mark.parametrize("value", [1.3e9, 1.4e9, 5e9, -1e10, -1e30, 1e30, -3e38], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_huge_logits(dtype, value, emulator, rng):
    """Rows that are masked with a huge number, wholly or in part, are as exact as others."""
    for layout, inner, classes in [("contiguous", 1, 33), ("contiguous", 1, 5000), ("inner", 16, 40)]:
        problem = CrossEntropy(rng, dtype, classes, *rng.choice(TARGETS), "sum", layout, rows=4, inner=inner)
        problem.schedules = problem.schedules[:1]
        logits = torch.randn(problem.shape, dtype=torch.float64)
        logits[0] = value
        logits[1, ::3] = value
        logits[2, : classes // 2] = value  # whole tiles, the first ones
        logits[3, classes // 2 :] = -value
        problem.logits = logits.to(dtype)
        problem.check(emulator)


def launch_of_columns(emulator, rng, tuning: str, dtype: torch.dtype, shape: tuple[int, int, int], offset: int = 0):
    """What the rows were launched with, gradient and all."""
    outer, classes, inner = shape
    problem = CrossEntropy(rng, dtype, classes, reduction="sum", layout="inner", rows=outer, inner=inner)
    place = Placement("inner", shape, rng, aligned=True)
    place.strides, place.span, place.offset = (classes * inner, inner, 1), outer * classes * inner, offset
    problem.place_logits = problem.place_target = problem.place_grad = place
    problem.tuning, problem.grad_in_forward, problem.in_place, problem.schedules = tuning, True, False, [(1, 0)]
    problem.check(emulator)
    return emulator.launches()[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_launch_of_columns(dtype, emulator, rng):
    """All rows that a 16-byte access reaches are taken together, unless the tensor lies elsewhere."""
    width = 16 // dtype.itemsize
    side_by_side = launch_of_columns(emulator, rng, "default", dtype, (5, 3, 64 * width))
    assert (side_by_side.grid, side_by_side.block_x, side_by_side.block_y) == (5, 64, 1)
    for shape, offset in [((5, 3, 64 * width), 1), ((64 * width, 3, 5), 0)]:
        apart = launch_of_columns(emulator, rng, "default", dtype, shape, offset)
        assert (apart.grid, apart.block_x, apart.block_y) == (5 * width, 64, 1)
    for classes, width_of_block in [(9, 64), (66, 8)]:
        kept = launch_of_columns(emulator, rng, "columns that keep", dtype, (1, classes, 64 * width))
        assert kept.block_x == width_of_block and kept.shared_bytes >= 16 * classes * kept.block_x
    split = launch_of_columns(emulator, rng, "columns that keep", dtype, (1, 9000, 2 * width))
    assert (split.block_x, split.block_y) == (2, 128) and split.shared_bytes < 5000
    assert split.grid > 1 and emulator.launches()[1].block_x == 256


def test_split_columns_are_finished_by_many_blocks(emulator, rng):
    for dtype in DTYPES:
        launch_of_columns(emulator, rng, "many multiprocessors", dtype, (4, 1100, 128))
        rows, split = emulator.launches()[:2]
        assert rows.cluster == 1 and split.grid > 1


def test_more_blocks_than_the_last_kernel_has_threads(emulator, rng):
    rows = CrossEntropy(rng, torch.float32, 17, "index", True, 0.1, "mean", "contiguous", rows=530)
    rows.tuning = "blocks"
    for problem in (rows, Pointwise(rng, "mse_loss", torch.float64, 530_000, "sum")):
        problem.schedules = [(1, 0)]
        problem.check(emulator)


@pytest.mark.parametrize("classes", [1, 2, 4, 7, 8, 11, 12, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_a_few_classes(dtype, classes, emulator, rng):
    """A block takes its rows to shared memory as one piece, unless they lie apart."""
    for rows, tuning, layout in [(270, "loops", "contiguous"), (67, "default", "contiguous"), (67, "loops", "padded")]:
        problem = CrossEntropy(rng, dtype, classes, *rng.choice(TARGETS), layout=layout, rows=rows)
        problem.tuning = tuning
        problem.check(emulator)
        of_rows = emulator.launches()[-1]  # the backward pass
        if layout == "contiguous":
            row = classes * dtype.itemsize
            gap = max(4, dtype.itemsize) if row % 16 == 0 else 0
            assert (of_rows.block_x, of_rows.shared_bytes) == (128, 128 * (row + gap))


# ---- The edges


@pytest.mark.parametrize("bad", [-1, "classes", 2**40, -(2**40)])
@pytest.mark.parametrize("classes", [2, 33, 1500])
def test_target_out_of_range(classes, bad, emulator, rng):
    """Forward stops with a device assert, and nothing is accessed with the bad index."""
    for smoothing in (0.0, 0.1):
        problem = CrossEntropy(rng, torch.float32, classes, "index", True, smoothing, rows=3)
        problem.ignore_index = -100
        problem.target.view(-1)[0] = classes if bad == "classes" else bad
        emulator.reset(1)
        o = CrossEntropyOptions()
        problem.set_inputs(emulator, o)
        problem.set_outputs(emulator, o)
        assert emulator.call("cross_entropy_forward", o) != 0
        (complaint,) = emulator.complaints()
        assert complaint.startswith("DEVICE ASSERT") and "target" in complaint


@pytest.mark.parametrize("bad", [-1, "classes", 2**40])
@pytest.mark.parametrize("classes", [2, 33, 1500])
def test_gradient_of_a_target_out_of_range(classes, bad, emulator, rng):
    """Backward, called all the same, writes zeros."""
    problem = CrossEntropy(rng, torch.float32, classes, "index", True, reduction="none", rows=3)
    problem.ignore_index = -100
    problem.target.fill_(0)
    emulator.reset(1)
    o = CrossEntropyOptions()
    logits = problem.set_inputs(emulator, o)
    problem.set_outputs(emulator, o)
    problem.call(emulator, "cross_entropy_forward", o)
    problem.target.view(-1)[0] = classes if bad == "classes" else bad
    o.target_index = emulator.input(problem.target, "target_index").data_ptr()
    grad = problem.backward(emulator, o, logits)
    assert (grad[0, :, 0] == 0).all()


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_offsets_beyond_32_bits(layout, tuning, emulator, rng):
    """In rows, three rows lie 2^31 elements apart; in columns, the classes of three rows do."""
    stride = 2**31 + 12
    problem = CrossEntropy(
        rng, torch.float32, 37, *rng.choice(TARGETS[:6]), reduction="sum", layout="contiguous", rows=3
    )
    problem.tuning = tuning
    emulator.reset(1)
    o = CrossEntropyOptions()
    problem.set_inputs(emulator, o)
    o.grad_output = emulator.input(problem.grad_output, "grad_output").data_ptr()
    pieces = problem.logits[:, :, 0] if layout == "rows" else problem.logits[:, :, 0].T.contiguous()
    with (
        emulator.far_apart(pieces, stride, "logits") as logits,
        emulator.far_apart(pieces, stride, "grad_logits", is_output=True) as grad,
    ):
        if layout == "columns":
            o.outer, o.inner = 1, 3
        o.logits_strides = o.grad_strides = Strides(stride, 1, 1) if layout == "rows" else Strides(0, stride, 1)
        o.logits, o.grad_logits = logits[0].data_ptr(), grad[0].data_ptr()
        outputs = problem.set_outputs(emulator, o)
        problem.call(emulator, "cross_entropy_forward", o)
        problem.call(emulator, "cross_entropy_backward", o)
        found = torch.stack(grad).clone() if layout == "rows" else torch.stack(grad, 1).clone()
    problem.compare({**outputs, "grad_logits": found.unsqueeze(2)})


@pytest.mark.parametrize(("classes", "inner"), [(7, 1), (500, 1), (7, 2), (500, 3)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(dtype, reduction, classes, inner, emulator):
    emulator.reset()
    o = CrossEntropyOptions()
    o.dtype = o.loss_dtype = DTYPES[dtype]
    o.reduction, o.classes, o.inner = REDUCTIONS[reduction], classes, inner
    o.logits_strides = o.grad_strides = Strides(classes * inner, inner, 1)
    loss = emulator.output(1, dtype, "loss")
    total = emulator.output(1, statistic(dtype), "total_weight")
    o.loss, o.total_weight = loss.data_ptr(), total.data_ptr() if reduction == "mean" else None
    o.tuning = CudaTuning.of()
    assert emulator.call("cross_entropy_scratch", o) == 0
    assert emulator.call("cross_entropy_forward", o) == emulator.call("cross_entropy_backward", o) == 0
    assert emulator.complaints() == []
    if reduction != "none":
        assert loss.isnan() and total == 0 if reduction == "mean" else loss == 0


# ---- Planted bugs: is what should be seen, seen?


@pytest.mark.parametrize("number", range(1, len(BUGS) + 1), ids=lambda number: BUGS[number - 1].what)
def test_planted_bug_is_caught(number, emulator, rng):
    bug = BUGS[number - 1]
    bad_target = "targets" in bug.what
    sign = "OUT OF BOUNDS" if bad_target else ""  # a bad target stops the clean kernel too, but by an assert
    for _ in range(20):  # some bugs show in every other round only
        for problem in problems_for_bugs(rng, bug.file):
            if bad_target and not problem.target.is_floating_point():
                problem.target.view(-1)[0] = 10**6  # beyond the whole input
            problem.schedules = problem.schedules[:1]
            try:
                problem.check(emulator, number)
            except AssertionError as error:
                if sign in str(error):
                    return
    pytest.fail("not caught")


# As self_test.cu numbers them: the complaint that each of its bugs must cause.
SELF_TEST = [
    *["none", "DATA RACE", "DATA RACE", "DATA RACE", "BARRIER", "DEADLOCK", "DATA RACE", "UNDEFINED"],
    *["OUT OF BOUNDS", "UNINITIALISED READ", "MISALIGNED", "WRITE TO INPUT", "DEVICE ASSERT", "UNDEFINED"],
    *["DATA RACE", "DATA RACE", "DATA RACE", "DEADLOCK", "DATA RACE", "DATA RACE"],
    *["ARRIVAL BARRIER", "MAY NOT HAVE STARTED", "MAY HAVE ENDED", "NO SUCH BLOCK"],
]


@pytest.mark.parametrize("bug", range(len(SELF_TEST)), ids=lambda bug: f"{bug} {SELF_TEST[bug]}")
def test_self_test(bug, emulator):
    """The clean kernel is not accused; each bug is, of what it does, with every schedule."""
    values = torch.rand(300)
    for seed, preempt_every in [(0, 0), (1, 0), (2, 64), (3, 7)]:
        emulator.reset(seed, preempt_every, bug)
        memory = [emulator.input(values, "input"), emulator.output(4, torch.float32, "partial")]
        memory.append(emulator.input(torch.zeros(1, dtype=torch.int32), "ticket", read_only=False))
        memory.append(emulator.output(5, torch.float32, "total"))
        pointers = [POINTER(tensor.data_ptr()) for tensor in memory]
        error = emulator.library.self_test(pointers[0], 300, *pointers[1:])
        complaints = emulator.complaints()
        if bug == 0:
            assert complaints == [] and error == 0
            of_cluster = values[:20].sum()
            torch.testing.assert_close(memory[-1], torch.stack([values.sum(), *[of_cluster] * 4]))
        else:
            assert error != 0 and any(SELF_TEST[bug] in complaint for complaint in complaints), complaints


def test_no_elements_need_no_memory(emulator):
    emulator.reset()
    o = PointwiseOptions()
    for launcher in ("pointwise_forward", "pointwise_backward"):
        assert emulator.call(launcher, o, b"mse_loss") == 0
    assert emulator.complaints() == []
