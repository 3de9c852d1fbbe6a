"""Pictures of simulated comparisons; the only module of the simulator that needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from verl_rlhfless.sim.cell import ARMS

OURS = "ours"
_MARKERS = "osD^v*<>PXhpd8"
_COLOURS = (
    *("black", "dimgrey", "tab:blue", "tab:cyan", "navy"),  # stock and the baselines
    *("red", "darkred", "salmon", "darkgreen", "limegreen", "olive"),  # ours and the oracles
    *("tab:purple", "orchid", "tab:orange"),  # the dispatch of live runs
)
_COLUMNS = 3
_LABEL_GAP = 0.068  # of two labels at least, as a share of a panel's height: as many fit as there are arms
_LEAST_LOG_RANGE = 3.0  # from this ratio of largest to least on, an axis is logarithmic
_LOG_TICKS = (1, 1.5, 2, 3, 5, 7)
_MARGIN = 0.08  # beyond the outermost points, as a share of what the points span
_TEXT_MARGIN = 0.2  # the same below them, where a line of text stands

Points = Mapping[str, tuple[float, float]]


def plot_cells(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write one panel a cell: mean step time against mean cost of every arm, each with its name; `ours` is filled.

    Axes span the arms; the lower bound lies beyond them, and its figures stand in the corner.

    Args:
        runs: Entries of ``runs`` in the record of ``rlhfless simulate``.
        path: Where to write; the ending chooses the format.
    """
    columns = min(_COLUMNS, len(runs))
    rows = -(-len(runs) // columns)
    size = (6.2 * columns, 3.9 * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(runs) :]:
        axis.set_visible(False)
    for axis, run in zip(axes.flat, runs, strict=False):
        _cell(axis, run)
    figure.savefig(path, dpi=120, metadata={"Software": None} if path.suffix == ".png" else None)
    pyplot.close(figure)


def look(name: str) -> tuple[str, str]:
    """Return marker and colour of an arm, which no other one has."""
    at = list(ARMS).index(name)
    return _MARKERS[at], _COLOURS[at]


def _cell(axis: Axes, run: Mapping[str, Any]) -> None:
    totals = {name: arm["total"] for name, arm in run["arms"].items()}
    points = {name: (total["step_s"], total["gpu_lease_usd_per_step"]) for name, total in totals.items()}
    for name, (step_s, usd) in points.items():
        marker, colour = look(name)
        face, area = (colour, 140) if name == OURS else ("none", 45)
        axis.scatter(step_s, usd, s=area, marker=marker, edgecolors=colour, facecolors=face, zorder=3)
    axis.set_title(f"{Path(run['trace']).name.split('.')[0]}, {run['cluster']}, {run['model']}", fontsize=10)
    _span_arms(axis, points)
    _name_arms(axis, points)
    bound = run["bound"]
    told = f"↙ lower bound: {bound['step_s']:.3g} s, {_dollars(bound['gpu_lease_usd'])}"
    axis.text(0.02, 0.03, told, transform=axis.transAxes, fontsize=8)


def _span_arms(axis: Axes, points: Points) -> None:
    """Set scale, limits and ticks: logarithmic where the arms differ by much; below them is room for a line of text."""
    axis.set_xlabel("step [s], simulated", fontsize=9)
    axis.set_ylabel("$ per step, simulated", fontsize=9)
    for at, (side, room) in enumerate(((axis.xaxis, _MARGIN), (axis.yaxis, _TEXT_MARGIN))):
        values = [point[at] for point in points.values()]
        low, high = min(values), max(values)
        is_log = high > _LEAST_LOG_RANGE * low > 0
        axis.set(**{f"{'xy'[at]}scale": "log" if is_log else "linear"})
        if is_log:
            limits = low * (low / high) ** room, high * (high / low) ** _MARGIN
            side.set_major_locator(LogLocator(subs=_LOG_TICKS))
            side.set_minor_locator(NullLocator())
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            side.set_label_text(f"{side.get_label_text()}, log scale")
        else:
            reach = max(high - low, 0.05 * high)
            limits = low - room * reach, high + _MARGIN * reach
            side.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axis.set(**{f"{'xy'[at]}lim": limits})
    axis.tick_params(labelsize=8)
    axis.grid(linewidth=0.3, alpha=0.6)


def _name_arms(axis: Axes, points: Points) -> None:
    """Write names and figures beside the panel, each with a line to its point: many arms coincide."""
    to_panel = axis.transData + axis.transAxes.inverted()
    names = sorted(points, key=lambda name: (points[name][1], -points[name][0]))
    heights = label_heights([float(to_panel.transform(points[name])[1]) for name in names])
    for name, height in zip(names, heights, strict=True):
        step_s, usd = points[name]
        axis.annotate(
            f"{name}  {step_s:.3g} s  {_dollars(usd)}",
            points[name],
            (1.06, height),
            textcoords="axes fraction",
            color=look(name)[1],
            fontsize=8,
            fontweight="bold" if name == OURS else "normal",
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "relpos": (0, 0.5), "color": look(name)[1], "linewidth": 0.6, "alpha": 0.6},
        )


def _dollars(usd: float) -> str:
    """Return an amount with three digits, trailing zeros too, so that amounts one above the other compare."""
    return "$" + f"{usd:#.3g}".rstrip(".")


def label_heights(wanted: Sequence[float]) -> list[float]:
    """Return where labels stand in a panel from 0 to 1: as wanted, moved as far as none overlaps the next.

    Args:
        wanted: In increasing order.
    """
    heights: list[float] = []
    lowest = 0.0
    for height in wanted:
        heights.append(max(height, lowest))
        lowest = heights[-1] + _LABEL_GAP
    highest = 1.0
    for at in reversed(range(len(heights))):
        heights[at] = min(heights[at], highest)
        highest = heights[at] - _LABEL_GAP
    return heights
