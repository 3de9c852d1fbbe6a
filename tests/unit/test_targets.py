"""What the comparison says of its targets: met, missed, or missed with true lengths too."""

from __future__ import annotations

from typing import Any

from benchmarks.targets import verdicts


def row(
    cell: str,
    *,
    ours: dict[str, float],
    oracle: dict[str, float],
    prompts: dict[str, float] | None = None,
    is_long: bool = True,
) -> dict[str, Any]:
    """Return a cell in which every arm has stock's figures but ours and the oracles."""
    usual = {"x_stock": 1.0, "cost_stock": 1.0, "usd_per_step": 1.0, "cost_best": 1.0, "t_best": 1.0, "objective": 1.0}
    names = ("rlhfuse", "rlhfless_paper")
    arms = dict.fromkeys(names, usual) | dict.fromkeys(("ours", "ours_notslower"), usual | ours)
    arms |= dict.fromkeys(("oracle", "oracle_notslower"), usual | oracle)
    arms["oracle_prompts"] = usual | (prompts or oracle)
    return {"cell": cell, "is_long": is_long, "arms": arms, "bound": {"notslower_cost_best": 0.3}}


def verdict(rows: list[dict[str, Any]], text: str, arm: str = "ours") -> dict[str, Any]:
    return next(entry for entry in verdicts(rows) if entry["target"].startswith(text) and entry["arm"] == arm)


def test_a_mean_over_cells_decides() -> None:
    rows = [row(str(x), ours={"x_stock": x}, oracle={"x_stock": 2.0}) for x in (1.2, 1.6)]
    found = verdict(rows, "step, times faster")
    assert found["value"] == 1.4 and found["verdict"] == "met"
    assert verdict(rows[:1], "step, times faster")["verdict"] == "missed"


def test_what_true_lengths_miss_too_is_out_of_reach_with_the_figure() -> None:
    found = verdict([row("a", ours={}, oracle={"cost_best": 0.8})], "cost over the best", "ours_notslower")
    assert found["verdict"] == "out of reach: 0.8 even with true lengths" and found["bound"] == 0.3


def test_each_cell_that_misses_is_named() -> None:
    rows = [
        row("good", ours={"t_best": 1.0}, oracle={}, is_long=False),
        row("bad", ours={"t_best": 1.05}, oracle={}, is_long=False),
        row("hopeless", ours={"t_best": 1.05}, oracle={"t_best": 1.04}, is_long=False),
    ]
    found = verdict(rows, "step over the best")
    assert found["missed"] == {"bad": 1.05, "hopeless": 1.05} and found["out_of_reach"] == {"hopeless": 1.04}
    assert found["met"] == 1 and found["verdict"] == "missed"


def test_the_oracle_is_out_of_reach_where_every_prompts_true_lengths_do_not_come_near_it() -> None:
    rows = [
        row("near", ours={"objective": 0.85}, oracle={"objective": 0.8}, prompts={"objective": 0.82}),
        row("far", ours={"objective": 0.9}, oracle={"objective": 0.8}, prompts={"objective": 0.9}),
    ]
    found = verdict(rows, "objective over the oracle's")
    assert found["missed"] == {"far": 1.125} == found["out_of_reach"] and found["verdict"] == "out of reach"
    known = row("far", ours={"objective": 0.9}, oracle={"objective": 0.8}, prompts={"objective": 0.84})
    assert verdict([known], "objective over the oracle's")["verdict"] == "missed"


def test_nothing_is_said_of_arms_that_did_not_run() -> None:
    one = row("a", ours={}, oracle={})
    del one["arms"]["oracle"]
    assert all(entry["arm"] == "ours_notslower" for entry in verdicts([one]))
