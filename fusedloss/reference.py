"""The oracle of tests and benchmarks: each loss once more, slow, obvious, in float64, without torch's loss functions.

Differentiable by autograd, so that gradients have a reference too.
"""

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
    """Cross entropy of valid arguments, as `fusedloss.functional.cross_entropy` defines it; float64."""
    logits = input.double()
    classes_last = logits if logits.dim() == 1 else logits.movedim(1, -1)
    classes = classes_last.shape[-1]
    rows = classes_last.reshape(-1, classes)
    weights = torch.ones(classes, dtype=torch.float64, device=input.device) if weight is None else weight.double()
    relative = rows - rows.detach().amax(dim=1, keepdim=True)  # exact near the maximum, however large that is
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
    """Negative log likelihood of valid arguments, as `fusedloss.functional.nll_loss` defines it; float64."""
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
    """Squared error of valid arguments, as `fusedloss.functional.mse_loss` defines it; float64."""
    losses = (input.double() - target.double()) ** 2
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / losses.numel()
