"""Whole nodes are billed from their first hold on, at least the minimum, wherever windows begin and end."""

from __future__ import annotations

import pytest

from verl_rlhfless.sim.billing import NodeBill
from verl_rlhfless.types import Window


def bill(*holds: tuple[float, float]) -> NodeBill:
    """Return the bill of a node with a minimum of 60 s after holds that have ended."""
    made = NodeBill(60.0)
    for now_s, is_begin in sorted([(begin, True) for begin, _ in holds] + [(end, False) for _, end in holds]):
        (made.hold if is_begin else made.free)(now_s)
    return made


def test_a_short_hold_is_billed_the_minimum_also_at_the_start_and_beyond_the_end() -> None:
    made = bill((0.0, 10.0))
    assert made.seconds(Window(0.0, 10.0)) == 10.0
    assert made.seconds(Window(0.0, 500.0)) == 60.0
    assert made.total_s(10.0) == 60.0
    assert made.total_s(500.0) == 60.0


def test_steps_are_billed_what_the_run_is_billed_while_they_run() -> None:
    made = bill((95.0, 105.0))
    assert [made.seconds(Window(at, at + 100.0)) for at in (0.0, 100.0, 200.0)] == [5.0, 55.0, 0.0]
    assert made.total_s(300.0) == 60.0


def test_what_is_held_while_it_is_billed_anyway_begins_no_new_period() -> None:
    assert bill((0.0, 10.0), (30.0, 40.0)).total_s(1000.0) == 60.0
    assert bill((0.0, 10.0), (30.0, 90.0)).total_s(1000.0) == 90.0
    assert bill((0.0, 10.0), (5.0, 80.0), (80.0, 100.0)).total_s(1000.0) == 100.0
    assert bill((0.0, 10.0), (61.0, 71.0)).total_s(1000.0) == 120.0


def test_a_node_that_is_still_held_is_billed_until_now() -> None:
    made = bill((0.0, 10.0))
    made.hold(200.0)
    assert made.seconds(Window(50.0, 300.0)) == pytest.approx(10.0 + 100.0)
    assert made.total_s(300.0) == pytest.approx(60.0 + 100.0)
    assert made.total_s(210.0) == pytest.approx(60.0 + 60.0)


def test_a_grant_that_is_given_back_at_once_is_free() -> None:
    made = NodeBill(60.0)
    made.hold(5.0)
    made.free(5.0)
    assert made.total_s(100.0) == 0.0
