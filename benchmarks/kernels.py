"""`python -m benchmarks.kernels`: the time of each kernel of a training step on a GPU, by the kernel's name.

The cases are those of `suites.goals` that `cases` selects. torch's kernels are listed beside ours, since a step
pays for them too. If only torch's kernels are listed, torch has computed the loss.
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
OURS = "fusedloss::"  # how the profiler names the passes of our losses
KEEPS_BUSY = "spin_kernel"  # the kernel of torch.cuda._sleep


def cases() -> list[Case]:
    """Training steps without options: in bfloat16, and the small case of 128 rows."""
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
    """Microseconds of one call, from the first kernel's start to the last one's end, and in each kernel.

    On the CPU, which is only for trying this out, the passes of the losses are listed instead of kernels.
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
        del step  # and its inputs, before the next ones are allocated


if __name__ == "__main__":
    main()
