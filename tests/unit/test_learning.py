"""When two arms have learnt the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.learning import WINDOW, compare, draw, learnt


def curve(first: float, last: float) -> list[float]:
    return [first] * WINDOW + [9.0] * 5 + [last] * WINDOW


def arms(stock: list[float], elastic: list[float], first: float = 0.1) -> dict[str, dict[int, list[float]]]:
    ends = {"stock": stock, "elastic": elastic}
    return {arm: {seed: curve(first, end) for seed, end in enumerate(ends[arm])} for arm in ends}


def test_what_lies_between_the_two_ends_does_not_count() -> None:
    assert learnt(curve(0.25, 0.75)) == (0.25, 0.75)


@pytest.mark.parametrize(
    ("stock", "elastic", "first", "is_met"),
    [
        ([0.5, 0.6, 0.7], [0.55, 0.65, 0.75], 0.1, True),
        ([0.5, 0.6, 0.7], [0.8, 0.9, 1.0], 0.1, False),
        ([0.5, 0.5, 0.5], [0.4, 0.4, 0.4], 0.1, False),
        ([0.5, 0.6, 0.7], [0.5, 0.6, 0.7], 0.55, False),
        ([0.5, 0.5, 0.6], [0.4, 0.9, 1.0], 0.1, False),
    ],
    ids=["agree", "elastic is elsewhere", "seeds agree, arms don't", "one seed fell", "elastic scatters"],
)
def test_arms_agree_within_the_spread_of_stocks_seeds_and_every_run_rises(
    stock: list[float], elastic: list[float], first: float, is_met: bool
) -> None:
    assert compare(arms(stock, elastic, first))["is_met"] is is_met


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    draw(arms([0.5, 0.6], [0.5, 0.7]), tmp_path / "learning.png")
    assert (tmp_path / "learning.png").stat().st_size > 10_000
