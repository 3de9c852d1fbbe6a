"""The picture of a comparison: one panel an arm, one lane a GPU, and what each GPU did; needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from verl_rlhfless.ledger import whole_run
from verl_rlhfless.report.lanes import STATES, Box, boxes
from verl_rlhfless.report.timeline import StepTime, Timeline
from verl_rlhfless.types import Window

_COLOURS = {"startup": "#f2b134", "idle": "#d9d9d9", "generation": "#2a9d8f", "trainer": "#264b96"}
_NAMES = {
    "startup": "starting (grant to first use)",
    "idle": "leased and idle",
    "generation": "generation",
    "trainer": "trainer phase",
}
_WIDTH_IN = 12.0
_LANE_IN = 0.34
_FRAME_IN = 0.75  # title and axis of a panel
_LEGEND_IN = 0.55
_MOST_STEP_NAMES = 40


def draw_timelines(arms: Mapping[str, Timeline], path: Path, steps_only: bool = False) -> None:
    """Write the picture of all arms to ``path``; its ending chooses the format.

    All arms have the same scale. White = leased by nobody.

    Args:
        arms: At least one; each with a lease, and with a training step when ``steps_only``.
        path: Where to write.
        steps_only: Show the training steps alone; the start of a short run takes most of it.
    """
    windows = {name: _window(timeline, steps_only) for name, timeline in arms.items()}
    drawn = {name: boxes(timeline) for name, timeline in arms.items()}
    lanes = [max((box.lane for box in found), default=0) + 1 for found in drawn.values()]
    heights = [_FRAME_IN + _LANE_IN * count for count in lanes]
    figure, axes = pyplot.subplots(
        len(arms),
        1,
        figsize=(_WIDTH_IN, sum(heights) + _LEGEND_IN),
        sharex=True,
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    for axis, (name, found), count in zip(axes.flat, drawn.items(), lanes, strict=True):
        _panel(axis, name, arms[name].steps, found, (windows[name].start_s, count))
    axes.flat[-1].set_xlim(0, max(window.end_s - window.start_s for window in windows.values()))
    axes.flat[-1].set_xlabel(f"seconds since the {'first training step began' if steps_only else 'first grant'}")
    patches = [Patch(color=_COLOURS[state], label=_NAMES[state]) for state in STATES]
    figure.legend(handles=patches, loc="outside upper center", ncols=len(patches), frameon=False, fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None} if path.suffix == ".png" else None)
    pyplot.close(figure)


def _window(timeline: Timeline, steps_only: bool) -> Window:
    if steps_only:
        return Window(timeline.steps[0].window.start_s, timeline.steps[-1].window.end_s)
    return whole_run(timeline.leases, timeline.watched_until_s)


def _panel(axis: Axes, name: str, steps: Sequence[StepTime], found: Sequence[Box], frame: tuple[float, int]) -> None:
    """Draw one arm; ``frame`` = (where the time axis begins, lanes)."""
    zero_s, num_lanes = frame
    for state in STATES:
        for lane in range(num_lanes):
            bars = [(b.start_s - zero_s, b.end_s - b.start_s) for b in found if b.state == state and b.lane == lane]
            if bars:
                axis.broken_barh(bars, (lane + 0.07, 0.86), facecolors=_COLOURS[state], linewidth=0)
    for step in steps:
        axis.axvline(step.window.start_s - zero_s, color="black", linewidth=0.5, linestyle=":")
        if len(steps) <= _MOST_STEP_NAMES:
            axis.annotate(
                f"{step.step}",
                (step.window.start_s - zero_s, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(2, 2),
                textcoords="offset points",
                fontsize=7,
                annotation_clip=True,
            )
    axis.set_ylim(0, num_lanes)
    axis.set_yticks([lane + 0.5 for lane in range(num_lanes)], [f"GPU {lane + 1}" for lane in range(num_lanes)])
    axis.tick_params(labelsize=8)
    axis.set_title(f"{name} (numbers: training steps)", loc="left", fontsize=10, pad=12)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
