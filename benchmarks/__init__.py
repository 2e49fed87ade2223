"""One command, one table: `python -m benchmarks` times fusedloss against torch's own losses.

The way through it: `__main__` reads the arguments, `cases` says what is measured and how many bytes must move,
`contenders` builds what is timed, `measure` verifies and times one case (with `timing`, `memory` and `contention`),
`report` draws the table and the JSON, `machine` says where the figures came from. `demo` is the newcomer's first run.

`gpu.sh` is the same for a machine with a GPU, and more: it builds, times single kernels (`kernels`), the suites for a
GPU, with `peers`, and other tunings (`sweep`), has a profiler watch `profiled` and reads its file (`ncu`), has the
sanitizers watch `representative`, and runs the tests there (with `leave_out`).
"""
