"""One command, one table: `python -m benchmarks` times fusedloss against torch's own losses.

The modules: `__main__` reads the arguments. `cases` defines what is measured and how many bytes it must move, with the
losses and inputs of `losses`. `contenders` builds what is timed. `measure` verifies and times one case, with `timing`,
`memory` and `contention`. `report` prints the table and writes the JSON. `machine` describes where the figures came
from. `demo` is a first run for new users.

`gpu.sh` does this, and more, on a machine with a GPU. It builds fusedloss, times single kernels (`kernels`), runs the
suites for a GPU, with `peers`, and tries other tunings (`sweep`). It runs `profiled` under a profiler and summarizes
the profiler's output (`ncu`), runs `representative` under the sanitizers, and runs the tests (with `leave_out`).
"""
