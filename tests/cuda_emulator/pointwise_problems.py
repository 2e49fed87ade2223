"""Random problems for the pointwise losses: any formula, operands of one value or repeated, any of the gradients."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from helpers.oracle import assert_exact
from torch import Tensor
from torch.nn.functional import logsigmoid

from fusedloss import pointwise_registry

from .emulator import DTYPES, REDUCTIONS, CudaTuning, Emulator, PointwiseOptions
from .problems import TUNINGS, Problem, bits_of, statistic

INF, NAN = float("inf"), float("nan")


def _softplus(x: Tensor) -> Tensor:
    return -logsigmoid(-x)


@dataclass(frozen=True)
class Formula:
    """`operands` makes the operands from three draws: any numbers, numbers in [0, 1], and signs. `terms` computes the
    size of the terms that make up a loss, in addition to the loss itself, from operands and parameters."""

    operands: Callable[[Tensor, Tensor, Tensor], list[Tensor]]
    parameters: tuple[float, ...] = ()
    terms: Callable[..., Tensor] = lambda x, *_: 0 * x
    specials: tuple[float, ...] = ()  # values that are put into the input
    # The same formula, elementwise, where torch has no derivative with respect to some operands.
    composed: Callable[..., Tensor] | None = None


def _pairs(x: Tensor, u: Tensor, s: Tensor) -> list[Tensor]:
    """-> pairs of numbers, some of them equal."""
    return [x, torch.where(u < 0.1, x, x.roll(1) + s)]


def _log_terms(x: Tensor, t: Tensor, eps: float) -> Tensor:
    return x.exp() + (t * x).abs() + (t * t.log()).abs()


def _rate_terms(x: Tensor, t: Tensor, eps: float) -> Tensor:
    return x + (t * (x + eps).log()).abs() + (t * t.log()).abs()


def _weighted_bce(x: Tensor, t: Tensor, weight: Tensor, pos_weight: Tensor) -> Tensor:
    return weight * ((1 - t) * _softplus(x) - pos_weight * t * logsigmoid(x))


FORMULAS = {
    "mse_loss": Formula(_pairs, specials=(INF, -INF, NAN)),
    "l1_loss": Formula(_pairs, specials=(INF, -INF)),
    "smooth_l1_loss": Formula(_pairs, (1.0,), specials=(INF, -INF, NAN)),
    "huber_loss": Formula(_pairs, (1.5,), specials=(INF, -INF, NAN)),
    "binary_cross_entropy_with_logits": Formula(lambda x, u, s: [x, u], terms=lambda x, t: x.abs(), specials=(NAN,)),
    "weighted_binary_cross_entropy_with_logits": Formula(
        lambda x, u, s: [x, u, u.roll(1) + 1, 2 * u.roll(2)], terms=lambda x, *_: 6 * x.abs(), composed=_weighted_bce
    ),
    "kl_div": Formula(
        lambda x, u, s: [-x.abs(), torch.where(u < 0.2, 0 * u, u)], terms=lambda x, t: (t * x).abs(), specials=(NAN,)
    ),
    "kl_div_log_target": Formula(
        lambda x, u, s: [-x.abs(), -4 * u], terms=lambda x, t: t.exp() * (t.abs() + x.abs()), specials=(-INF, NAN)
    ),
    "poisson_nll_loss": Formula(lambda x, u, s: [4 * u * s, x.abs() + 0.1], (1e-8,), _log_terms, (-INF, NAN)),
    "poisson_nll_loss_full": Formula(lambda x, u, s: [4 * u * s, x.abs() + 0.1], (1e-8,), _log_terms, (-INF, NAN)),
    "poisson_nll_loss_of_rate": Formula(lambda x, u, s: [x.abs(), 8 * u], (1e-3,), _rate_terms, (INF, NAN)),
    "poisson_nll_loss_of_rate_full": Formula(lambda x, u, s: [x.abs(), 8 * u], (1e-3,), _rate_terms, (INF, NAN)),
    "gaussian_nll_loss": Formula(
        lambda x, u, s: [*_pairs(x, u, s), u.roll(1)], (0.05, 0.9189385), lambda x, t, v, *_: 4 + 0 * x, (INF, NAN)
    ),
    "soft_margin_loss": Formula(
        lambda x, u, s: [x, s], terms=lambda x, t: x.abs(), composed=lambda x, t: _softplus(-t * x)
    ),
}


class Pointwise(Problem):
    def __init__(
        self,
        rng: random.Random,
        name: str,
        dtype: torch.dtype,
        numel: int,
        reduction: str,
        finite: bool = False,
        formula: Formula | None = None,
    ):
        self.name, self.dtype, self.numel, self.reduction = name, dtype, numel, reduction
        self.formula = formula or FORMULAS[name]
        self.make_operands(rng, finite)
        count = len(self.operands)
        self.loss_dtype = rng.choice([dtype, statistic(dtype)])
        self.same_offset = rng.random() < 0.6
        # Of each operand, of each gradient, and of loss and grad_output.
        offsets = 2 * count + 2
        self.offsets = [rng.choice([0, 0, 1, 3])] * offsets
        if not self.same_offset:
            self.offsets = rng.choices([0, 1, 2, 4], k=offsets)
        self.divisor = rng.choice([float(numel), 3.0])
        self.grad_stride = int(reduction == "none" and rng.random() < 0.7)
        values = torch.randn(numel if self.grad_stride else 1, dtype=torch.float64)
        self.grad_output = values.to(self.loss_dtype)
        self.grad_output[self.grad_output == 1] = 2  # check_hand_over tests 1
        self.wanted = sorted(rng.sample(range(count), rng.randint(1, count)))
        if rng.random() < 0.3:
            self.wanted = [0]
        self.choose_schedules(rng)
        self.tuning = rng.choice(["default", "loops"])
        self.grad_in_forward = reduction != "none" and rng.random() < 0.5

    def make_operands(self, rng: random.Random, finite: bool) -> None:
        numel, self.scale = self.numel, rng.choice([1, 1, 60])
        x = torch.randn(numel, dtype=torch.float64) * self.scale
        x[torch.rand(numel) < 0.1] = rng.choice([0.0, -0.0, 0.5, 1e-6])
        signs = torch.randint(2, (numel,)).double() * 2 - 1
        self.operands = [
            operand.to(self.dtype) for operand in self.formula.operands(x, torch.rand(numel).double(), signs)
        ]
        if numel and self.formula.specials and not finite and rng.random() < 0.15:
            self.operands[0][rng.randrange(numel)] = rng.choice(self.formula.specials)
        self.repeat_operands(rng)

    def repeat_operands(self, rng: random.Random) -> None:
        """Sets `periods`: 0, or after how many elements an operand repeats itself; with few operands, 0 or 1."""
        self.periods = [0] * len(self.operands)
        for k in range(1, len(self.operands)):
            if self.numel and rng.random() < 0.35:
                rows = [rng.randint(1, self.numel), min(self.numel, 8 * rng.randint(1, 4))]
                self.periods[k] = rng.choice([1, *rows] if len(self.operands) > 2 else [1])
                self.operands[k] = self.operands[k][: self.periods[k]]

    # ---- A run

    def launch(self, emulator: Emulator) -> dict[str, Tensor]:
        o = PointwiseOptions()
        o.dtype, o.loss_dtype, o.reduction = DTYPES[self.dtype], DTYPES[self.loss_dtype], REDUCTIONS[self.reduction]
        o.numel, o.divisor, o.operands = self.numel, self.divisor, len(self.operands)
        for k, values in enumerate(self.operands):
            o.operand[k] = emulator.input(values, f"operand {k}", self.offsets[k]).data_ptr()
            o.operand_period[k] = self.periods[k]
        for k, value in enumerate(self.formula.parameters):
            o.parameter[k] = value
        losses, offset = (self.numel, self.offsets[-2]) if self.reduction == "none" else (1, 0)
        outputs = {"loss": emulator.output(losses, self.loss_dtype, "loss", offset)}
        o.loss, o.tuning = outputs["loss"].data_ptr(), CudaTuning.of(**TUNINGS[self.tuning])
        o.scratch = emulator.output(emulator.call("pointwise_scratch", o), torch.uint8, "scratch").data_ptr()
        grads = {}
        if self.grad_in_forward:
            grads = self.set_grads(emulator, o)
        self.call(emulator, "pointwise_forward", o, self.name.encode())
        self.all_written(emulator, {**outputs, **grads})
        o.loss = None
        if self.grad_in_forward:
            self.check_hand_over(emulator, o, grads)
        grads = self.set_grads(emulator, o)
        was_one = self.backward(emulator, o, self.grad_output, self.grad_stride, self.grad_in_forward)
        assert was_one == (self.grad_stride == 1 or self.numel == 0), f"{self}: grad_output_was_one is {was_one}"
        self.all_written(emulator, grads)
        return {**outputs, **grads}

    def set_grads(self, emulator: Emulator, o: PointwiseOptions) -> dict[str, Tensor]:
        grads = {}
        for k in self.wanted:
            offset = self.offsets[len(self.operands) + k]
            grads[f"gradient {k}"] = emulator.output(self.numel, self.dtype, f"gradient {k}", offset)
            o.grad[k] = grads[f"gradient {k}"].data_ptr()
        return grads

    def backward(self, emulator: Emulator, o: PointwiseOptions, values: Tensor, stride: int, ready: bool) -> bool:
        """-> the reported grad_output_was_one; True if nothing was reported."""
        o.grad_output = emulator.input(values, "grad_output", self.offsets[-1]).data_ptr()
        o.grad_output_stride, o.grad_ready = stride, ready
        was_one = emulator.input(torch.ones(1, dtype=torch.int32), "grad_output_was_one", read_only=False)
        o.grad_output_was_one = was_one.data_ptr()
        self.call(emulator, "pointwise_backward", o, self.name.encode())
        return bool(was_one)

    def check_hand_over(self, emulator: Emulator, o: PointwiseOptions, grads: dict[str, Tensor]) -> None:
        """The forward pass leaves the gradient for a grad_output of 1. The backward pass then does not change it. It is
        bitwise identical to the gradient that the backward pass computes itself."""
        left = {name: bits_of(grad) for name, grad in grads.items()}
        one = torch.ones(1, dtype=self.loss_dtype)
        assert self.backward(emulator, o, one, 0, ready=True), f"{self}: grad_output_was_one"
        assert all(torch.equal(bits_of(grads[name]), left[name]) for name in grads), f"{self}: ready gradient not kept"
        computed = self.set_grads(emulator, o)
        self.backward(emulator, o, one, 0, ready=False)
        same = all(torch.equal(bits_of(computed[name]), left[name]) for name in grads)
        assert same, f"{self}: the gradient of the forward pass differs from that of the backward pass"
        self.compare(grads, one)

    # ---- Expected results

    def compare(self, results: dict[str, Tensor], grad_output: Tensor | None = None) -> None:
        numbers = torch.arange(self.numel)
        operands = [
            operand.double()[numbers % period if period else numbers].requires_grad_()
            for operand, period in zip(self.operands, self.periods, strict=True)
        ]
        elementwise = self.formula.composed or (
            lambda *arguments: pointwise_registry.composed(
                self.name, arguments[: len(operands)], arguments[len(operands) :], 0, None
            )
        )
        parameters = self.formula.parameters
        losses = elementwise(*operands, *parameters)
        factor = {"none": 1.0, "sum": 1.0, "mean": 1 / self.divisor if self.divisor else NAN}[self.reduction]
        loss = losses if self.reduction == "none" else losses.sum() * factor
        g = (self.grad_output if grad_output is None else grad_output).double() * factor
        grads = torch.autograd.grad(losses, operands, g.expand(self.numel))
        with torch.no_grad():
            terms = losses.abs() + self.formula.terms(*operands, *parameters).abs()
            terms = terms[terms.isfinite()]
            scale = 0.0
            if len(terms):
                scale = (terms.max() if self.reduction == "none" else terms.sum() * factor).item()
            largest = max([1.0, *(t[t.isfinite()].abs().max().item() for t in operands if t.isfinite().any())])
            grad_scale = largest * (g.abs().max().item() if len(g) else 0)
        expected = {"loss": loss.detach().reshape(-1), **{f"gradient {k}": grad for k, grad in enumerate(grads)}}
        for name, result in results.items():
            assert_exact(result, expected[name], scale if name == "loss" else grad_scale, f"{self}: {name}")
