"""`python -m benchmarks.profiled`: a call of each case for a profiler that is off until the program turns it on."""

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


def main(device: str = "cuda") -> None:
    for case in cases():
        if device == "cpu":
            case = suites.tiny(case)
        step = make_step(fused(case), case, [make_inputs(case)])
        step()  # what happens once, such as loading the kernels
        torch.cuda.synchronize()
        print(case, flush=True)
        torch.cuda.profiler.start()
        step()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        del step  # with its inputs, before the next ones are made


if __name__ == "__main__":
    main()
