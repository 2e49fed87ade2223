"""What the tests of compiling and tracing share: arguments, a step of a loss, and the ops that a graph holds.

Values are compared with the float64 reference, and bitwise with the eager call, which runs the same kernel.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import fusedloss
import fusedloss.functional as fused
from fusedloss import reference
from fusedloss._build import release
from helpers.oracle import assert_exact

CLASSES = 7
OLD = release(torch.__version__) < (2, 13)
CE, CE_BACKWARD = "fusedloss.cross_entropy_forward", "fusedloss.cross_entropy_backward"
MSE, MSE_BACKWARD = "fusedloss.pointwise_forward", "fusedloss.pointwise_backward"


KINDS = ["indices", "smoothed", "probabilities", "mse"]


def functions(kind: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The fused loss and the reference."""
    name = "mse_loss" if kind == "mse" else "cross_entropy"
    return getattr(fused, name), getattr(reference, name)


LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "2-D": lambda **o: torch.randn(5, CLASSES, **o),
    "transposed": lambda **o: torch.randn(CLASSES, 5, **o).t(),
    "K-dim": lambda **o: torch.randn(2, CLASSES, 3, 4, **o),
    "channels last": lambda **o: torch.randn(2, CLASSES, 3, 4, **o).to(memory_format=torch.channels_last),
    "spatial strides that do not collapse": lambda **o: torch.randn(2, CLASSES, 4, 3, **o).transpose(2, 3),
    "a stride over the classes": lambda **o: torch.randn(5, 2 * CLASSES, **o)[:, ::2],
    "sliced rows": lambda **o: torch.randn(5, CLASSES + 4, **o)[:, 2:-2],
    "1-D": lambda **o: torch.randn(CLASSES, **o),
    "expanded": lambda **o: torch.randn(1, CLASSES, **o).expand(5, CLASSES),
    "one row": lambda **o: torch.randn(1, CLASSES, **o),
}


def target_for(kind: str, input: Tensor) -> tuple[Tensor, dict]:
    """A target of this kind, and the options that belong to it."""
    if kind == "mse":
        return torch.randn_like(input), {}
    class_dim = min(1, input.dim() - 1)
    if kind == "probabilities":
        weight = torch.rand(input.shape[class_dim], dtype=input.dtype, device=input.device)
        return torch.randn_like(input).softmax(class_dim), {"weight": weight, "label_smoothing": 0.2}
    rows = input.shape[:class_dim] + input.shape[class_dim + 1 :]
    target = torch.randint(0, input.shape[class_dim], rows, device=input.device)
    if kind == "indices":
        return target, {}
    if target.numel() > 0:
        target.view(-1)[-1] = 1  # ignored
        target.view(-1)[0] = 0  # not ignored
    weight = torch.rand(input.shape[class_dim], dtype=input.dtype, device=input.device) + 0.1
    return target, {"weight": weight, "ignore_index": 1, "label_smoothing": 0.1}


def given(kind: str, device: str, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, dict]:
    """An input, a target and options."""
    input = torch.randn(shape or (5, CLASSES), dtype=dtype, device=device)
    return input, *target_for(kind, input)


def doubled(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss of twice the input, which is not a leaf. Doubling is exact in every dtype, also for the gradient."""

    def of_doubled(input: Tensor, target: Tensor, **options) -> Tensor:
        return loss(input * 2, target, **options)

    return of_doubled


def step(loss: Callable[..., Tensor], input: Tensor, target: Tensor, upstream: Tensor | None = None, **options):
    """The loss, its gradient, and the upstream gradient, which is drawn if it is not given."""
    leaf = input.detach().requires_grad_()
    value = loss(leaf, target, **options)
    upstream = torch.randn_like(value) if upstream is None else upstream.to(value.dtype)
    return value.detach(), *torch.autograd.grad(value, leaf, upstream), upstream


def assert_step(kind: str, compiled: Callable[..., Tensor], input: Tensor, target: Tensor, **options) -> None:
    """A step of `compiled`, a compiled `doubled(...)`, bitwise equals the eager one and agrees with the reference."""
    ours, expected = functions(kind)
    loss, grad, upstream = step(compiled, input, target, **options)
    eager_loss, eager_grad, _ = step(doubled(ours), input, target, upstream, **options)
    assert torch.equal(loss, eager_loss) and torch.equal(grad, eager_grad)
    assert (loss.dtype, loss.shape, loss.device) == (eager_loss.dtype, eager_loss.shape, eager_loss.device)
    assert grad.stride() == eager_grad.stride()
    exact_loss, exact_grad, _ = step(doubled(expected), input.double(), target, upstream, **options)
    assert_exact(loss, exact_loss, scale=max(1.0, exact_loss.abs().sum().item()), what="loss")
    # A gradient is a difference of numbers that are at most this large.
    assert_exact(grad, exact_grad, scale=8 * max(1.0, upstream.double().abs().max().item()), what="gradient")


def losses_in(*graphs: torch.fx.GraphModule) -> set[str]:
    """The ops in these graphs that compute a loss, either ours or torch's."""
    modules = (module for graph in graphs for module in graph.modules() if isinstance(module, torch.fx.GraphModule))
    names = (str(node.target) for module in modules for node in module.graph.nodes if node.op == "call_function")
    return set(filter(is_loss, (name.removesuffix(".default") for name in names)))


def is_loss(name: str) -> bool:
    return any(part in name for part in ("fusedloss", "log_softmax", "nll_loss", "cross_entropy", "mse_loss"))


class Model(nn.Module):
    """Both losses behind a layer, as modules of `library`: torch.nn or fusedloss."""

    def __init__(self, library, device: str) -> None:
        super().__init__()
        self.layer = nn.Linear(6, CLASSES, device=device)
        weight = torch.linspace(0.5, 1.5, CLASSES, device=device)
        self.cross_entropy = library.CrossEntropyLoss(weight=weight, label_smoothing=0.1)
        self.mse = library.MSELoss(reduction="sum")

    def forward(self, features: Tensor, target: Tensor, values: Tensor) -> Tensor:
        logits = self.layer(features)
        return self.cross_entropy(logits, target) + 0.25 * self.mse(logits, values)


def models(device: str) -> tuple[Model, Model]:
    """One model with our losses and one with torch's, with the same parameters."""
    ours, torchs = Model(fusedloss, device), Model(nn, device)
    ours.load_state_dict(torchs.state_dict())
    return ours, torchs


def batch(device: str, rows: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Features, class indices and values for `Model`."""
    target = torch.randint(0, CLASSES, (rows,), device=device)
    return torch.randn(rows, 6, device=device), target, torch.randn(rows, CLASSES, device=device)


def assert_same_gradients(ours: nn.Module, torchs: nn.Module) -> None:
    for (name, mine), theirs in zip(ours.named_parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")
