"""Torch's eager loss in its own process, whose allocator requests huge pages: torch reads that setting only once.

The parent sends what to time, and when, in lines of JSON, so that its rounds interleave with those of the other
contenders.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from .cases import Case, make_inputs

ROOT = Path(__file__).resolve().parent.parent


class EagerWithHugePages:
    """A step, like `timing.Step`, that runs in that process."""

    def __init__(self, case: Case) -> None:
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            env={**os.environ, **threads, "THP_MEM_ALLOC_ENABLE": "1"},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.core_seconds = 0.0  # that the process has used so far
        self.ask(dataclasses.asdict(case))

    def __call__(self) -> None:
        self.seconds(1)

    def seconds(self, calls: int) -> float:
        return self.ask(calls)

    def ask(self, request: object) -> float:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process with huge pages ended with status {self.process.wait()}")
        seconds, self.core_seconds = json.loads(answer)
        return seconds

    def close(self) -> None:
        self.process.communicate()


def main() -> None:
    """Read the case from the first line, and the number of calls to time from every later line."""
    from .contenders import eager, make_step  # imported here, because that file imports this one

    case = Case(**json.loads(sys.stdin.readline()))
    case = dataclasses.replace(case, inner=tuple(case.inner))
    step = make_step(eager(case), case, [make_inputs(case)])
    step()
    seconds = 0.0
    while True:
        print(json.dumps([seconds, time.process_time()]), flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        seconds = step.seconds(json.loads(line))


if __name__ == "__main__":
    main()
