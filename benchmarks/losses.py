"""The losses that are timed: torch's call, fusedloss's call, and input values like those in training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import fusedloss

Loss = Callable[..., Tensor]
Draw = Callable[[tuple[int, ...], Generator], Tensor]


@dataclass(frozen=True)
class Operand:
    """A tensor that a loss is called with: of shape (N, C, d1, …), or class indices of shape (N, d1, …)."""

    draw: Draw  # returns float32, because not every device can draw 16-bit normals, or int64 for class indices
    differentiable: bool = False
    read: Literal["all", "one of a row", "indices"] = "all"  # the part of it that the formula needs


@dataclass(frozen=True)
class TimedLoss:
    eager: Callable[..., Loss]  # returns a module, or a function of the operands
    fused: Callable[..., Loss]
    operands: tuple[Operand, ...]
    weights: tuple[str, ...] = ()  # options that hold a weight for each class


def normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def uniform(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device)


def variances(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return uniform(shape, generator) + 0.1


def labels(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Values of 0 or 1."""
    return uniform(shape, generator).round()


def signs(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return 2 * labels(shape, generator) - 1


def counts(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.poisson(normal(shape, generator).exp(), generator)


def probabilities(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return normal(shape, generator).softmax(1)


def log_probabilities(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return normal(shape, generator).log_softmax(1)


def indices(shape: tuple[int, ...], generator: Generator) -> Tensor:
    rows, classes, *inner = shape
    return torch.randint(classes, (rows, *inner), generator=generator, device=generator.device)


INPUT = Operand(normal, differentiable=True)
CLASSES = Operand(indices, read="indices")
CLASS_PROBABILITIES = Operand(probabilities)


# Losses that torch has no module for, written with torch's operations.


def log_cosh() -> Loss:
    return lambda input, target: torch.log(torch.cosh(input - target)).mean()


def quantile(q: float) -> Loss:
    def loss(input: Tensor, target: Tensor) -> Tensor:
        error = target - input
        return torch.maximum(q * error, (q - 1) * error).mean()

    return loss


def focal(alpha: float, gamma: float) -> Loss:
    """Lin et al., "Focal Loss for Dense Object Detection", 2017, as torchvision writes it."""

    def loss(input: Tensor, target: Tensor) -> Tensor:
        p = torch.sigmoid(input)
        cross_entropy = F.binary_cross_entropy_with_logits(input, target, reduction="none")
        of_target = p * target + (1 - p) * (1 - target)
        balance = alpha * target + (1 - alpha) * (1 - target)
        return (balance * cross_entropy * (1 - of_target) ** gamma).mean()

    return loss


def charbonnier(eps: float) -> Loss:
    """Charbonnier et al., "Two deterministic half-quadratic regularization algorithms", 1994."""
    return lambda input, target: torch.sqrt((input - target) ** 2 + eps**2).mean()


def like_torchs(
    name: str, *others: Operand, input: Operand = INPUT, weights: tuple[str, ...] = (), **options: Any
) -> TimedLoss:
    """A module that torch and fusedloss have under the same name."""

    def made_by(modules: Any) -> Callable[..., nn.Module]:
        return lambda **more: getattr(modules, name)(**options, **more)

    return TimedLoss(made_by(nn), made_by(fusedloss), (input, *others), weights)


def custom(eager: Callable[..., Loss], target: Draw, expression: str, **parameters: float) -> TimedLoss:
    """A user's own loss, which is one expression in fusedloss."""
    return TimedLoss(
        lambda: eager(**parameters),
        lambda: fusedloss.custom_loss(expression, **parameters),
        (INPUT, Operand(target)),
    )


CUSTOM = {
    "log_cosh": custom(log_cosh, normal, "log(cosh(input - target))"),
    "quantile": custom(quantile, normal, "maximum(q * (target - input), (q - 1) * (target - input))", q=0.9),
    "focal": custom(
        focal,
        labels,
        "(alpha * target + (1 - alpha) * (1 - target))"
        " * (sigmoid(input) * (1 - target) + sigmoid(-input) * target) ** gamma"
        " * (softplus(-input) * target + softplus(input) * (1 - target))",
        alpha=0.25,
        gamma=2.0,
    ),
    "charbonnier": custom(charbonnier, normal, "sqrt(square(input - target) + eps * eps)", eps=1e-3),
}

LOSSES: dict[str, TimedLoss] = {
    "cross_entropy": like_torchs("CrossEntropyLoss", CLASSES, weights=("weight",)),
    "mse": like_torchs("MSELoss", Operand(normal)),
    "l1": like_torchs("L1Loss", Operand(normal)),
    "smooth_l1": like_torchs("SmoothL1Loss", Operand(normal)),
    "huber": like_torchs("HuberLoss", Operand(normal)),
    "bce": like_torchs("BCEWithLogitsLoss", Operand(uniform), weights=("weight", "pos_weight")),
    "soft_margin": like_torchs("SoftMarginLoss", Operand(signs)),
    "kl_div": like_torchs(
        "KLDivLoss", CLASS_PROBABILITIES, input=Operand(log_probabilities, differentiable=True), reduction="batchmean"
    ),
    "poisson_nll": like_torchs("PoissonNLLLoss", Operand(counts)),
    # The variance has a gradient too, as in a network that learns it.
    "gaussian_nll": like_torchs("GaussianNLLLoss", Operand(normal), Operand(variances, differentiable=True)),
    "nll": like_torchs(
        "NLLLoss",
        CLASSES,
        input=Operand(log_probabilities, differentiable=True, read="one of a row"),
        weights=("weight",),
    ),
    **CUSTOM,
}
