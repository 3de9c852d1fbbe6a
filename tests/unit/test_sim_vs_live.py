"""A simulated run beside the live one that it foretells: what is read, calibrated, left out and judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks.live_costs import calibrate, calibrated, declared_phases_s
from benchmarks.live_run import LiveRun, LiveStep
from benchmarks.sim_vs_live import POLL_S, compare, draw, predict, told
from tests.unit.observed_run import RunFolder
from verl_rlhfless.errors import DataError
from verl_rlhfless.live.pacing import PaceModel
from verl_rlhfless.sim.generate import TraceSpec, write_trace
from verl_rlhfless.trace import read_header

PACE = PaceModel(100.0, per_request_ms=2.0, per_inference_token_us=1000.0, per_update_token_us=3000.0)
LENGTHS = {row: [12 + 3 * row + session for session in range(4)] for row in range(4)}
"""Tokens of a step's 16 samples: at most 25, so that a rollout takes about three seconds."""
CONFIG = {
    "critic": {"enable": False},
    "actor_rollout_ref": {
        "actor": {"strategy": "fsdp2"},
        "rollout": {
            "tensor_model_parallel_size": 1,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 512,
            "gpu_memory_utilization": 0.5,
            "response_length": 32,
        },
    },
    "reward": {"reward_model": {"enable": False, "enable_resource_pool": False}},
    "rlhfless": {
        "pool": {"name": "elastic", "max_gpus": 4, "park": "always"},
        "weights": {"name": "store"},
        "planner": {"name": "cost_aware"},
        "predictor": {"name": "history"},
        "prefix_dedup": {"name": "on"},
        "dispatcher": {"name": "length_bucket"},
        "migration": {"name": "cut_and_migrate"},
    },
    "trainer": {"n_gpus_per_node": 4, "nnodes": 1},
}
TIMERS = {"gen": 4.0, "old_log_prob": 1.0, "adv": 0.1, "update_actor": 1.5, "update_weights": 0.2, "step": 7.0}


def arm(path: Path) -> RunFolder:
    """Three steps of 7 s, from 100, 110 and 120 on, and what was generated in them."""
    path.mkdir(parents=True)
    run = RunFolder(path).host(90.0, *range(91, 131))
    for step in (1, 2, 3):
        run.step(step, 100.0 + 10 * step, **TIMERS).lengths(step, LENGTHS, (32, 4, True))
        run.samples(step, *(f"u{row}_{session}_0" for row in range(4) for session in range(4)))
    return run


def live_run(path: Path, cold_step: int = 3) -> LiveRun:
    stock = arm(path / "stock").lease("global_pool:0", 4, 80.0, 130.0)
    stock.engine(1, None, 0, *((begin + 0.5, begin + 3.5) for begin in (100.0, 110.0, 120.0)))
    elastic = arm(path / "elastic").lease("run/trainer/a", 4, 80.0, 100.3)
    for step, begin in ((1, 100.0), (2, 110.0), (3, 120.0)):
        for replica in (1, 2):
            name = f"run/replica/r{step}{replica}"
            elastic.lease(name, 1, begin + 0.4, begin + 4.2)
            elastic.engine(10 * step + replica, name, replica, (begin + 0.9,), (begin + 1.0, begin + 4.0))
            elastic.append("events-1.jsonl", {"event": "replica_ready", "t": begin + 0.9, "lease": name})
            if step != cold_step or replica == 1:
                parked = {"event": "replica_parked", "t": begin, "lease": f"p{name}", "num_gpus": 1}
                memory = {"device_bytes": 0, "host_bytes": 0, "host_available_bytes": 0}
                woken = {"event": "replica_woken", "t": begin + 0.5, "lease": name, "parked_as": f"p{name}"}
                elastic.append("events-1.jsonl", {**parked, "memory": memory}, woken)
        elastic.lease(f"run/trainer/{step}", 4, begin + 4.3, begin + 10.3)
    config = path / "elastic" / "hydra" / ".hydra" / "config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(yaml.safe_dump(CONFIG))
    return LiveRun(path, PACE)


def test_a_run_names_the_trace_that_it_replayed_and_the_code_that_ran_it(tmp_path: Path) -> None:
    run = live_run(tmp_path)
    assert run.trace is None and run.code == {"commit": None, "has_uncommitted_changes": None}
    write_trace(TraceSpec(1, 1, 2, 2, mean=60.0, tail=0.8, max_response_tokens=256), tmp_path / "t.jsonl")
    config = tmp_path / "elastic" / "hydra" / ".hydra" / "config.yaml"
    rlhfless = {**CONFIG["rlhfless"], "replay": {"trace": str(tmp_path / "t.jsonl")}}
    config.write_text(yaml.safe_dump({**CONFIG, "rlhfless": rlhfless}))
    made_by = {"commit": "5ea5066", "has_uncommitted_changes": False}
    (tmp_path / "ab.json").write_text(json.dumps({"format": "rlhfless-ab/1", **made_by}))
    again = LiveRun(tmp_path, PACE)
    assert again.code == made_by and again.trace == read_header(tmp_path / "t.jsonl").source
    (tmp_path / "t.jsonl").unlink()
    assert LiveRun(tmp_path, PACE).trace == "t.jsonl"


def test_a_step_with_a_cold_start_and_the_warm_up_do_not_count(tmp_path: Path) -> None:
    run = live_run(tmp_path)
    assert run.cold == (3,)
    assert run.counted == (2,)
    assert not run.is_void


def test_costs_are_what_the_run_took(tmp_path: Path) -> None:
    costs = calibrate(live_run(tmp_path))
    assert costs.wake_s == pytest.approx(0.6)  # lease at 0.4, first iteration at 1.0
    assert costs.park_s == pytest.approx(0.2)  # last iteration until 4.0, released at 4.2
    assert costs.grant_s == pytest.approx((0.1 + 0.3) / 2)  # left at 0.3, leases at 0.4; trainer's at 4.3
    assert costs.publish_s == pytest.approx(0.3 + 0.3)
    assert costs.hybrid_wake_s == pytest.approx(0.5)
    assert costs.hybrid_sleep_s == pytest.approx(7.0 - 4.0 - 2.5)


def test_a_run_without_a_step_that_counts_is_refused_in_words(tmp_path: Path) -> None:
    run = live_run(tmp_path)
    lone = LiveRun(run.folder, run.pace)
    lone.__dict__["arms"] = {name: {1: steps[1], 3: steps[3]} for name, steps in run.arms.items()}
    with pytest.raises(DataError, match="no step counts"):
        calibrate(lone)


def test_phases_take_what_is_declared_and_the_measured_rest(tmp_path: Path) -> None:
    run = live_run(tmp_path)
    costs = calibrate(run)
    trainer = calibrated(run.settings.planning_pool(), PACE, costs).trainer
    data = run.data[1]
    tokens = int(data.batch.prompt_tokens.sum() + data.lengths.sum())
    simulated_s = trainer.inference_s(tokens, 25.0) + trainer.update_s(tokens, 25.0)
    assert simulated_s == pytest.approx(declared_phases_s(PACE, data, 4) + 2 * costs.phase_s, rel=1e-3)
    assert simulated_s == pytest.approx(2.5, rel=1e-3)  # as long as the run's own


def test_both_arms_are_foretold_with_the_runs_own_settings(tmp_path: Path) -> None:
    run = live_run(tmp_path)
    costs = calibrate(run)
    found = predict(run, costs)
    assert set(found) == {"stock", "elastic"}
    stock, elastic = found["stock"][2], found["elastic"][2]
    assert stock["gpu_s"] == pytest.approx(4 * stock["step_s"])
    rollout_s = stock["step_s"] - costs.hybrid_sleep_s - 2.5
    assert rollout_s / POLL_S == pytest.approx(round(rollout_s / POLL_S), abs=1e-3)
    assert elastic["gpu_s"] < 4 * elastic["step_s"], "replicas and trainer lease what they use"
    assert "resident" not in elastic["fleet"]


def test_slower_wakes_lengthen_only_the_elastic_arm(tmp_path: Path) -> None:
    run = live_run(tmp_path)
    costs = calibrate(run)
    usual, slow = predict(run, costs), predict(run, replace(costs, wake_s=costs.wake_s + 2.0))
    assert slow["stock"] == usual["stock"]
    assert slow["elastic"][2]["step_s"] == pytest.approx(usual["elastic"][2]["step_s"] + 2.0, abs=0.6)


def step(step_s: float, gpu_s: float) -> LiveStep:
    return LiveStep(step_s, 5.0, gpu_s, 2.0, 0.3, 0.5, 4.0)


@pytest.mark.parametrize(
    ("factor", "is_median_met", "is_ratio_met"), [(1.0, True, True), (1.1, True, False), (1.2, False, False)]
)
def test_the_limits_decide(factor: float, is_median_met: bool, is_ratio_met: bool) -> None:
    measured = {
        "stock": {2: step(10.0, 40.0), 3: step(10.0, 40.0)},
        "elastic": {2: step(12.0, 30.0), 3: step(12.0, 30.0)},
    }
    predicted = {
        name: {n: {"step_s": one.step_s * scale, "gpu_s": one.gpu_s * scale, "fleet": ""} for n, one in steps.items()}
        for (name, steps), scale in zip(measured.items(), (1.0, factor), strict=True)
    }
    found = compare(predicted, measured)
    assert (found["is_median_error_met"], found["is_ratio_met"]) == (is_median_met, is_ratio_met)
    assert found["elastic_over_stock"]["step_s"]["error_points"] == pytest.approx(120 * (factor - 1))
    assert found["arms"]["elastic"]["median_error"]["gpu_s"] == pytest.approx(factor - 1)


def test_a_reader_sees_every_step_and_the_plot(tmp_path: Path) -> None:
    measured = {"stock": {2: step(10.0, 40.0)}, "elastic": {2: step(12.0, 30.0)}}
    exact = {name: {2: {"step_s": s[2].step_s, "gpu_s": s[2].gpu_s, "fleet": ""}} for name, s in measured.items()}
    one = {"calibrated_on": "A", "predicted": "B", **compare(exact, measured)}
    assert "15% met, 5 points met" in told(one)
    draw([one], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
