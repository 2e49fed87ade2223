"""The demo's figure: both loss curves in one plot for each task, and the times of the losses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which would look for a display
from matplotlib.ticker import MaxNLocator

from .timing import Times

if TYPE_CHECKING:
    from .demo import Training

STYLES: dict[str, dict[str, Any]] = {
    "torch": {"color": "tab:orange", "linewidth": 5, "alpha": 0.6},
    "fusedloss": {"color": "black"},
}


def save_plot(path: Path, trainings: dict[str, dict[str, Training]], times: dict[str, dict[str, Times]]) -> None:
    """`trainings` is keyed by task and library, `times` by loss and library."""
    figure = Figure(figsize=(15, 4), layout="constrained")
    *curve_axes, time_axis = figure.subplots(1, len(trainings) + 1)
    for axis, (task, runs) in zip(curve_axes, trainings.items(), strict=True):
        draw_curves(axis, task, {library: run.curve for library, run in runs.items()})
    draw_times(time_axis, times)
    figure.savefig(path, dpi=120, format="png")


def draw_curves(axis: Axes, task: str, curves: dict[str, list[float]]) -> None:
    for library, losses in curves.items():
        axis.plot(range(1, len(losses) + 1), losses, label=library, **STYLES[library])
    axis.set(title=task, xlabel="epoch", ylabel="mean training loss", ylim=(0, None))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend()


def draw_times(axis: Axes, times: dict[str, dict[str, Times]]) -> None:
    width = 0.4
    for offset, library in zip((-width / 2, width / 2), STYLES, strict=True):
        places = [place + offset for place in range(len(times))]
        heights = [by_library[library].median * 1e6 for by_library in times.values()]
        bars = axis.bar(places, heights, width, label=library, color=STYLES[library]["color"])
        axis.bar_label(bars, fmt="%.0f")
    axis.set_xticks(range(len(times)), list(times))
    axis.margins(y=0.3)  # space for the legend
    axis.set(title="time in the loss, forward + gradient of one batch", ylabel="us (less is better)")
    axis.legend(loc="upper right", ncols=2)
