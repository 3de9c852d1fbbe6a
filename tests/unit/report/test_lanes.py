"""Every leased GPU-second is drawn once, in the ledger's state, and no lane holds two leases at a time."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_rlhfless.ledger import account, whole_run
from verl_rlhfless.report.lanes import boxes
from verl_rlhfless.report.timeline import Timeline
from verl_rlhfless.types import BusySpan, LeaseSpan

END_S = 50


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    leases, phases, generation = [], [], []
    for number in range(draw(st.integers(1, 5))):
        granted = draw(st.integers(0, 40))
        released = draw(st.none() | st.integers(granted, END_S))
        usable = draw(st.none() | st.integers(granted, END_S if released is None else released))
        name = f"l{number}"
        leases.append(LeaseSpan(name, "replica", draw(st.integers(1, 3)), granted, usable, released))
        for target in (phases, generation):
            for _ in range(draw(st.integers(0, 3))):
                start = draw(st.integers(0, 45))
                target.append(BusySpan(name, draw(st.integers(1, 3)), start, start + draw(st.integers(1, 20))))
    leases.sort(key=lambda lease: lease.granted_s)
    return Timeline((), tuple(leases), tuple(phases), tuple(generation), (), END_S)


@given(timeline=timelines())
def test_the_picture_adds_up_to_the_ledger(timeline: Timeline) -> None:
    seconds: dict[str, float] = defaultdict(float)
    lanes = defaultdict(list)
    for box in boxes(timeline):
        assert box.start_s < box.end_s
        seconds[box.state] += box.end_s - box.start_s
        lanes[box.lane].append((box.start_s, box.end_s))
    gpu = account(timeline.leases, timeline.busy, whole_run(timeline.leases, END_S))
    assert seconds["startup"] == pytest.approx(gpu.startup)
    assert seconds["idle"] == pytest.approx(gpu.idle)
    assert seconds["trainer"] + seconds["generation"] == pytest.approx(gpu.busy)
    for spans in lanes.values():
        spans.sort()
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


def test_leases_that_follow_each_other_share_a_lane_and_others_do_not() -> None:
    leases = [LeaseSpan(f"l{i}", "replica", 1, s, s, e) for i, (s, e) in enumerate([(0, 10), (0, 5), (5, 9), (12, 20)])]
    timeline = Timeline((), tuple(leases), (), (BusySpan("l3", 1, 13, 14),), (), END_S)
    drawn = [(box.lane, box.start_s, box.end_s, box.state) for box in boxes(timeline)]
    assert drawn[:3] == [(0, 0, 10, "idle"), (1, 0, 5, "idle"), (1, 5, 9, "idle")]
    assert drawn[3:] == [(0, 12, 13, "idle"), (0, 13, 14, "generation"), (0, 14, 20, "idle")]
