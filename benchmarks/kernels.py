"""`python -m benchmarks.kernels`: how long each kernel of a training step takes on a GPU, by the kernel's name.

The cases are those of `suites.goals`. Names of torch's kernels beside ours show what else a step has cost; only torch's
would show that the loss went to torch.
"""

import argparse
import collections
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from . import report, suites
from .cases import Case, make_inputs
from .contenders import fused, make_step
from .measure import copies
from .timing import QUEUEING_CYCLES, Step

WARM_UP_CALLS, CALLS = 3, 5
OURS = "fusedloss::"  # the passes of the losses
KEEPS_BUSY = "spin_kernel"  # the name of torch.cuda._sleep's


def cases() -> list[Case]:
    """Training steps without options, in one dtype."""
    return [
        case
        for case in suites.goals()
        if case.loss in ("cross_entropy", "mse")
        and case.step == "forward+backward"
        and (case.dtype == "bfloat16" or case.rows == 128)
        and not case.variant
    ]


def short_name(name: str) -> str:
    """`void at::native::(anonymous namespace)::fill<float>(int)` is fill."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    return name.partition("<")[0].partition("(")[0].rpartition("::")[2]


def measure(step: Step, device: str) -> tuple[float, dict[str, float]]:
    """Microseconds from the first kernel's start to the last one's end, and in each kernel, of one call.

    On the CPU, to try this out, the passes of the losses stand for kernels.
    """
    for _ in range(WARM_UP_CALLS):
        step()
    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda._sleep(CALLS * QUEUEING_CYCLES)
        for _ in range(CALLS):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    events = [
        event
        for event in profiler.events()
        if (
            event.device_type.name == "CUDA" and KEEPS_BUSY not in event.name if on_gpu else event.name.startswith(OURS)
        )
    ]
    if not events:
        return 0.0, {}
    each: dict[str, float] = collections.defaultdict(float)
    for event in sorted(events, key=lambda event: event.time_range.start):
        each[short_name(event.name)] += event.time_range.elapsed_us() / CALLS
    span = max(event.time_range.end for event in events) - min(event.time_range.start for event in events)
    return span / CALLS, dict(each)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="cpu tries it out, at tiny sizes")
    parser.add_argument("--records", type=Path, metavar="FILE", help="also append a line of JSON for each case to FILE")
    options = parser.parse_args(argv)
    for case in cases():
        if options.device == "cpu":
            case = suites.tiny(case)
        step = make_step(fused(case), case, [make_inputs(case, seed) for seed in range(copies(case))])
        span, each = measure(step, options.device)
        named = ", ".join(f"{name} {microseconds:.1f}" for name, microseconds in each.items())
        print(f"{report.brief(case)}: {span:.1f}us: {named or 'no kernel was seen'}", flush=True)
        if options.records:
            report.append(options.records, {"case": str(case), "span_us": span, "kernels_us": each})
        del step  # with its inputs, before the next ones are made


if __name__ == "__main__":
    main()
