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
_LEAST_NAMED_GAP = 0.12  # of the time axis: a shorter gap has no room for its name


def draw_timelines(arms: Mapping[str, Timeline], path: Path, steps_only: bool = False) -> None:
    """Write the picture of all arms to ``path``; its ending chooses the format.

    All arms have the same scale. A long gap between leases says so, and in which step it lies.

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
    axes.flat[-1].set_xlim(0, max(window.end_s - window.start_s for window in windows.values()))
    for axis, (name, found), count in zip(axes.flat, drawn.items(), lanes, strict=True):
        _panel(axis, name, found, (windows[name].start_s, count))
        _name_steps(axis, arms[name].steps, windows[name].start_s)
        _name_gaps(axis, arms[name], windows[name])
    axes.flat[-1].set_xlabel(f"seconds since the {'first training step began' if steps_only else 'first grant'}")
    patches = [Patch(color=_COLOURS[state], label=_NAMES[state]) for state in STATES]
    patches.append(Patch(facecolor="white", edgecolor="grey", label="leased by nobody"))
    figure.legend(handles=patches, loc="outside upper center", ncols=len(patches), frameon=False, fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None} if path.suffix == ".png" else None)
    pyplot.close(figure)


def _window(timeline: Timeline, steps_only: bool) -> Window:
    if steps_only:
        return Window(timeline.steps[0].window.start_s, timeline.steps[-1].window.end_s)
    return whole_run(timeline.leases, timeline.watched_until_s)


def _panel(axis: Axes, name: str, found: Sequence[Box], frame: tuple[float, int]) -> None:
    """Draw the lanes of one arm; ``frame`` = (where the time axis begins, lanes)."""
    zero_s, num_lanes = frame
    for state in STATES:
        for lane in range(num_lanes):
            bars = [(b.start_s - zero_s, b.end_s - b.start_s) for b in found if b.state == state and b.lane == lane]
            if bars:
                axis.broken_barh(bars, (lane + 0.07, 0.86), facecolors=_COLOURS[state], linewidth=0)
    axis.set_ylim(0, num_lanes)
    axis.set_yticks([lane + 0.5 for lane in range(num_lanes)], [f"GPU {lane + 1}" for lane in range(num_lanes)])
    axis.tick_params(labelsize=8)
    axis.set_title(name, loc="left", fontsize=10, pad=12)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _name_steps(axis: Axes, steps: Sequence[StepTime], zero_s: float) -> None:
    """Draw where each training step begins, with its number."""
    for step in steps:
        at_s = step.window.start_s - zero_s
        axis.axvline(at_s, color="black", linewidth=0.5, linestyle=":")
        if len(steps) <= _MOST_STEP_NAMES:
            axis.annotate(
                f"step {step.step}" if step is steps[0] else f"{step.step}",
                (at_s, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(2, 2),
                textcoords="offset points",
                fontsize=8,
                annotation_clip=True,
            )


def _name_gaps(axis: Axes, timeline: Timeline, window: Window) -> None:
    """Name the long times in which nothing is leased, with the step that they lie in."""
    least_s = _LEAST_NAMED_GAP * axis.get_xlim()[1]
    leased_until_s = window.start_s
    for lease in timeline.leases:  # in the order of their grants
        if lease.granted_s - leased_until_s > least_s:
            middle_s = (lease.granted_s + leased_until_s) / 2
            inside = [s.step for s in timeline.steps if s.window.start_s <= middle_s < s.window.end_s]
            told = "".join(f"step {step}: " for step in inside) + "no GPU is leased"
            axis.text(middle_s - window.start_s, axis.get_ylim()[1] / 2, told, ha="center", va="center", fontsize=9)
        released_s = timeline.watched_until_s if lease.released_s is None else lease.released_s
        leased_until_s = max(leased_until_s, released_s)
