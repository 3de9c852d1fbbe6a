"""The picture of a comparison: every arm can be told from the others, also where they coincide."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_rlhfless.sim.cell import ARMS
from verl_rlhfless.sim.plots import label_heights, look, plot_cells


def drawn(arms: dict[str, tuple[float, float]], folder: Path) -> str:
    totals = {name: {"total": {"step_s": s, "gpu_lease_usd_per_step": usd}} for name, (s, usd) in arms.items()}
    bound = {"step_s": 9.13, "gpu_lease_usd": 0.0132}
    run: dict[str, Any] = {"trace": "a/b.jsonl", "cluster": "c", "model": "m", "arms": totals, "bound": bound}
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_cells([run], folder / "plot.svg")
    return (folder / "plot.svg").read_text()


def test_no_two_arms_look_alike() -> None:
    assert len({look(name) for name in ARMS}) == len(ARMS) == len({look(name)[1] for name in ARMS})


def test_arms_at_one_point_are_all_named_with_their_figures(tmp_path: Path) -> None:
    picture = drawn(dict.fromkeys(ARMS, (20.0, 0.5)), tmp_path)
    assert all(f">{name}  20 s  $0.500<" in picture for name in ARMS)
    assert "lower bound: 9.13 s, $0.0132" in picture and "b, c, m" in picture


@pytest.mark.parametrize(("largest", "is_log"), [(0.6, False), (5.0, True)])
def test_a_logarithmic_axis_says_so(largest: float, is_log: bool, tmp_path: Path) -> None:
    picture = drawn({"stock_sync": (30.0, largest), "ours": (20.0, 0.5)}, tmp_path)
    assert ("$ per step, simulated, log scale" in picture) is is_log and "step [s], simulated<" in picture


@given(wanted=st.lists(st.floats(-0.2, 1.2), max_size=len(ARMS)).map(sorted))
def test_labels_stay_in_the_panel_in_order_and_apart(wanted: list[float]) -> None:
    heights = label_heights(wanted)
    assert len(heights) == len(wanted) and all(-1e-9 <= height <= 1 + 1e-9 for height in heights)
    assert all(upper - lower > 0.06 for lower, upper in pairwise(heights))
