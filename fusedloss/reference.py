"""Reference implementations for tests and benchmarks: slow and simple, in float64, without torch's loss functions.

Autograd can differentiate them, so they are the reference for gradients too. They expect valid arguments.
"""

import math

import torch
from torch import Tensor


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy as `fusedloss.functional.cross_entropy` defines it, in float64."""
    logits = input.double()
    classes_last = logits if logits.dim() == 1 else logits.movedim(1, -1)
    classes = classes_last.shape[-1]
    rows = classes_last.reshape(-1, classes)
    weights = torch.ones(classes, dtype=torch.float64, device=input.device) if weight is None else weight.double()
    relative = rows - rows.detach().amax(dim=1, keepdim=True)  # exact near the maximum, even if that is large
    log_p = relative - relative.exp().sum(dim=1, keepdim=True).log()
    if target.is_floating_point() and target.shape == input.shape:
        probabilities = target.double() if target.dim() == 1 else target.double().movedim(1, -1)
        q = (1 - label_smoothing) * probabilities.reshape(-1, classes) + label_smoothing / classes
        losses = -(weights * q * log_p).sum(dim=1)
        denominator = torch.tensor(len(rows), dtype=torch.float64, device=input.device)
        shape = classes_last.shape[:-1]
    else:
        indices = target.reshape(-1).long()
        kept = indices != ignore_index
        indices = torch.where(kept, indices, 0)
        row_weights = torch.where(kept, weights[indices], 0)
        losses = -(1 - label_smoothing) * weights[indices] * log_p.gather(1, indices[:, None])[:, 0]
        if label_smoothing > 0:
            losses = losses - label_smoothing / classes * (weights * log_p).sum(dim=1)
        losses = torch.where(kept, losses, 0)
        denominator = row_weights.sum()
        shape = target.shape
    if reduction == "none":
        return losses.reshape(shape)
    return losses.sum() if reduction == "sum" else losses.sum() / denominator


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Negative log likelihood as `fusedloss.functional.nll_loss` defines it, in float64."""
    class_dim = min(1, input.dim() - 1)
    weights = torch.ones(input.shape[class_dim], dtype=torch.float64, device=input.device)
    weights = weights if weight is None else weight.double()
    kept = target != ignore_index
    indices = torch.where(kept, target, 0).long()
    picked = input.double().gather(class_dim, indices.unsqueeze(class_dim)).squeeze(class_dim)
    losses = torch.where(kept, -weights[indices] * picked, 0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / torch.where(kept, weights[indices], 0).sum()


def mse_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Squared error as `fusedloss.functional.mse_loss` defines it, in float64. The same holds for the losses below."""
    return _reduced((input.double() - target.double()) ** 2, reduction)


def l1_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return _reduced((input.double() - target.double()).abs(), reduction)


def smooth_l1_loss(input: Tensor, target: Tensor, reduction: str = "mean", beta: float = 1.0) -> Tensor:
    distance = (input.double() - target.double()).abs()
    if beta == 0:
        return _reduced(distance, reduction)
    return _reduced(torch.where(distance < beta, distance**2 / (2 * beta), distance - beta / 2), reduction)


def huber_loss(input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0) -> Tensor:
    distance = (input.double() - target.double()).abs()
    return _reduced(torch.where(distance < delta, distance**2 / 2, delta * (distance - delta / 2)), reduction)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    logits, targets = input.double(), target.double()
    positive = targets * _softplus(-logits)
    if pos_weight is not None:
        positive = pos_weight.double() * positive
    losses = (1 - targets) * _softplus(logits) + positive
    return _reduced(losses if weight is None else weight.double() * losses, reduction)


def kl_div(input: Tensor, target: Tensor, reduction: str = "mean", log_target: bool = False) -> Tensor:
    log_q, p = input.double(), target.double()
    losses = p.exp() * (p - log_q) if log_target else torch.special.xlogy(p, p) - p * log_q
    if reduction == "batchmean":
        return losses.sum() / (input.shape[0] if input.dim() > 0 else 1)
    return _reduced(losses, reduction)


def poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    eps: float = 1e-8,
    reduction: str = "mean",
) -> Tensor:
    x, counts = input.double(), target.double()
    losses = x.exp() - counts * x if log_input else x - counts * (x + eps).log()
    if full:
        large = torch.where(counts <= 1, 2.0, counts)
        stirling = large * large.log() - large + 0.5 * (2 * math.pi * large).log()
        losses = losses + torch.where(counts <= 1, 0.0, stirling)
    return _reduced(losses, reduction)


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """Gaussian negative log likelihood. The shape of var must broadcast with that of input."""
    given = var.double()
    raised = torch.where(given < eps, eps + given - given.detach(), given)
    losses = 0.5 * (raised.log() + (input.double() - target.double()) ** 2 / raised)
    return _reduced(losses + 0.5 * math.log(2 * math.pi) if full else losses, reduction)


def soft_margin_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return _reduced(_softplus(-target.double() * input.double()), reduction)


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / losses.numel()
