"""`python -m benchmarks.profiled`: calls each case once for a profiler, which is off except during that call."""

import argparse
import time

import torch

from . import suites
from .cases import Case, make_inputs
from .contenders import fused, make_step


def cases() -> list[Case]:
    return [
        suites.on_cuda(8192, 32000),
        suites.on_cuda(8192, 50257),
        suites.on_cuda(8192, 128256),
        suites.on_cuda(65536, 1000),
        suites.of_cuda_bytes(100, "bfloat16"),
        suites.of_cuda_bytes(32768, "bfloat16", "forward"),
        suites.on_cuda(8, 32000, "bfloat16", 128),
        suites.elementwise("mse", "bfloat16"),
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profiled", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="cpu tries it out, at tiny sizes")
    parser.add_argument(
        "--seconds",
        type=float,
        default=600,
        help="begin no case later than that: a profiler that is cut off may write nothing; default: %(default)s",
    )
    options = parser.parse_args(argv)
    start = time.monotonic()
    for case in cases():
        if time.monotonic() - start > options.seconds:
            print("no time is left for the other cases")
            break
        if options.device == "cpu":
            case = suites.tiny(case)
        step = make_step(fused(case), case, [make_inputs(case)])
        step()  # does what happens only once, such as loading the kernels
        torch.cuda.synchronize()
        print(case, flush=True)
        torch.cuda.profiler.start()
        step()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        del step  # frees the inputs before the next ones are allocated


if __name__ == "__main__":
    main()
