"""The output of a run: a table for people and a JSON file for programs."""

import functools
import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import machine
from .cases import BYTES_FORMULA, PASSES, Case, bytes_moved
from .contenders import OTHERS
from .contention import WORTH_A_NOTE
from .measure import CaseResult, Measurement
from .memory import METHOD

SCHEMA = 2
NOTHING = "-"
COLUMNS = ["eager", "eager, THP", "compile", "fusedloss", "liger", "quack", "copy"]
COPY = {
    "cpu": "read once and written into fresh memory mapped as fusedloss's gradient",
    "cuda": "read once and written into memory already allocated, by the driver or by a kernel, whichever is faster",
}


@dataclass(frozen=True)
class Column:
    """A column of the table: its title, and how to format its cell for a case."""

    title: str
    of: Callable[[CaseResult], Text | str]


def columns(names: list[str]) -> list[Column]:
    """The most important columns come first: on a narrow console, the later ones move to further tables below."""
    rivals = [name for name in names if name not in ("fusedloss", "copy")]
    with_memory = [name for name in names if name not in OTHERS]

    def of_each(among: list[str], title: str, of: Callable[[CaseResult, str], Text | str]) -> list[Column]:
        return [Column(title.format(name.replace(", ", ",\n")), functools.partial(of, name=name)) for name in among]

    def time_of(result: CaseResult, name: str) -> Text:
        return milliseconds(result.measurements.get(name))

    def share_of_copy(result: CaseResult) -> str:
        return percent(result.share_of_copy("fusedloss"))

    return [
        *of_each(["fusedloss"], "{}\nms", time_of),
        *of_each(rivals, "vs\n{}", lambda result, name: ratio(result.ratio("fusedloss", to=name))),
        *([Column("% of copy\nbandwidth", share_of_copy)] if "copy" in names else []),
        Column("\nGB/s", lambda result: number(result.gb_per_s("fusedloss"))),
        *of_each([name for name in names if name != "fusedloss"], "{}\nms", time_of),
        *of_each(with_memory, "{}\npeak", lambda result, name: size(result.measurements.get(name))),
    ]


def tables(console: Console, results: list[CaseResult], names: list[str], device: str) -> list[Table]:
    """One row per case. Columns that do not fit on the console go to further tables with the same rows."""
    drawn: list[list[Column]] = []
    for column in columns(names):
        together = [*drawn[-1], column] if drawn else [column]
        wide = console.options.update(width=1000)
        if drawn and console.measure(table(results, together, device), options=wide).maximum <= console.width:
            drawn[-1] = together
        else:
            drawn.append([column])
    return [table(results, together, device) for together in drawn]


def table(results: list[CaseResult], shown: list[Column], device: str) -> Table:
    steps = {result.case.step for result in results}
    title = f"Losses on {device}" + (f", {next(iter(steps))}" if len(steps) == 1 else "")
    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    drawn.add_column("\nrows x classes", no_wrap=True)
    for column in shown:
        drawn.add_column(column.title, justify="right", no_wrap=True, vertical="bottom")
    for loss, of_loss in itertools.groupby(results, lambda result: result.case.loss):
        drawn.add_row(Text(loss, style="bold"))
        for result in of_loss:
            case = result.case
            words = (case.size, short(case.dtype), "" if len(steps) == 1 else short(case.step), case.variant)
            drawn.add_row("  " + " ".join(filter(None, words)), *(column.of(result) for column in shown))
    return drawn


def short(name: str) -> str:
    for long, brief in (("bfloat", "bf"), ("float", "fp"), ("forward", "fwd"), ("backward", "bwd")):
        name = name.replace(long, brief)
    return name


def print_results(console: Console, results: list[CaseResult], names: list[str], device: str) -> None:
    """Print the tables, and a note for whatever could not be measured."""
    for drawn in tables(console, results, names, device):
        # If even one column is too wide, the terminal folds the lines: better than truncated figures.
        needed = console.measure(drawn, options=console.options.update(width=1000)).maximum
        console.print(drawn, width=max(console.width, needed), crop=False)
    for note in notes(results) + unrest(results) + host_times(results):
        console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)


def brief(case: Case) -> str:
    """The case in few characters. The pass is named only if it is not a whole training step."""
    words = (case.loss, case.size, short(case.dtype), case.variant, "forward" if case.step == "forward" else "")
    return " ".join(filter(None, words))


def line(result: CaseResult) -> str:
    """fusedloss's time, its share of the copy's bandwidth, the copy's time, and the speedup over each contender."""
    words = [brief(result.case)]
    if median := result.median("fusedloss"):
        words.append(f"{median * 1e6:.1f}us")
    if copy := result.median("copy"):
        words.append(f"{percent(result.share_of_copy('fusedloss'))} of {copy * 1e6:.1f}us")
    for name in result.measurements:
        if name not in ("fusedloss", "copy") and (value := result.ratio("fusedloss", to=name)):
            words.append(f"{name} {value:.2f}")
    host = {name: m.host_seconds for name, m in result.measurements.items() if m.host_seconds is not None}
    words += ["host:", *(f"{name} {seconds * 1e6:.3g}us" for name, seconds in host.items())] if host else []
    return " ".join(words) + "".join(f"; {name}: {m.note[:100]}" for name, m in result.measurements.items() if m.note)


def legend(names: list[str], device: str) -> str:
    """What each column means, and how it was measured."""
    more = ""
    if "eager, THP" in names:
        more += (
            "\neager, THP: eager in a process of its own with torch's THP_MEM_ALLOC_ENABLE=1. Its allocator asks for "
            "huge pages, as fusedloss does for gradients of 4 MB and more; its rounds are interleaved with the others'."
        )
    if "copy" in names:
        more += (
            f"\ncopy: the input, {COPY[device]}.\n% of copy bandwidth: fusedloss's GB/s over the copy's.\n"
            "in place: the logits are the result of an operation, which is repeated outside the timed region; only "
            "fusedloss overwrites them."
        )
    if "liger" in names:
        more += "\nliger: it overwrites the logits in every case, so they are created anew outside the timed region."
    return (
        "ms: median and half the interquartile range in percent. All contenders are interleaved on the same inputs, "
        "and every gradient is new; fwd runs under no_grad, fwd+bwd frees the gradient.\n"
        "vs: how many times faster fusedloss is; above 1 fusedloss is ahead.\n"
        f"{BYTES_FORMULA}. The other contenders' GB/s are in the JSON.\n"
        f"peak: extra memory of a call, including its results, from {METHOD[device]}.{more}"
    )


def milliseconds(measurement: Measurement | None) -> Text:
    """The note itself is printed below the table, since it would make the column too wide."""
    if measurement is None:
        return Text(NOTHING, style="dim")
    if measurement.times is None:
        return Text("see note", style="yellow")
    first, third = measurement.times.quartiles
    text = Text(f"{measurement.times.median * 1e3:.4g}")
    return text.append(f" ±{(third - first) / 2 / measurement.times.median:.0%}", style="dim")


def ratio(value: float | None) -> Text:
    if value is None:
        return Text(NOTHING, style="dim")
    return Text(f"{value:.2f}x", style="bold green" if value > 1 else "bold red")


def percent(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.0%}"


def number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}"


def size(measurement: Measurement | None) -> str:
    """Bytes in the first unit that keeps the value below 1024; 1 KiB is 1024 bytes."""
    if measurement is None or measurement.peak_extra_bytes is None:
        return NOTHING
    value = float(measurement.peak_extra_bytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"


def notes(results: list[CaseResult]) -> list[str]:
    """What went wrong, one line per failure."""
    return [
        f"{result.case}: {name}: {measurement.note}"
        for result in results
        for name, measurement in result.measurements.items()
        if measurement.note
    ]


def host_times(results: list[CaseResult]) -> list[str]:
    """The host's own time for a call, a line for each case that is small enough for it to matter."""
    lines = []
    for result in results:
        timed = {name: m.host_seconds for name, m in result.measurements.items() if m.host_seconds is not None}
        each = ", ".join(f"{name} {seconds * 1e6:.3g}" for name, seconds in timed.items())
        lines += [f"{result.case}: microseconds of the host, the GPU not waited for: {each}"] if timed else []
    return lines


def unrest(results: list[CaseResult]) -> list[str]:
    """A warning if other programs used the cores during the timing, since the times are then unreliable."""
    shares = [result.others_share for result in results if result.others_share is not None]
    if not shares or max(shares) <= WORTH_A_NOTE:
        return []
    return [
        f"other programs had {statistics.mean(shares):.0%} of the cores during the timing, {max(shares):.0%} in the "
        "worst case: the times are too long and unsteady; run it again on a quiet machine"
    ]


def verdict(results: list[CaseResult]) -> str:
    """In how many cases fusedloss is ahead. A case in which it has no figures counts as not ahead."""

    def score(step: str) -> str:
        ratios = [result.ratio("fusedloss") for result in results if step in ("", result.case.step)]
        return f"{sum(value is not None and value > 1 for value in ratios)} of {len(ratios)}"

    steps = [step for step in PASSES if any(result.case.step == step for result in results)]
    each = ", ".join(f"{step} {score(step)}" for step in steps)
    return f"fusedloss ahead of eager in {score('')} rows ({each})"


def append(path: Path, entry: dict[str, Any]) -> None:
    """Append a line of JSON, which is kept even if the program is interrupted later."""
    with path.open("a") as file:
        file.write(json.dumps({"at": machine.now(), **entry}) + "\n")


def as_json(results: list[CaseResult], description: dict[str, Any]) -> dict[str, Any]:
    """The machine, the method and all figures, one entry per case and contender."""
    return {
        "schema": SCHEMA,
        **description,
        "method": {
            "times": "seconds of one call; one sample a round; contenders interleaved in rotating order",
            "bytes": BYTES_FORMULA,
            "peak_extra_bytes": METHOD,
        },
        "figures": [entry for result in results for entry in figures(result)],
    }


def figures(result: CaseResult) -> list[dict[str, Any]]:
    return [figure(result, name, measurement) for name, measurement in result.measurements.items()]


def figure(result: CaseResult, name: str, measurement: Measurement) -> dict[str, Any]:
    case, times = result.case, measurement.times
    first, third = times.quartiles if times else (None, None)
    return {
        "loss": case.loss,
        "rows": case.rows,
        "classes": case.classes,
        "inner": list(case.inner),
        "dtype": case.dtype,
        "option": case.variant,
        "pass": case.step,
        "device": case.device,
        "contender": name,
        "median_s": times.median if times else None,
        "first_quartile_s": first,
        "third_quartile_s": third,
        "samples_s": times.samples if times else [],
        "calls_per_sample": times.calls if times else None,
        "times_faster_than_eager": result.ratio(name),
        "bytes_moved": bytes_moved(case),
        "gb_per_s": result.gb_per_s(name),
        "share_of_copy": result.share_of_copy(name),
        "others_share_of_cores": result.others_share,
        "host_s": measurement.host_seconds,
        "peak_extra_bytes": measurement.peak_extra_bytes,
        "note": measurement.note,
    }
