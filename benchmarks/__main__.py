"""`python -m benchmarks`: fusedloss's losses against torch's, in one table."""

import argparse
import importlib.util
import json
import signal
from collections.abc import Container
from pathlib import Path

import torch

try:
    from rich.console import Console
except ModuleNotFoundError:
    if __name__ != "__main__":
        raise
    raise SystemExit("python -m benchmarks prints its table with rich: pip install rich") from None

from . import machine, peers, report, suites
from .arguments import Size, names_among, sizes, sizes_text
from .cases import DTYPES, Case, all_cases
from .contenders import CONTENDERS, warm_up
from .losses import LOSSES
from .measure import CaseResult, measure_all
from .timing import Effort

SIZES: list[Size] = [(128, 10), (4096, 1000), (65536, 100), (1024, 32000)]
QUICK_SIZES: list[Size] = [(128, 10), (2048, 1000), (512, 16384)]
DEFAULT_DTYPES = ["float32", "bfloat16"]
DEFAULT_LOSSES = ["cross_entropy", "mse"]
QUICK_POINTWISE = ["bce", "log_cosh"]  # one row for the pointwise losses of torch, and one for custom losses
EFFORT = Effort()
SUITE_EFFORT = Effort(batch_seconds=1e-2)
# Batches are short so that all their launches fit into the GPU's queue before the GPU starts on them.
CUDA_EFFORT = Effort(min_rounds=7, max_rounds=31, seconds=0.2, batch_seconds=5e-4)
TRY_OUT_EFFORT = Effort(min_rounds=2, max_rounds=2, seconds=0, batch_seconds=0)
CUDA_SUITES = ("goals", "cuda")
QUICK_EFFORT = Effort(min_rounds=7, max_rounds=51, seconds=0.3)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    absent = peers.missing() if options.suite in CUDA_SUITES else {}
    plan = plan_of(options, absent)
    description = {**machine.describe(), "peers": peers.versions()}
    console = Console(soft_wrap=True)
    # For a GPU the custom loss is the last case, so that no other case waits until nvcc has compiled it.
    losses = [] if options.suite in CUDA_SUITES else [case.loss for case, _ in plan]
    warm_up(options.device, dict.fromkeys(losses))
    if options.records:
        report.append(options.records, description)

    def keep(result: CaseResult) -> None:
        if options.records:
            print(report.line(result), flush=True)
            report.append(options.records, {"figures": report.figures(result)})

    results = measure_all(plan, effort_of(options), Console(stderr=True), keep)
    asked_for = {name for _, contenders in plan for name in contenders}
    names = [name for name in report.COLUMNS if name in asked_for]
    console.print(machine.summary(description))
    if not options.records:
        report.print_results(console, results, names, options.device)
        console.print(report.legend(names, options.device), highlight=False, soft_wrap=False)
    for name, reason in absent.items():
        console.print(f"note: {name} is left out: {reason}", style="yellow", markup=False)
    if options.quick and "compile" in names:
        console.print("--quick times torch.compile forward+backward only; without --quick it stands in every row.")
    if options.json:
        options.json.write_text(json.dumps(report.as_json(results, description), indent=1) + "\n")
        console.print(f"Figures written to {options.json}", markup=False)
    if options.plot:
        from . import plot  # imported here, because only the plot needs matplotlib

        of_suites = {"scaling": plot.draw_scaling, **dict.fromkeys(CUDA_SUITES, plot.draw_shares)}
        draw = of_suites.get(options.suite, plot.draw_ratios)
        plot.save(options.plot, results, machine.summary(description), draw)
        console.print(f"Plot written to {options.plot}", markup=False)
    console.print(report.verdict(results))
    if len(results) < len(plan):
        raise SystemExit(f"interrupted after {len(results)} of {len(plan)} cases")
    if any(result.median("fusedloss") is None for result in results):
        raise SystemExit("fusedloss has no figures in some cases; the notes say why")


def effort_of(options: argparse.Namespace) -> Effort:
    if options.suite in CUDA_SUITES:
        return CUDA_EFFORT if options.device == "cuda" else TRY_OUT_EFFORT
    if options.suite:
        return SUITE_EFFORT
    return QUICK_EFFORT if options.quick else EFFORT


def plan_of(options: argparse.Namespace, absent: Container[str] = ()) -> list[tuple[Case, list[str]]]:
    """The cases, in the order of the table, each with the names of its contenders."""
    if options.suite:
        cases, names_in = {
            "cpu": (suites.cpu, lambda case: suites.CPU_CONTENDERS),
            "goals": (suites.goals, suites.cuda_contenders),
            "cuda": (suites.cuda, suites.cuda_contenders),
            "pointwise": (suites.pointwise, lambda case: suites.CPU_CONTENDERS),
            "scaling": (suites.scaling, lambda case: suites.SCALING_CONTENDERS),
        }[options.suite]
        out = {*absent, *(["compile"] if options.no_compile else [])}
        tried_out = options.suite in CUDA_SUITES and options.device == "cpu"
        return [
            (suites.tiny(case) if tried_out else case, [name for name in names_in(case) if name not in out])
            for case in cases()
        ]
    cases = all_cases(options.loss or DEFAULT_LOSSES, options.sizes, options.dtype, options.device)
    if options.quick and not options.loss:
        size, dtype = options.sizes[-1], options.dtype[0]
        cases += [Case(loss, *size, dtype, "forward+backward", options.device) for loss in QUICK_POINTWISE]
    return [(case, contenders_of(case, options)) for case in cases]


def contenders_of(case: Case, options: argparse.Namespace) -> list[str]:
    """Return who is timed. Compiling takes seconds per case, so --quick compiles only for forward+backward."""
    no_compile = options.no_compile or (options.quick and case.step == "forward")
    return [name for name in CONTENDERS if not (name == "compile" and no_compile)]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time fusedloss's losses against torch's, eager and compiled, and print one table.",
    )
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        help="default: cpu, or cuda for the suites 'goals' and 'cuda', which 'cpu' tries out at tiny sizes",
    )
    parser.add_argument(
        "--dtype",
        type=names_among(DTYPES),
        action="extend",
        help=f"comma-separated or repeated, of {', '.join(DTYPES)}; default: {','.join(DEFAULT_DTYPES)}",
    )
    parser.add_argument(
        "--sizes",
        type=sizes,
        action="extend",
        help="rows x classes, comma-separated or repeated, such as 128x10,4096x1000; other losses take tensors of "
        f"that shape; default: {sizes_text(SIZES)}, with --quick {sizes_text(QUICK_SIZES)}",
    )
    parser.add_argument(
        "--loss",
        type=names_among(LOSSES),
        action="extend",
        help=f"comma-separated or repeated, of {', '.join(LOSSES)}; default: "
        f"{','.join(DEFAULT_LOSSES)}, with --quick one row each of {' and '.join(QUICK_POINTWISE)} more",
    )
    parser.add_argument(
        "--suite",
        choices=["cpu", "pointwise", *CUDA_SUITES, "scaling"],
        help="a fixed set of cases instead of --sizes, --dtype and --loss: 'cpu', what docs/experiments.md quotes, "
        "also against eager with huge pages and against the machine's copy (about 10 min); 'pointwise', so too, "
        "but of each pointwise loss, and of custom ones, with 10,000,000 elements (about 6 min); 'goals', on a "
        "GPU, the shapes of models, also against the GPU's copy, and liger-kernel and quack-kernels where "
        "installed (about 90 s); 'cuda', these and more classes, dtypes and options (about 3 min); 'scaling', 1e3 "
        "to 1e8 elements",
    )
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer rounds: under 90 s on two cores")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes seconds a case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure, and the machine, to FILE")
    parser.add_argument(
        "--records",
        type=Path,
        metavar="FILE",
        help="instead of the table, print a line for each case, and append one of JSON to FILE, once it is measured",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the table into FILE, a .png or .svg")
    options = parser.parse_args(argv)
    of_gpu = options.suite in CUDA_SUITES
    device = None if of_gpu else options.device
    fixed = {"--quick": options.quick, "--sizes": options.sizes, "--dtype": options.dtype, "--loss": options.loss}
    given = [name for name, value in {**fixed, "--device": device}.items() if value]
    if options.suite and given:
        parser.error(f"--suite {options.suite} is a fixed set of cases, which {' and '.join(given)} cannot change")
    options.device = options.device or ("cuda" if of_gpu else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"{'--suite' if options.suite else '--device'} cuda needs a GPU, and torch sees none")
    for name, path in (("--json", options.json), ("--records", options.records), ("--plot", options.plot)):
        if path and not path.resolve().parent.is_dir():
            parser.error(f"{name} {path}: the directory {path.resolve().parent} does not exist")
    if options.plot and options.plot.suffix not in (".png", ".svg"):
        parser.error(f"--plot {options.plot}: expected a name that ends in .png or .svg")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot draws with matplotlib: pip install matplotlib")
    options.sizes = options.sizes or (QUICK_SIZES if options.quick else SIZES)
    options.dtype = options.dtype or DEFAULT_DTYPES
    return options


if __name__ == "__main__":
    # Both signals act like Ctrl-C: if a time limit ends the run, the results so far are still printed and written.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    main()
