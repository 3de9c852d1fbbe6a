"""Who reads a timeline finds in it what white means, where steps begin, and why a step is long."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pytest

from verl_rlhfless.report.figure import draw_timelines
from verl_rlhfless.report.timeline import StepTime, Timeline
from verl_rlhfless.types import BusySpan, LeaseSpan, Window


def timeline(regrant_s: float) -> Timeline:
    """The trainer leaves its GPU at 10, and a replica leases it from ``regrant_s`` on."""
    leases = (LeaseSpan("t", "trainer", 1, 0, 5, 10), LeaseSpan("r", "replica", 1, regrant_s, regrant_s, 100))
    windows = (Window(5, 90), Window(90, 100))
    steps = tuple(StepTime(number, window, window) for number, window in enumerate(windows, 1))
    return Timeline(steps, leases, (), (BusySpan("r", 1, regrant_s, 100),), (), 100)


def drawn(regrant_s: float, path: Path, *, steps_only: bool = False) -> str:
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw_timelines({"elastic": timeline(regrant_s)}, path, steps_only)
    return path.read_text()


@pytest.mark.parametrize("steps_only", [False, True])
def test_white_is_explained_and_a_long_gap_names_its_step(steps_only: bool, tmp_path: Path) -> None:
    picture = drawn(60, tmp_path / "timeline.svg", steps_only=steps_only)
    assert ">leased by nobody<" in picture and ">step 1<" in picture and ">2<" in picture
    assert picture.count(">step 1: no GPU is leased<") == 1


def test_a_short_gap_is_left_without_a_name(tmp_path: Path) -> None:
    assert "no GPU is leased" not in drawn(15, tmp_path / "timeline.svg")
