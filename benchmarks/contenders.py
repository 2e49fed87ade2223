"""Who is timed: torch's loss in eager mode, the same under torch.compile, and fusedloss's.

Others stand beside them where a suite asks for it: torch's eager loss in a process whose allocator asks for huge
pages, the peers, and the machine's own copy, the limit of all.
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
    # Forget earlier sizes first: a second one would make the compiler switch to slower code for any size.
    torch.compiler.reset()
    return torch.compile(eager(case))


def fused(case: Case) -> Loss:
    options = {"inplace_backward": True} if case.in_place else {}
    return case.timed_loss.fused(**case.options, **options)


CONTENDERS: dict[str, Callable[[Case], Loss]] = {"eager": eager, "compile": compiled, "fusedloss": fused}


# Contenders that are no loss in this process.
OTHERS: dict[str, Callable[[Case, list[tuple[Tensor, ...]]], Step]] = {
    "eager, THP": lambda case, inputs: EagerWithHugePages(case),
    "copy": lambda case, inputs: make_copy([first for first, *_ in inputs]),
}


def loss_of(name: str, case: Case) -> Loss:
    return PEERS[name].load() if name in PEERS else CONTENDERS[name](case)


def overwrites_logits(name: str) -> bool:
    """Whatever the case says."""
    return name in PEERS and PEERS[name].overwrites


def make_step(loss: Loss, case: Case, inputs: list[tuple[Tensor, ...]], overwrites: bool = False) -> Step:
    """What one timed call does: the loss, or the loss, its backward and the release of the gradients.

    The gradients are dropped after every step, so that the next backward makes new ones, as after
    `optimizer.zero_grad()`. Each call takes the next of `inputs`.
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
    """The same on a result, which may be overwritten: it is made anew, outside the clock."""
    memory = torch.empty_like(logits, requires_grad=False)
    # Of the logits' dtype and device: autograd would convert its gradient, inside the clock.
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
    """`memory`, as if an operation on `leaf` had written it: one that costs nothing, nor does its backward pass."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, leaf: Tensor, memory: Tensor) -> Tensor:
        return memory.detach()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.flatten()[0], None


def warm_up(device: str, losses: Iterable[str] = ()) -> None:
    """Let fusedloss build here what is not prebuilt: its own progress line and ours do not mix."""
    logits = torch.zeros(2, 3, device=device)
    fusedloss.CrossEntropyLoss()(logits, torch.zeros(2, dtype=torch.int64, device=device))
    for loss in losses:
        with contextlib.suppress(RuntimeError):  # a note, where it is measured
            LOSSES[loss].fused()
