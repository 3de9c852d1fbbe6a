"""What routing did and took, read alike in every arm."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.observed_run import elastic_run, stock_run
from verl_rlhfless.report.ab import build_arm
from verl_rlhfless.report.observed import HostSample
from verl_rlhfless.report.requests import host_cpu_percent, render_requests
from verl_rlhfless.types import Window


def test_a_rollout_lasts_from_the_start_of_the_step_to_the_last_engine_iteration(tmp_path: Path) -> None:
    steps = build_arm(stock_run(tmp_path).path).steps
    uses = [step.figures.requests for step in steps]
    assert [use.rollout_s for use in uses if use] == [4.0, 4.0]
    assert all(use is not None and use.num_migrations is None for use in uses), "stock has no router of ours"


def test_what_the_router_told_is_in_the_record(tmp_path: Path) -> None:
    run = elastic_run(tmp_path)
    told = {"event": "rolled_out", "t": 115.0, "step": 1, "num_migrations": 3, "router_cpu_s": 0.25}
    run.append("events-2.jsonl", told)
    first, second = (step.figures.requests for step in build_arm(run.path).steps)
    assert first is not None and (first.num_migrations, first.router_cpu_s) == (3, 0.25)
    assert second is not None and second.num_migrations is None


@pytest.mark.parametrize(
    ("window", "percent"), [((0, 10), 20.0), ((10, 20), 80.0), ((5, 15), 50.0), ((0, 40), 50.0), ((30, 40), None)]
)
def test_host_cpu_of_a_window_is_weighted_by_time(window: tuple[float, float], percent: float | None) -> None:
    samples = [HostSample(t, cpu, 0, 0.0) for t, cpu in ((0, 99.0), (10, 20.0), (20, 80.0))]
    assert host_cpu_percent(samples, Window(*window)) == percent


def test_the_table_shows_prefill_beside_the_least_and_leaves_out_what_is_not_known() -> None:
    step = {"step": 1, "rollout_s": 2.0, "gen_s": 2.1, "prefill_tokens": 300, "num_migrations": None}
    text = render_requests({"stock": {"steps": [step]}}, {1: 100})
    (row,) = [line for line in text.splitlines() if line.startswith("stock")]
    assert row.split() == ["stock", "1", "2.00", "2.10", "300", "100", "3.00", "-", "-", "-", "-"]
