"""`python -m benchmarks.profiled`: a call of each case for a profiler that is off until the program turns it on."""

import torch

from .cases import PASSES, Case, make_inputs
from .contenders import fused, make_step

SIZES = [(4096, 32000, "bfloat16"), (8192, 4096, "bfloat16"), (65536, 1024, "bfloat16"), (4096, 131072, "float32")]


def main(device: str = "cuda") -> None:
    for rows, classes, dtype in SIZES:
        for one_pass in PASSES:
            case = Case("cross_entropy", rows, classes, dtype, one_pass, device)
            step = make_step(fused(case), case, [make_inputs(case)])
            step()  # what happens once, such as loading the kernels
            torch.cuda.synchronize()
            print(case, flush=True)
            torch.cuda.profiler.start()
            step()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
