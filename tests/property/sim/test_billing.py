"""Whatever is held when: windows add up, and the bill is that of the holds merged and stretched to the minimum."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_rlhfless.sim.billing import NodeBill
from verl_rlhfless.types import Window

HOLDS = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 80)), max_size=12)


def periods(holds: list[tuple[int, int]], min_s: int) -> list[tuple[int, int]]:
    """Return the billing periods of all ``(start, seconds)`` of a run, known at once."""
    found: list[tuple[int, int]] = []
    for begin, length in sorted(holds):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], begin + length)
        else:
            found.append((begin, begin + max(length, min_s)))
    return found


@given(HOLDS, st.integers(0, 100), st.lists(st.integers(0, 400), max_size=6))
def test_a_bill_that_is_kept_on_the_way_is_that_of_the_whole_run(
    holds: list[tuple[int, int]], min_s: int, cuts: list[int]
) -> None:
    made, windows, since = NodeBill(float(min_s)), [], 0
    changes = [(begin, 1) for begin, _ in holds] + [(begin + length, 0) for begin, length in holds]
    for at_s, kind in sorted([*changes, *[(cut, 2) for cut in [*cuts, 400]]]):
        if kind == 2:
            windows.append((since, at_s, made.seconds(Window(float(since), float(at_s)))))
            since = at_s
        elif kind == 1:
            made.hold(float(at_s))
        else:
            made.free(float(at_s))
    wanted = periods(holds, min_s)
    for start, end, seconds in windows:
        assert seconds == pytest.approx(sum(max(0, min(e, end) - max(b, start)) for b, e in wanted))
    assert made.total_s(400.0) == pytest.approx(sum(e - b for b, e in wanted))
