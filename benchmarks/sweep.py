"""`python -m benchmarks.sweep`: times training steps with other values of the CUDA kernels' tuning (CudaTuning).

One value at a time differs from the defaults. Each setting is a contender, verified and timed side by side with the
others. One line per case shows the time at the defaults and the settings that gain most.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from torch import Tensor

from fusedloss import _backend

from . import report, suites
from .cases import Case
from .contenders import CONTENDERS, fused
from .losses import Loss
from .measure import CaseResult, measure_all
from .timing import Effort

DEFAULTS = "defaults"
VALUES: dict[str, tuple[int, ...]] = {
    "block_threads": (128,),
    "other_threads": (256,),
    "kept_bytes": (49152, 73728),
    "cluster_blocks": (1, 2, 4),
    "warp_bytes": (4096, 16384),
    "lane_vectors": (4, 16),
    "min_lanes": (1, 4),
    "thread_classes": (8,),
    "max_blocks": (1056, 2112, 65536),
    "waves": (4,),
    "target_weight_rows": (4096,),
    "overlap": (0,),
}
EFFORT = Effort(min_rounds=7, max_rounds=7, seconds=0, batch_seconds=5e-4)
BEST = 3
WORTH_NAMING = 1.005


def cases() -> list[Case]:
    sizes = ((8192, 32000), (8192, 50257), (8192, 128256), (65536, 1000), (32768, 4096), (524288, 256))
    return [
        *(suites.on_cuda(*size) for size in sizes),
        suites.of_cuda_bytes(100, "bfloat16"),
        suites.of_cuda_bytes(10, "bfloat16"),
        suites.on_cuda(8192, 32000, "float32"),
        suites.on_cuda(8192, 128256, "float32"),
        suites.on_cuda(8, 32000, "bfloat16", 128),
    ]


def under(set_tuning: Callable[[str, int], None], name: str, value: int) -> Callable[[Case], Loss]:
    """fusedloss's loss with that setting. Its backward pass has it too, because no other contender runs in between."""

    def contender(case: Case) -> Loss:
        loss = fused(case)

        def tuned(*operands: Tensor) -> Tensor:
            set_tuning(DEFAULTS, 0)
            set_tuning(name, value)
            return loss(*operands)

        return tuned

    return contender


def line(result: CaseResult) -> str:
    base = result.median(DEFAULTS)
    gains = {name: gain for name in result.measurements if (gain := result.ratio(name, to=DEFAULTS))}
    best = [name for name in sorted(gains, key=gains.__getitem__, reverse=True) if gains[name] > WORTH_NAMING][:BEST]
    words = [f"{report.brief(result.case)}: {DEFAULTS}", f"{base * 1e6:.1f}us" if base else "-"]
    words += [f"{name} {gains[name] - 1:+.1%}" for name in best] or ["nothing is faster"]
    notes = {note.note: name for name, note in result.measurements.items() if note.note}
    return " ".join(words) + "".join(f"; {name}: {note[:100]}" for note, name in notes.items())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="cpu tries it out, at tiny sizes")
    parser.add_argument("--records", type=Path, metavar="FILE", help="also append a line of JSON for each case to FILE")
    options = parser.parse_args(argv)
    set_tuning = getattr(_backend.extension(), "set_cuda_tuning", None)
    if set_tuning is None:
        raise SystemExit("the extension has no set_cuda_tuning: there is nothing to sweep")
    settings = {
        f"{name}={value}": under(set_tuning, name, value) for name, values in VALUES.items() for value in values
    }
    CONTENDERS.update({DEFAULTS: under(set_tuning, DEFAULTS, 0), **settings})

    def keep(result: CaseResult) -> None:
        print(line(result), flush=True)
        if options.records:
            report.append(options.records, {"figures": report.figures(result)})

    names = [DEFAULTS, *settings]
    tried_out = options.device == "cpu"
    plan = [(suites.tiny(case) if tried_out else case, names) for case in cases()]
    results = measure_all(plan, EFFORT, Console(stderr=True), keep)
    set_tuning(DEFAULTS, 0)
    if len(results) < len(plan):
        raise SystemExit(f"interrupted after {len(results)} of {len(plan)} cases")
    if not all(result.median(DEFAULTS) for result in results):
        raise SystemExit("some cases have no figures")


if __name__ == "__main__":
    main()
