"""Plots of the tables."""

import textwrap
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot, which would look for a display
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from .measure import CaseResult
from .report import unrest

COLORS = {"eager": "tab:orange", "eager, THP": "tab:red", "compile": "tab:blue"}
SHARES = {"fusedloss": "black", "eager": "tab:orange", "compile": "tab:blue", "liger": "tab:green", "quack": "tab:red"}


def save(path: Path, results: list[CaseResult], where: str, draw: Callable[[Axes, list[CaseResult]], None]) -> None:
    """Draw one plot of the results; `where` describes the machine that they were measured on."""
    figure = Figure(figsize=(10, 2.5 + 0.35 * len(results)), layout="constrained")
    axis = figure.subplots()
    draw(axis, results)
    notes = [line for note in unrest(results) for line in textwrap.wrap(f"note: {note}", 120)]
    figure.suptitle("\n".join([where, *notes]), fontsize="small")
    figure.savefig(path, dpi=100)


def draw_ratios(axis: Axes, results: list[CaseResult]) -> None:
    """How many times faster fusedloss is than each of the others, case by case. A missing measurement leaves a gap.

    The axis is logarithmic, so ratios near 1 stay readable beside a ratio of 40, and 1/2 is drawn as long as 2.
    """
    rivals = [name for name in COLORS if any(result.ratio("fusedloss", to=name) for result in results)]
    height = 0.8 / max(1, len(rivals))
    for place, rival in enumerate(rivals):
        found = [(line, ratio) for line, result in enumerate(results) if (ratio := result.ratio("fusedloss", to=rival))]
        lines, ratios = zip(*((line + place * height, ratio) for line, ratio in found), strict=True)
        widths = [ratio - 1 for ratio in ratios]
        bars = axis.barh(lines, widths, height, left=1, label=f"against {rival}", color=COLORS[rival])
        axis.bar_label(bars, [f"{ratio:.3g}" for ratio in ratios], fontsize="x-small", padding=2)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks([line + 0.4 - height / 2 for line in range(len(results))], [str(result.case) for result in results])
    axis.set_ylim(len(results) - 0.2, -height)
    axis.set(xscale="log", xlabel="times faster than … (1: as fast)")
    axis.margins(x=0.1)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=max(1, len(rivals)), frameon=False)


def draw_shares(axis: Axes, results: list[CaseResult]) -> None:
    """Each contender's bandwidth relative to the copy's: one line per case, one marker per contender."""
    for name, color in SHARES.items():
        shares = [(share, line) for line, result in enumerate(results) if (share := result.share_of_copy(name))]
        if shares:
            axis.plot(*zip(*shares, strict=True), "o", color=color, label=name)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks(range(len(results)), [str(result.case) for result in results])
    axis.invert_yaxis()
    axis.grid(True, alpha=0.3)
    axis.set(xlim=(0, None), xlabel="bandwidth, relative to the GPU's own copy")
    axis.legend()


def draw_scaling(axis: Axes, results: list[CaseResult]) -> None:
    """Time over the number of elements: a line for each family of cases with the same rows or the same classes."""
    families = {
        "1,000 classes, more rows": [result for result in results if result.case.classes == 1000],
        "100 rows, more classes": [result for result in results if result.case.rows == 100],
        "1 row, more classes": [result for result in results if result.case.rows == 1],
    }
    for (family, members), marker in zip(families.items(), "os^", strict=True):
        for name, color in (("eager", "tab:orange"), ("fusedloss", "black")):
            points = sorted(
                (result.case.rows * result.case.classes, median * 1e3)
                for result in members
                if (median := result.median(name))
            )
            axis.plot(*zip(*points, strict=True), marker=marker, color=color, label=f"{name}: {family}")
    axis.set(xscale="log", yscale="log", xlabel="elements", ylabel="ms, forward + backward")
    axis.grid(True, alpha=0.3)
    axis.legend()
