"""The dtypes and reductions that the tests cover, and random arguments of cross entropy."""

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
REDUCTIONS = ["none", "mean", "sum"]


def class_dim(shape: tuple[int, ...]) -> int:
    return 0 if len(shape) == 1 else 1


def random_logits(shape: tuple[int, ...], dtype: torch.dtype, device: str, scale: float = 3.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * scale).to(device, dtype)


def random_indices(shape: tuple[int, ...], device: str, ignore_index: int = -100) -> Tensor:
    """Class indices for logits of this shape. About a third of the rows are ignored, but never all of them."""
    rows = tuple(size for d, size in enumerate(shape) if d != class_dim(shape))
    target = torch.randint(0, shape[class_dim(shape)], rows)
    if target.numel() > 1:
        kept, another = torch.randint(target.numel(), ()), int(ignore_index == 0)
        target[torch.rand(rows) < 0.3] = ignore_index
        if target.view(-1)[kept] == ignore_index and shape[class_dim(shape)] > another:
            target.view(-1)[kept] = another
    return target.to(device)


def random_probabilities(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).softmax(class_dim(shape)).to(device, dtype)


LAYOUTS = {
    "every second class": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2],
    "every second row": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], 1).flatten(0, 1)[::2],
    "transposed": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "classes last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "classes reversed in memory order": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "odd storage offset": lambda x: torch.cat([x.new_full((3,), torch.nan), x.flatten()])[3:].view(x.shape),
    "one row expanded": lambda x: x[:1].expand(x.shape),
    "one class expanded": lambda x: x[:, :1].expand(x.shape),
    "padded rows": lambda x: F.pad(x, (1, 2), value=torch.nan)[..., 1:-2],
}
