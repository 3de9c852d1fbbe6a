"""The control arms over many workloads: each differs from the elastic arm by what its name says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import control_spread, record
from benchmarks.control_spread import FIGURES, STEPS, compare, workload
from benchmarks.live_costs import calibrate
from benchmarks.live_run import LiveRun
from benchmarks.sim_vs_live import Stage
from tests.unit.test_sim_vs_live import live_run
from verl_rlhfless.policy.arm import Arm


@pytest.fixture
def run(tmp_path: Path) -> LiveRun:
    return live_run(tmp_path / "parked")


def test_every_arm_runs_the_same_lengths_and_differs_in_one_thing(
    run: LiveRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, seen = Stage.of(run, calibrate(run), workload(run, seed=3)), {}
    simulate = Stage.steps

    def steps(self: Stage, arm: Arm) -> dict[int, dict[str, Any]]:
        found = simulate(self, arm)
        seen[len(seen)] = [control_spread._num_replicas(step["fleet"]) for step in found.values()]
        return found

    monkeypatch.setattr(Stage, "steps", steps)
    found = compare(run.settings, stage)

    assert list(found) == ["elastic", "fixed", "random", "prompts", "oracle"]
    elastic, fixed = seen[0], seen[1]
    assert sum(elastic) == sum(fixed) and max(fixed) - min(fixed) <= 1 and len(fixed) == STEPS
    for one in found.values():
        assert one["objective"] == pytest.approx((one["step"] + one["gpu_s"]) / 2)
    assert len({tuple(one.values()) for one in found.values()}) == len(found), "no two arms are the same"


def test_the_record_has_means_and_their_errors(run: LiveRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_RESULTS", tmp_path)
    monkeypatch.setattr(control_spread, "LiveRun", lambda folder, pace: run)
    monkeypatch.setattr(sys, "argv", ["control_spread", str(run.folder), "--workloads", "2"])
    control_spread.main()

    found = json.loads((tmp_path / "control_spread.json").read_text())
    assert found["kind"] == "simulated" and str(tmp_path) not in json.dumps(found)
    arms, over = found["results"]["arms"], found["results"]["elastic_objective_over"]
    assert all(arm[name]["standard_error"] >= 0 for arm in arms.values() for name in FIGURES)
    mean = {arm: of["objective"]["mean"] for arm, of in arms.items()}
    assert over["random"] == pytest.approx(mean["elastic"] / mean["random"])


def test_a_single_workload_has_no_spread(run: LiveRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["control_spread", str(run.folder), "--workloads", "1"])
    with pytest.raises(SystemExit) as ended:
        control_spread.main()
    assert ended.value.code == 2
