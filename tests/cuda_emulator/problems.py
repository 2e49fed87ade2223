"""Random problems for the kernels: their values, one run of both passes in the emulator, and the expected results."""

from __future__ import annotations

import random

import torch
from helpers.oracle import assert_exact
from torch import Tensor

from fusedloss import reference

from .emulator import (
    DTYPES,
    REDUCTIONS,
    CrossEntropyOptions,
    CudaTuning,
    Emulator,
    NLLLossOptions,
    Strides,
)

LAYOUTS = ["contiguous", "expanded", "padded", "padded each", "inner", "inner last", "apart"]
GAP_OFFSETS = [0, 0, 1, 2, 3, 4, 7]  # elements between a 256-byte boundary and a tensor's start
GAPS = [0, 0, 1, 2, 3, 5, 8]  # elements after each row
# Tunings with which small problems reach every kernel: the choices of a large GPU; rows that lanes take, with and
# without space to keep what was read; rows that a block takes, or a cluster, or several separate blocks, of which some
# are idle or all are busy; columns of which a block keeps all classes or none; columns with several threads per row,
# and rows that are treated as columns.
TUNINGS = {
    "default": {},
    "nothing kept": {"kept_bytes": 1},
    "warps": {"target_weight_rows": 2, "thread_classes": 0, "warp_bytes": 1 << 20},
    "blocks": {"thread_classes": 0, "warp_bytes": 0},
    "clusters": {"thread_classes": 0, "warp_bytes": 0, "kept_bytes": 64, "cluster_blocks": 8},
    "clusters that keep": {"warp_bytes": 0, "kept_bytes": 8192, "cluster_blocks": 4},
    "split": {"thread_classes": 0, "warp_bytes": 0, "split_classes": 3, "multiprocessors": 20},
    "split in two": {"warp_bytes": 0, "split_classes": 2000, "multiprocessors": 20},
    "columns that keep": {"kept_bytes": 1 << 15},
    "many multiprocessors": {"multiprocessors": 1000, "max_blocks": 2, "thread_classes": 300},
    "loops": {"max_blocks": 2, "target_weight_rows": 1, "cluster_blocks": 2, "kept_bytes": 2048},
}


# Kind of target, whether classes have weights, label smoothing.
TARGETS = [
    (target, weighted, smoothing)
    for target in ("index", "probabilities")
    for weighted in (False, True)
    for smoothing in (0.0, 0.1, 1.0)
]


def statistic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


class Placement:
    """The layout of a tensor [outer, classes, inner]: strides, the offset of the start, and the elements it spans."""

    def __init__(self, layout: str, shape: tuple[int, int, int], rng: random.Random, aligned: bool = False):
        outer, classes, inner = shape
        gap = 0 if layout in ("contiguous", "expanded") else rng.choice(GAPS)
        self.offset = 0 if layout in ("contiguous", "expanded") else rng.choice(GAP_OFFSETS)
        if aligned:  # to 16 bytes; only the inner size then decides whether rows can be taken side by side
            gap, self.offset = -inner % 8 + rng.choice([0, 0, 8]), rng.choice([0, 0, 8])
        if layout == "expanded":  # one row serves all
            self.strides = (0, 1, 1)
        elif layout == "inner":  # (N, C, d): neighbouring elements belong to different rows
            self.strides = (classes * (inner + gap), inner + gap, 1)
        elif layout == "apart":  # neither rows nor classes are contiguous
            self.strides = (2 * classes * inner + gap, 2, 2 * classes)
        else:
            self.strides = (inner * (classes + gap), 1, classes + gap)
        self.shape = shape
        self.span = outer * self.strides[0] if layout != "expanded" else classes

    def view(self, memory: Tensor) -> Tensor:
        return memory.as_strided(self.shape, self.strides, memory.storage_offset())

    def fill(self, values: Tensor) -> Tensor:
        """-> the elements that the tensor spans, with NaN in its gaps."""
        memory = torch.full((self.span,), float("nan"), dtype=values.dtype)
        if self.strides[0] == 0:
            return memory.copy_(values[0, :, 0])
        self.view(memory).copy_(values)
        return memory


class Problem:
    """What all losses have in common. Subclasses define `launch`, which runs both passes, and `compare`."""

    def check(self, emulator: Emulator, planted_bug: int = 0) -> None:
        """Asserts that there are no complaints, that values match the reference, and that schedules agree bitwise."""
        first = None
        for seed, preempt_every in self.schedules:
            emulator.reset(seed, preempt_every, planted_bug)
            results = self.launch(emulator)
            if first is None:
                first = {name: tensor.clone() for name, tensor in results.items()}
                continue
            for name, tensor in results.items():
                bits, before = (bits_of(t) for t in (tensor, first[name]))
                assert torch.equal(bits, before), f"{self}: {name} differs between two schedules"
        self.compare(first)

    def choose_schedules(self, rng: random.Random) -> None:
        self.schedules = [(rng.randrange(1 << 20), rng.choice([0, 0, 0, 64, 7]))]
        if rng.random() < 0.2:
            self.schedules.append((rng.randrange(1, 1 << 20), 33))

    def call(self, emulator: Emulator, launcher: str, options, *more: bytes) -> None:
        error = emulator.call(launcher, options, *more)
        complaints = emulator.complaints()
        assert not complaints and error == 0, "\n".join([f"{self}: {launcher} returned {error}", *complaints])

    def all_written(self, emulator: Emulator, outputs: dict[str, Tensor], gaps: int = 0) -> None:
        for name, tensor in outputs.items():
            missing = emulator.bytes_not_written(tensor)
            assert missing == gaps, f"{self}: {missing} bytes of {name} are not written, {gaps} expected"

    def __str__(self) -> str:
        told = {name: value for name, value in vars(self).items() if isinstance(value, str | bool | int | float)}
        return f"{type(self).__name__}({self.dtype}, {told}, schedules={self.schedules})"


class CrossEntropy(Problem):
    def __init__(
        self,
        rng: random.Random,
        dtype: torch.dtype,
        classes: int,
        target: str = "index",  # or "probabilities"
        weighted: bool = False,
        smoothing: float = 0.0,
        reduction: str | None = None,
        layout: str | None = None,
        rows: int | None = None,
        inner: int | None = None,
    ):
        self.dtype, self.classes, self.smoothing = dtype, classes, smoothing
        self.reduction = reduction or rng.choice(list(REDUCTIONS))
        self.layout = layout or rng.choice(LAYOUTS)
        if inner is None:
            # Sizes for which a 16-byte access can reach several rows, and others.
            inner = rng.choice([2, 3, 5, 8, 16]) if self.layout in ("inner", "inner last", "apart") else 1
        self.shape = (rows or rng.choice([1, 3, 5] if inner == 1 else [1, 2, 3]), classes, inner)
        self.rows = self.shape[0] * inner
        self.aligned = self.layout == "inner" and rng.random() < 0.7
        self.place_logits, self.place_target, self.place_grad = (self.place(rng) for _ in range(3))
        self.in_place = self.layout != "expanded" and rng.random() < 0.1  # the gradient replaces the logits
        if self.layout in ("contiguous", "expanded", "padded"):  # as the op layer lays out these tensors
            self.place_target = self.place_logits
        if self.in_place or self.layout == "padded":
            self.place_grad = self.place_logits
        if self.layout == "expanded":
            self.place_target = self.place_grad = Placement("contiguous", self.shape, rng)
        self.loss_dtype = rng.choice([dtype, statistic(dtype)])
        self.make_logits(rng)
        self.make_target(rng, target, weighted)
        self.make_grad_output(rng)
        self.choose_schedules(rng)
        self.tuning = rng.choice(["default", *TUNINGS])
        self.target_offset = rng.choice([0, 1])  # 8-byte elements after a 16-byte boundary
        self.grad_in_forward = self.reduction != "none" and not self.in_place and rng.random() < 0.6

    def place(self, rng: random.Random) -> Placement:
        return Placement(self.layout, self.shape, rng, self.aligned)

    # ---- Values

    def make_logits(self, rng: random.Random) -> None:
        self.scale = rng.choice([1, 1, 3, 30, 10_000])
        x = torch.randn(self.shape, dtype=torch.float64) * min(self.scale, 100)
        if self.scale == 10_000:
            x += rng.choice([-1, 1]) * 1e4
        if rng.random() < 0.3 and self.classes > 2:
            x[torch.rand(self.shape) < rng.choice([0.1, 0.9])] = float("-inf")
            if rng.random() < 0.5:
                x[:, : self.classes * 2 // 3] = float("-inf")  # whole tiles at the start
        if rng.random() < 0.04:
            x[0, rng.randrange(self.classes), 0] = rng.choice([float("nan"), float("inf"), float("-inf")])
        if self.layout == "expanded":
            x = x[:1].expand(self.shape)
        self.logits = x.to(self.dtype)

    def make_target(self, rng: random.Random, target: str, weighted: bool) -> None:
        outer, classes, inner = self.shape
        self.ignore_index = rng.choice([-100, -100, 0, classes - 1, classes + 5])
        self.weight = (torch.rand(classes) + 0.1).to(statistic(self.dtype)) if weighted else None
        if target == "probabilities":
            self.ignore_index = -100
            mass = 2 * torch.rand(outer, 1, inner) if rng.random() < 0.3 else 1
            self.target = (torch.randn(self.shape).mul(2).softmax(1) * mass).to(self.dtype)
            self.total_weight = float(self.rows)
            return
        self.target = torch.randint(classes, (outer, inner))
        ignored = torch.rand(outer, inner) < rng.choice([0, 0.3, 0.3, 1])
        self.target[ignored] = self.ignore_index
        kept = self.target[self.target != self.ignore_index]
        self.total_weight = float(len(kept)) if self.weight is None else self.weight.double()[kept].sum().item()

    def make_grad_output(self, rng: random.Random) -> None:
        self.grad_stride = int(self.reduction == "none" and rng.random() < 0.7)  # 0: one value for all rows
        values = torch.randn(self.rows if self.grad_stride else 1, dtype=torch.float64) * rng.choice([1, 1, 64])
        self.grad_output = values.to(self.loss_dtype)
        self.grad_output[self.grad_output == 1] = 2  # check_hand_over tests 1

    # ---- A run

    def launch(self, emulator: Emulator) -> dict[str, Tensor]:
        o = CrossEntropyOptions()
        logits = self.set_inputs(emulator, o)
        if self.grad_in_forward:
            grad = self.set_grad(emulator, o)
        outputs = self.set_outputs(emulator, o)
        self.call(emulator, "cross_entropy_forward", o)
        self.all_written(emulator, outputs)
        if self.grad_in_forward:
            self.all_written_but_gaps(emulator, grad)
            self.check_hand_over(emulator, o, grad)
        return {**outputs, "grad_logits": self.backward(emulator, o, logits)}

    def backward(self, emulator: Emulator, o: CrossEntropyOptions, logits: Tensor) -> Tensor:
        """Runs the backward pass. A gradient that the forward pass has left does not fit this grad_output."""
        o.grad_output = emulator.input(self.grad_output, "grad_output").data_ptr()
        o.grad_output_stride, o.grad_ready = self.grad_stride, self.grad_in_forward
        was_one = emulator.input(torch.ones(1, dtype=torch.int32), "grad_output_was_one", read_only=False)
        o.grad_output_was_one = was_one.data_ptr()
        if self.in_place:
            grad = logits
            o.grad_logits, o.grad_strides = grad.data_ptr(), Strides(*self.place_grad.strides)
        else:
            grad = self.set_grad(emulator, o)
        self.call(emulator, "cross_entropy_backward", o)
        if not self.in_place:
            self.all_written_but_gaps(emulator, grad)
        assert bool(was_one) == (self.grad_stride == 1), f"{self}: grad_output_was_one is {was_one.item()}"
        return self.place_grad.view(grad)

    def check_hand_over(self, emulator: Emulator, o: CrossEntropyOptions, grad: Tensor) -> None:
        """The forward pass leaves the gradient for a grad_output of 1. The backward pass then does not change it. It is
        bitwise identical to the gradient that the backward pass computes itself."""
        left = grad.clone()
        was_one = emulator.output(1, torch.int32, "grad_output_was_one")
        o.grad_output = emulator.input(torch.ones(1, dtype=self.loss_dtype), "one").data_ptr()
        o.grad_output_stride, o.grad_ready, o.grad_output_was_one = 0, True, was_one.data_ptr()
        self.call(emulator, "cross_entropy_backward", o)
        assert was_one == 1 and torch.equal(bits_of(grad), bits_of(left)), f"{self}: a ready gradient was not kept"
        o.grad_ready = False
        computed = self.place_grad.view(self.set_grad(emulator, o))
        self.call(emulator, "cross_entropy_backward", o)
        left = self.place_grad.view(left)
        # On a CPU, a NaN has the sign of the operand that the compiler puts first; on a GPU, it has none.
        nan = computed.isnan() & left.isnan()
        same = torch.equal(bits_of(computed.masked_fill(nan, 0)), bits_of(left.masked_fill(nan, 0)))
        assert same, f"{self}: the gradient of the forward pass differs from that of the backward pass"

    def set_grad(self, emulator: Emulator, o: CrossEntropyOptions) -> Tensor:
        grad = emulator.output(self.place_grad.span, self.dtype, "grad_logits", self.place_grad.offset)
        o.grad_logits, o.grad_strides = grad.data_ptr(), Strides(*self.place_grad.strides)
        return grad

    def all_written_but_gaps(self, emulator: Emulator, grad: Tensor) -> None:
        gaps = (self.place_grad.span - self.rows * self.classes) * grad.element_size()
        self.all_written(emulator, {"grad_logits": grad}, gaps)

    def set_inputs(self, emulator: Emulator, o: CrossEntropyOptions) -> Tensor:
        o.dtype, o.loss_dtype, o.reduction = DTYPES[self.dtype], DTYPES[self.loss_dtype], REDUCTIONS[self.reduction]
        o.outer, o.classes, o.inner = self.shape
        o.tuning = CudaTuning.of(**TUNINGS[self.tuning])
        o.ignore_index, o.label_smoothing = self.ignore_index, self.smoothing
        place = self.place_logits
        logits = emulator.input(place.fill(self.logits), "logits", place.offset, read_only=not self.in_place)
        o.logits, o.logits_strides = logits.data_ptr(), Strides(*place.strides)
        if self.target.is_floating_point():
            place = self.place_target
            memory = emulator.input(place.fill(self.target), "target_probability", place.offset)
            o.target_probability, o.target_strides = memory.data_ptr(), Strides(*place.strides)
        else:
            o.target_index = emulator.input(self.target, "target_index", self.target_offset).data_ptr()
        if self.weight is not None:
            o.weight = emulator.input(self.weight, "weight").data_ptr()
            if self.smoothing > 0 and not self.target.is_floating_point():
                weight_sum = self.weight.double().sum().to(self.weight.dtype).view(1)
                o.weight_sum = emulator.input(weight_sum, "weight_sum").data_ptr()
        return logits

    def set_outputs(self, emulator: Emulator, o: CrossEntropyOptions) -> dict[str, Tensor]:
        wide = statistic(self.dtype)
        outputs = {name: emulator.output(self.rows, wide, name) for name in ("row_max", "row_scale")}
        outputs["loss"] = emulator.output(self.rows if self.reduction == "none" else 1, self.loss_dtype, "loss")
        if self.reduction == "mean":
            outputs["total_weight"] = emulator.output(1, wide, "total_weight")
        for name, memory in outputs.items():
            setattr(o, name, memory.data_ptr())
        o.scratch = emulator.output(emulator.call("cross_entropy_scratch", o), torch.uint8, "scratch").data_ptr()
        return outputs

    # ---- Expected results

    def expected(self) -> tuple[Tensor, Tensor]:
        x = self.logits.double().requires_grad_()
        loss = reference.cross_entropy(x, self.target, self.weight, self.ignore_index, self.reduction, self.smoothing)
        loss.backward(self.grad_output.double().expand(self.rows).view_as(loss) if loss.dim() else self.grad_output[0])
        grad = x.grad
        if not self.target.is_floating_point():  # ignored rows have zeros, even where the logits are NaN
            grad = torch.where((self.target != self.ignore_index)[:, None], grad, 0)
        return loss.detach().reshape(-1), grad

    def compare(self, results: dict[str, Tensor]) -> None:
        loss, grad = self.expected()
        # The size of the terms that are summed: the weights times the spread of the logits.
        finite = self.logits[self.logits.isfinite()].double()
        spread = (finite.max() - finite.min()).item() if finite.numel() else 0.0
        largest = (1 if self.weight is None else self.weight.max().item()) * (
            2 if self.target.is_floating_point() else 1
        )
        terms = largest * (1 + spread / 8) * (self.rows if self.reduction == "sum" else 1)
        assert_exact(results["loss"], loss, terms, f"{self}: loss")
        if self.reduction == "mean":
            total = torch.tensor([self.total_weight], dtype=torch.float64)
            assert_exact(results["total_weight"], total, what=f"{self}: total_weight")
        grad_output = self.grad_output.double().abs().max().item()
        if self.reduction == "mean":
            grad_output /= self.total_weight or 1
        assert_exact(
            results["grad_logits"], grad, largest * grad_output * (1 + min(spread, 100) / 8), f"{self}: gradient"
        )


class NegativeLogLikelihood(Problem):
    def __init__(
        self,
        rng: random.Random,
        dtype: torch.dtype,
        shape: tuple[int, int, int],
        reduction: str | None = None,
        layout: str | None = None,
    ):
        self.dtype, self.shape, self.reduction = dtype, shape, reduction or rng.choice(list(REDUCTIONS))
        outer, classes, inner = shape
        self.rows, self.classes, self.layout = outer * inner, classes, layout or rng.choice(LAYOUTS)
        self.place_input = Placement(self.layout if inner == 1 or self.layout != "expanded" else "inner", shape, rng)
        grad_layout = rng.choice(["contiguous", "padded", "inner"])  # in "contiguous", the classes are contiguous
        self.place_grad = Placement(grad_layout, shape, rng)
        values = torch.randn(shape, dtype=torch.float64) * rng.choice([1, 100])
        self.input = (values[:1].expand(shape) if self.place_input.strides[0] == 0 else values).to(dtype)
        self.loss_dtype = rng.choice([dtype, statistic(dtype)])
        self.ignore_index = rng.choice([-100, -100, 0, classes - 1, classes + 5])
        self.weight = (torch.rand(classes) + 0.1).to(statistic(dtype)) if rng.random() < 0.5 else None
        self.target = torch.randint(classes, (outer, inner))
        self.target[torch.rand(outer, inner) < rng.choice([0, 0.3, 0.3, 1])] = self.ignore_index
        self.grad_stride = int(self.reduction == "none" and rng.random() < 0.7)
        values = torch.randn(self.rows if self.grad_stride else 1, dtype=torch.float64)
        self.grad_output = values.to(self.loss_dtype)
        self.choose_schedules(rng)
        self.tuning = rng.choice(["default", "loops"])

    def set_forward(self, emulator: Emulator, o: NLLLossOptions) -> dict[str, Tensor]:
        o.dtype, o.loss_dtype, o.reduction = DTYPES[self.dtype], DTYPES[self.loss_dtype], REDUCTIONS[self.reduction]
        o.outer, o.classes, o.inner = self.shape
        o.ignore_index, o.tuning = self.ignore_index, CudaTuning.of(**TUNINGS[self.tuning])
        place = self.place_input
        o.input = emulator.input(place.fill(self.input), "input", place.offset).data_ptr()
        o.input_strides = Strides(*place.strides)
        o.target_index = emulator.input(self.target, "target").data_ptr()
        if self.weight is not None:
            o.weight = emulator.input(self.weight, "weight").data_ptr()
        outputs = {"loss": emulator.output(self.rows if self.reduction == "none" else 1, self.loss_dtype, "loss")}
        if self.reduction == "mean":
            outputs["total_weight"] = emulator.output(1, statistic(self.dtype), "total_weight")
        for name, memory in outputs.items():
            setattr(o, name, memory.data_ptr())
        o.scratch = emulator.output(emulator.call("nll_loss_scratch", o), torch.uint8, "scratch").data_ptr()
        return outputs

    def backward(self, emulator: Emulator, o: NLLLossOptions) -> Tensor:
        o.grad_output = emulator.input(self.grad_output, "grad_output").data_ptr()
        o.grad_output_stride, place = self.grad_stride, self.place_grad
        grad = emulator.output(place.span, self.dtype, "grad_input", place.offset)
        o.grad_input, o.grad_strides = grad.data_ptr(), Strides(*place.strides)
        self.call(emulator, "nll_loss_backward", o)
        gaps = (place.span - self.input.numel()) * grad.element_size()
        self.all_written(emulator, {"grad_input": grad}, gaps)
        return place.view(grad)

    def launch(self, emulator: Emulator) -> dict[str, Tensor]:
        o = NLLLossOptions()
        outputs = self.set_forward(emulator, o)
        self.call(emulator, "nll_loss_forward", o)
        self.all_written(emulator, outputs)
        return {**outputs, "grad_input": self.backward(emulator, o)}

    def compare(self, results: dict[str, Tensor]) -> None:
        x = self.input.double().requires_grad_()
        loss = reference.nll_loss(x, self.target, self.weight, self.ignore_index, self.reduction)
        loss.backward(self.grad_output.double().expand(self.rows).view_as(loss) if loss.dim() else self.grad_output[0])
        terms = self.input.double().abs().max().item() * (self.rows if self.reduction == "sum" else 1)
        assert_exact(results["loss"], loss.detach().reshape(-1), terms, f"{self}: loss")
        assert_exact(results["grad_input"], x.grad, what=f"{self}: gradient")


def slice_of_padded(rng: random.Random, dtype: torch.dtype, classes: int, tuning: str, rows: int) -> CrossEntropy:
    """Rows of logits that all begin at a 16-byte boundary; those of the gradient begin anywhere."""
    problem = CrossEntropy(rng, dtype, classes, *rng.choice(TARGETS), rng.choice(["mean", "sum"]), "contiguous", rows)
    padded = Placement("contiguous", problem.shape, rng)
    stride = classes + -classes % 16
    padded.strides, padded.span = (stride, 1, stride), rows * stride
    problem.place_logits = problem.place_target = padded
    problem.place_grad = Placement("contiguous", problem.shape, rng)
    problem.tuning, problem.grad_in_forward, problem.in_place = tuning, True, False
    problem.schedules = problem.schedules[:1]
    return problem
