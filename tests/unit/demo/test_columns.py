"""The demo's table over its columns: medians, ratios to stock of the same column, and arms that are void."""

from __future__ import annotations

from typing import Any

import pytest

from verl_rlhfless.demo.columns import COLUMNS, Summary, as_json, render_columns, summarise
from verl_rlhfless.demo.recipe import ELASTIC, STOCK


def arm(step_s: list[float], gpu_s: list[float], load: float = 40.0) -> dict[str, Any]:
    steps = zip(step_s, gpu_s, strict=True)
    return {
        "steps": [
            {"step_s": s, "gpu_s_allocated": g, "gpu_s_startup": g / 10, "host_cpu_percent": load} for s, g in steps
        ]
    }


def test_ratios_are_medians_over_stocks_of_the_same_column_without_the_first_step() -> None:
    stock, elastic = arm([99, 10, 11, 12], [400, 40, 44, 48]), arm([1, 11, 11, 44], [1, 20, 22, 99])
    (first, second) = summarise({"parked": {"arms": {"stock": stock, "elastic": elastic}}})
    assert (first.step_over_stock, first.gpu_over_stock, first.objective) == (1.0, 1.0, 1.0)
    assert second.step_over_stock == 1.0 and second.gpu_over_stock == 0.5
    assert second.objective == pytest.approx(0.75)


def test_a_paced_arm_on_a_busy_host_is_void_and_the_table_says_so() -> None:
    record = {"arms": {"stock": arm([1, 1], [4, 4], load=71.0)}}
    (paced,), (unpaced,) = summarise({"cold": record}), summarise({"unpaced": record})
    assert paced.is_void and not unpaced.is_void
    assert "stock in cold is void" in render_columns([paced])
    assert "void" not in render_columns([unpaced])


@pytest.mark.parametrize(("loads", "is_void"), [([99.0, 60, 60, 80], False), ([40.0, 60, 80, 80], True)])
def test_an_arm_is_void_when_its_median_step_was_too_busy(loads: list[float], is_void: bool) -> None:
    busy = arm([1, 1, 1, 1], [4, 4, 4, 4])
    for step, load in zip(busy["steps"], loads, strict=True):
        step["host_cpu_percent"] = load
    (summary,) = summarise({"parked": {"arms": {"stock": busy}}})
    assert summary.is_void is is_void


def test_an_arm_that_never_got_past_its_warm_up_is_left_out() -> None:
    assert summarise({"unpaced": {"arms": {"stock": arm([1], [4])}}}) == []


def test_the_table_is_kept_with_the_code_that_made_it() -> None:
    summaries = summarise({"parked": {"arms": {"stock": arm([1, 1], [4, 4])}}})
    kept = as_json(summaries, {"commit": "5ea5066", "versions": {"verl": "0.9.1"}})
    assert (kept["format"], kept["commit"], kept["versions"]) == ("rlhfless-columns/1", "5ea5066", {"verl": "0.9.1"})
    assert [Summary(**one) for one in kept["arms"]] == summaries


def test_only_arms_that_lease_replicas_differ_between_columns() -> None:
    for column in COLUMNS.values():
        assert column.applied_to(STOCK) == STOCK
    assert "rlhfless.pool.park=always" in COLUMNS["parked"].applied_to(ELASTIC).overrides
    assert "rlhfless.pool.park=never" in COLUMNS["cold"].applied_to(ELASTIC).overrides
