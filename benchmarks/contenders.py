"""Who is timed: torch's module in eager mode, the same module under torch.compile, and fusedloss's."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import fusedloss

from .cases import Case

Loss = Callable[[Tensor, Tensor], Tensor]

EAGER_MODULES: dict[str, type[nn.Module]] = {"cross_entropy": nn.CrossEntropyLoss, "mse": nn.MSELoss}
FUSED_MODULES: dict[str, type[nn.Module]] = {
    "cross_entropy": fusedloss.CrossEntropyLoss,
    "mse": fusedloss.MSELoss,
}


def eager(case: Case) -> Loss:
    return EAGER_MODULES[case.loss]()


def compiled(case: Case) -> Loss:
    # Forget earlier sizes first: a second one would make the compiler switch to slower code for any size.
    torch.compiler.reset()
    return torch.compile(EAGER_MODULES[case.loss]())


def fused(case: Case) -> Loss:
    return FUSED_MODULES[case.loss]()


CONTENDERS: dict[str, Callable[[Case], Loss]] = {"eager": eager, "compile": compiled, "fusedloss": fused}


def make_step(loss: Loss, case: Case, inputs: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """What one timed call does: the loss, or the loss, its backward and the release of the gradient.

    The gradient is dropped after every step, so that the next backward makes a new one, as after
    `optimizer.zero_grad()`. Each call takes the next of `inputs`.
    """
    turn = 0

    def take_turn() -> tuple[Tensor, Tensor]:
        nonlocal turn
        turn = (turn + 1) % len(inputs)
        return inputs[turn]

    def forward() -> None:
        logits, target = take_turn()
        with torch.no_grad():
            loss(logits, target)

    def forward_and_backward() -> None:
        logits, target = take_turn()
        loss(logits, target).backward()
        logits.grad = None

    return forward if case.step == "forward" else forward_and_backward


def warm_up(device: str) -> None:
    """Let fusedloss build itself here if nothing is prebuilt: its own progress line and ours do not mix."""
    logits = torch.zeros(2, 3, device=device)
    fusedloss.CrossEntropyLoss()(logits, torch.zeros(2, dtype=torch.int64, device=device))
