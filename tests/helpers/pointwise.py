"""What the tests of pointwise losses share: the losses with their options, and how their operands are drawn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusedloss.functional as fused
from fusedloss import reference
from helpers.draws import REDUCTIONS

DRAWS: dict[str, Callable[[Sequence[int]], Tensor]] = {
    "real": lambda shape: torch.randn(shape, dtype=torch.float64),
    "logit": lambda shape: 8 * torch.randn(shape, dtype=torch.float64),
    "rate": lambda shape: 3 * torch.rand(shape, dtype=torch.float64) + 0.1,
    "log-probability": lambda shape: -3 * torch.rand(shape, dtype=torch.float64),
    "probability": lambda shape: (1.2 * torch.rand(shape, dtype=torch.float64) - 0.1).clamp(0, 1),  # also 0 and 1
    "count": lambda shape: torch.randint(0, 9, tuple(shape)).double(),
    "sign": lambda shape: 2.0 * torch.randint(0, 2, tuple(shape)).double() - 1,
    "variance": lambda shape: torch.rand(shape, dtype=torch.float64) + 0.05,  # some are below the eps of the case
}


@dataclass(frozen=True)
class Case:
    function: str
    operands: dict[str, str]  # from each operand's name to how it is drawn
    options: dict[str, Any] = field(default_factory=dict)
    not_torchs: tuple[str, ...] = ()  # operands for which torch's function has no derivative

    def draw(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Tensor]:
        return {name: DRAWS[kind](shape).to(device, dtype) for name, kind in self.operands.items()}

    def ours(self, operands: dict[str, Tensor], **options: Any) -> Tensor:
        return getattr(fused, self.function)(**operands, **self.options, **options)

    def torchs(self, operands: dict[str, Tensor], **options: Any) -> Tensor:
        return getattr(F, self.function)(**operands, **self.options, **options)

    def reference(self, operands: dict[str, Tensor], **options: Any) -> Tensor:
        return getattr(reference, self.function)(**operands, **self.options, **options)

    def of_input(self, operands: dict[str, Tensor], module: Any = fused, **options: Any) -> Callable[[Tensor], Tensor]:
        others = {name: operand for name, operand in operands.items() if name != "input"}
        return lambda input: getattr(module, self.function)(input, **others, **self.options, **options)


def distance(function: str, **options: Any) -> Case:
    return Case(function, {"input": "real", "target": "real"}, options)


def bce(*weights: str) -> Case:
    operands = {"input": "logit", "target": "probability"} | dict.fromkeys(weights, "rate")
    return Case("binary_cross_entropy_with_logits", operands, not_torchs=weights)


CASES = {
    "l1": distance("l1_loss"),
    "smooth l1": distance("smooth_l1_loss"),
    "smooth l1, beta 0.3": distance("smooth_l1_loss", beta=0.3),
    "smooth l1, beta 0": distance("smooth_l1_loss", beta=0.0),
    "huber": distance("huber_loss"),
    "huber, delta 1.7": distance("huber_loss", delta=1.7),
    "bce": bce(),
    "bce, weight": bce("weight"),
    "bce, pos_weight": bce("pos_weight"),
    "bce, both weights": bce("weight", "pos_weight"),
    "kl_div": Case("kl_div", {"input": "log-probability", "target": "probability"}),
    "kl_div, log_target": Case(
        "kl_div", {"input": "log-probability", "target": "log-probability"}, {"log_target": True}
    ),
    "poisson": Case("poisson_nll_loss", {"input": "real", "target": "count"}),
    "poisson, full": Case("poisson_nll_loss", {"input": "real", "target": "count"}, {"full": True}),
    "poisson, rate": Case("poisson_nll_loss", {"input": "rate", "target": "count"}, {"log_input": False, "eps": 0.01}),
    "poisson, rate, full": Case(
        "poisson_nll_loss", {"input": "rate", "target": "count"}, {"log_input": False, "full": True}
    ),
    "gaussian": Case("gaussian_nll_loss", {"input": "real", "target": "real", "var": "variance"}, {"eps": 0.2}),
    "gaussian, full": Case("gaussian_nll_loss", {"input": "real", "target": "real", "var": "variance"}, {"full": True}),
    "soft margin": Case("soft_margin_loss", {"input": "logit", "target": "sign"}, not_torchs=("target",)),
}


def reductions(case: Case) -> list[str]:
    return [*REDUCTIONS, "batchmean"] if case.function == "kl_div" else REDUCTIONS


def leaves(operands: dict[str, Tensor], dtype: torch.dtype | None = None, but: Sequence[str] = ()) -> dict[str, Tensor]:
    """New leaves with the same values in the same layout."""
    return {
        name: operand.detach().to(dtype or operand.dtype).requires_grad_(name not in but)
        for name, operand in operands.items()
    }


every_case = pytest.mark.parametrize("name", CASES)


MODULES = {
    "l1_loss": "L1Loss",
    "smooth_l1_loss": "SmoothL1Loss",
    "huber_loss": "HuberLoss",
    "binary_cross_entropy_with_logits": "BCEWithLogitsLoss",
    "kl_div": "KLDivLoss",
    "poisson_nll_loss": "PoissonNLLLoss",
    "gaussian_nll_loss": "GaussianNLLLoss",
    "soft_margin_loss": "SoftMarginLoss",
}
