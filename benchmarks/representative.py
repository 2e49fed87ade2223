"""`python -m benchmarks.representative`: checks one small problem for each path through the kernels.

For each problem, the loss and the gradients for a grad_output of 1 and of another value are compared with the
reference; for cross entropy, also a gradient that is written over the logits. A run takes seconds, so it can run under
tools that slow a GPU down by orders of magnitude: the CPU draws and checks the values, and the device computes only the
losses.
"""

import argparse
import itertools
import json
import signal
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedloss import functional, reference

from .arguments import names_among
from .cases import DTYPES

IGNORED = 3

FEW_CLASSES = [(70, 5), (70, 16)]
WARP_ROWS = [(33, 17), (33, 515), (9, 1000), (9, 1024)]
BLOCK_ROWS = [(5, 1031), (5, 8195), (3, 32000)]
LONG_ROWS = [(2, 200_003)]
FEW_ROWS = [(1, 131_072)]
COLUMNS = [(3, 7, 37), (2, 100, 8, 8), (2, 1031, 40)]
MANY_ROWS = [(6000, 17)]
# There are as many rows as a GPU has multiprocessors, so that no row is split between blocks. A block, or a cluster,
# keeps a row in shared memory.
KEPT_ROWS: list[tuple[str, tuple[int, int], dict[str, Any]]] = [
    ("bfloat16", (150, 20_000), {"label_smoothing": 0.1}),
    ("bfloat16", (150, 70_001), {}),
    ("float32", (150, 65_536), {"probabilities": True}),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum", "ignore_index": IGNORED},
    {"reduction": "none", "label_smoothing": 0.1},
    {"weighted": True, "label_smoothing": 0.1, "ignore_index": IGNORED},
    {"probabilities": True},
    {"probabilities": True, "weighted": True, "label_smoothing": 0.1, "reduction": "none"},
]
ELEMENTS = [1, 9, 4099, 20_011]


@dataclass(frozen=True)
class Problem:
    loss: str
    dtype: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        return " ".join([self.loss, self.dtype, size, *(f"{name}={value}" for name, value in self.options.items())])


def problems() -> Iterator[Problem]:
    shapes = [*FEW_CLASSES, *WARP_ROWS, *BLOCK_ROWS, *LONG_ROWS, *FEW_ROWS, *COLUMNS, *MANY_ROWS]
    for dtype, shape, options in itertools.product(DTYPES, shapes, OPTIONS):
        yield Problem("cross_entropy", dtype, shape, options)
    for dtype, shape, options in KEPT_ROWS:
        yield Problem("cross_entropy", dtype, shape, options)
    for dtype, elements, reduction in itertools.product(DTYPES, ELEMENTS, ("mean", "sum", "none")):
        yield Problem("mse_loss", dtype, (elements,), {"reduction": reduction})


def run(problem: Problem, device: str) -> dict[str, float]:
    """Return each result's checksum and its error relative to the allowed error: above 1 is wrong."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(problem).encode()))
    input, target, options = draw(problem, generator)
    # The leaf is in float64: through a conversion, autograd would round the gradient to the dtype.
    exact = compute(reference, problem, input.double(), target, options, torch.Generator().manual_seed(0))
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    results = compute(functional, problem, input.to(device), target.to(device), moved, torch.Generator().manual_seed(0))
    outcome = {}
    for name, expected in exact.items():
        mine = results[name].detach().cpu()
        outcome[f"{name} error"] = error(mine, expected, problem.dtype)
        # The checksum shows whether two machines or commits return bitwise identical results.
        outcome[f"{name} crc32"] = zlib.crc32(mine.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return outcome


def draw(problem: Problem, generator: torch.Generator) -> tuple[Tensor, Tensor, dict[str, Any]]:
    dtype, shape = DTYPES[problem.dtype], problem.shape
    if problem.loss == "mse_loss":
        input, target = torch.randn((2, *shape), generator=generator).to(dtype)
        return input, target, problem.options
    input, options = (torch.randn(shape, generator=generator) * 2).to(dtype), dict(problem.options)
    if options.pop("weighted", False):
        options["weight"] = (torch.rand(shape[1], generator=generator) + 0.5).to(dtype)
    if options.pop("probabilities", False):
        return input, torch.randn(shape, generator=generator).softmax(1).to(dtype), options
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    target.view(-1)[1::5] = options.get("ignore_index", 0)
    return input, target, options


def compute(
    losses: Any, problem: Problem, input: Tensor, target: Tensor, options: dict[str, Any], generator: torch.Generator
) -> dict[str, Tensor]:
    input = input.detach().requires_grad_()
    loss = getattr(losses, problem.loss)(input, target, **options)
    other = (torch.rand(loss.shape, generator=generator) + 0.25).to(DTYPES[problem.dtype])
    (of_one,) = torch.autograd.grad(loss, input, torch.ones_like(loss), retain_graph=True)
    (of_other,) = torch.autograd.grad(loss, input, other.to(loss))
    results = {"loss": loss, "gradient": of_one, "gradient of other": of_other}
    if problem.loss == "cross_entropy":
        in_place = {"inplace_backward": True} if losses is functional else {}
        loss = losses.cross_entropy(input * 1, target, **options, **in_place)
        (results["gradient in place"],) = torch.autograd.grad(loss, input, other.to(loss))
    return results


def error(mine: Tensor, exact: Tensor, dtype: str) -> float:
    """The largest error, where 1 is what rounding the result and the float32 sums (float64 for float64) may cause."""
    limits = torch.finfo(DTYPES[dtype])
    computed = 1e-12 if dtype == "float64" else 1e-5
    allowed = limits.eps * exact.abs() + computed * exact.abs().max() + limits.tiny * limits.eps
    return ((mine.double() - exact).abs() / allowed).max().item()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.representative", description=__doc__)
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--dtype", type=names_among(DTYPES), default=list(DTYPES), help="comma-separated; default: all")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each N-th problem; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write errors and checksums of the results to FILE")
    options = parser.parse_args(argv)
    chosen = [problem for problem in problems() if problem.dtype in options.dtype][:: options.every]
    outcomes: dict[str, dict[str, float]] = {}
    judged = wrong = 0
    problem = None
    try:
        for problem in chosen:
            print(problem, flush=True)  # printed before it runs, so that the last line names a problem that hangs
            outcome = outcomes[str(problem)] = run(problem, options.device)
            errors = {name: value for name, value in outcome.items() if name.endswith("error")}
            for name, value in errors.items():
                judged += 1
                if not value <= 1:  # NaN is wrong
                    wrong += 1
                    print(f"wrong: {problem}: {name} {value:.3g}", flush=True)
    except BaseException as error:
        print(f"failed at: {problem}: {type(error).__name__}: {str(error).partition(chr(10))[0]}", flush=True)
        raise
    finally:
        if options.json:
            options.json.write_text(json.dumps(outcomes, indent=1) + "\n")
        print(f"{len(outcomes)} of {len(chosen)} problems on {options.device}, {wrong} of {judged} results wrong")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    # Both signals act like Ctrl-C: if a time limit ends the run, the results so far are still printed and written.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    main()
