"""The contenders that are timed: torch's loss in eager mode, the same under torch.compile, and fusedloss's.

A suite may add others: torch's eager loss in a process whose allocator requests huge pages, the peers, and the
machine's own copy, which is the upper limit for all.
"""

import contextlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

import fusedloss

from .cases import Case
from .copying import make_copy
from .losses import LOSSES, Loss
from .peers import PEERS
from .timing import Step
from .worker import EagerWithHugePages


def eager(case: Case) -> Loss:
    return case.timed_loss.eager(**case.options)


def compiled(case: Case) -> Loss:
    # Reset first: after a second size the compiler would switch to slower code for dynamic sizes.
    torch.compiler.reset()
    return torch.compile(eager(case))


def fused(case: Case) -> Loss:
    options = {"inplace_backward": True} if case.in_place else {}
    return case.timed_loss.fused(**case.options, **options)


CONTENDERS: dict[str, Callable[[Case], Loss]] = {"eager": eager, "compile": compiled, "fusedloss": fused}


# Contenders that are not a loss in this process.
OTHERS: dict[str, Callable[[Case, list[tuple[Tensor, ...]]], Step]] = {
    "eager, THP": lambda case, inputs: EagerWithHugePages(case),
    "copy": lambda case, inputs: make_copy([first for first, *_ in inputs]),
}


def loss_of(name: str, case: Case) -> Loss:
    return PEERS[name].load() if name in PEERS else CONTENDERS[name](case)


def overwrites_logits(name: str) -> bool:
    """True if the contender writes over the logits even in a case that is not in place."""
    return name in PEERS and PEERS[name].overwrites


def make_step(loss: Loss, case: Case, inputs: list[tuple[Tensor, ...]], overwrites: bool = False) -> Step:
    """Build one timed call: the loss alone, or the loss, its backward pass and the release of the gradients.

    The gradients are dropped after every step, so that the next backward pass allocates new ones, as after
    `optimizer.zero_grad()`. Each call uses the next element of `inputs`.
    """
    turn = 0

    def take_turn() -> tuple[Tensor, ...]:
        nonlocal turn
        turn = (turn + 1) % len(inputs)
        return inputs[turn]

    def forward() -> None:
        operands = take_turn()
        with torch.no_grad():
            loss(*operands)

    def forward_and_backward() -> None:
        operands = take_turn()
        loss(*operands).backward()
        for operand in operands:
            operand.grad = None

    if case.in_place or overwrites:
        return step_on_a_result(loss, case, *inputs[0])
    return Step(forward if case.step == "forward" else forward_and_backward)


def step_on_a_result(loss: Loss, case: Case, logits: Tensor, target: Tensor) -> Step:
    """Build the same call on an operation's result, which may be overwritten. It is restored outside the timing."""
    memory = torch.empty_like(logits, requires_grad=False)
    # The leaf has the logits' dtype and device, or autograd would convert its gradient inside the timing.
    leaf = torch.zeros((), dtype=logits.dtype, device=logits.device, requires_grad=True)

    def restore() -> None:
        memory.copy_(logits.detach())

    def forward() -> None:
        with torch.no_grad():
            loss(memory, target)

    def forward_and_backward() -> None:
        loss(ResultOf.apply(leaf, memory), target).backward()
        leaf.grad = None

    return Step(forward if case.step == "forward" else forward_and_backward, prepare=restore)


class ResultOf(torch.autograd.Function):
    """Return `memory` as if an operation on `leaf` had written it. Neither pass of this operation costs anything."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, leaf: Tensor, memory: Tensor) -> Tensor:
        return memory.detach()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.flatten()[0], None


def warm_up(device: str, losses: Iterable[str] = ()) -> None:
    """Let fusedloss compile what is not prebuilt now, so that its progress line does not mix with the benchmark's."""
    logits = torch.zeros(2, 3, device=device)
    fusedloss.CrossEntropyLoss()(logits, torch.zeros(2, dtype=torch.int64, device=device))
    for loss in losses:
        with contextlib.suppress(RuntimeError):  # the measurement reports it in a note
            LOSSES[loss].fused()
