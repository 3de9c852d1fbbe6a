"""Pictures of simulated comparisons; the only module of the simulator that needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from verl_rlhfless.sim.cell import ARMS

_MARKERS = "osD^v<>PXh*dp8"
_COLOURS = [matplotlib.colormaps["tab10"](i) for i in range(10)]
_COLUMNS = 4


def plot_cells(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write one panel a cell: mean step time against mean cost of every arm, and the lower bound.

    Axes are logarithmic: equal distances are equal ratios. Arms keep their marker in all panels; one legend names them.

    Args:
        runs: Entries of ``runs`` in the record of ``rlhfless simulate``.
        path: Where to write; the ending chooses the format.
    """
    columns = min(_COLUMNS, len(runs))
    rows = -(-len(runs) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.6 * columns, 3.1 * rows + 0.8), squeeze=False)
    for axis in axes.flat[len(runs) :]:
        axis.set_visible(False)
    for axis, run in zip(axes.flat, runs, strict=False):
        _cell(axis, run)
    handles = {handle.get_label(): handle for axis in axes.flat for handle in axis.get_legend_handles_labels()[0]}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=max(2, 2 * columns), fontsize=7)
    lines = -(-len(handles) // max(2, 2 * columns))
    figure.tight_layout(rect=(0, (0.12 + 0.17 * lines) / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=120, metadata={"Software": None} if path.suffix == ".png" else None)
    pyplot.close(figure)


def _cell(axis: Axes, run: Mapping[str, Any]) -> None:
    for name, arm in run["arms"].items():
        at = list(ARMS).index(name)
        total = arm["total"]
        axis.scatter(
            total["step_s"],
            total["gpu_lease_usd_per_step"],
            s=42,
            marker=_MARKERS[at % len(_MARKERS)],
            edgecolors=[_COLOURS[at % 10]],
            facecolors="none",
            label=name,
        )
    bound = run["bound"]
    axis.scatter(bound["step_s"], bound["gpu_lease_usd"], s=55, color="black", marker="+", label="lower bound")
    axis.set_title(f"{Path(run['trace']).name.split('.')[0]}, {run['cluster']}, {run['model']}", fontsize=8)
    axis.set_xlabel("step [s], simulated", fontsize=7)
    axis.set_ylabel("gpu_lease_usd per step", fontsize=7)
    for one, set_scale in ((axis.xaxis, axis.set_xscale), (axis.yaxis, axis.set_yscale)):
        set_scale("log", subs=(1, 2, 3, 5))
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        one.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.tick_params(which="both", labelsize=6)
    axis.margins(0.12)
    axis.grid(which="both", linewidth=0.3, alpha=0.6)
