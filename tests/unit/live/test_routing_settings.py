"""What a configuration means for the router: which policy, and what it believes of the replicas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.demo.test_workload import write_trace
from verl_rlhfless.config import parse_config
from verl_rlhfless.errors import ConfigError
from verl_rlhfless.live.announcement import Announcement, Group
from verl_rlhfless.live.pacing import PaceModel
from verl_rlhfless.live.routing_settings import RoutingSettings
from verl_rlhfless.policy.perf import EngineLimits

STEP = Announcement(1, (Group("u0", "p0", 0, 2, 9), Group("u1", "p1", 1, 2, 9)), 100)
DENSE = {
    "num_attention_heads": 16, "hidden_size": 2048, "num_key_value_heads": 2, "num_hidden_layers": 36,
    "intermediate_size": 11008, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip


def settings(
    pace: PaceModel | None = None, resources: tuple[str, ...] = (), model: Any = DENSE, **parts: dict[str, Any]
) -> RoutingSettings:
    config = parse_config({"pool": {"name": "resident"}, **parts})
    return RoutingSettings(config, 2, 8, EngineLimits(64, 8192), 100, model, pace, resources)


def test_the_arm_has_the_chosen_parts_and_the_fleet_that_is_there() -> None:
    arm = settings(
        dispatcher={"name": "random", "seed": 7},
        migration={"name": "rlhfuse", "tau": 0.6},
        prefix_dedup={"name": "on"},
        predictor={"name": "history"},
    ).arm(STEP, (2, 2, 2))
    assert (arm.fleet, arm.dispatcher, arm.seed, arm.migration, arm.tau) == ((2, 2, 2), "random", 7, "rlhfuse", 0.6)
    assert arm.keeps_groups and arm.learns and arm.is_resident and arm.truth is None


def test_an_elastic_fleet_is_not_resident() -> None:
    elastic = {"pool": {"name": "elastic"}, "weights": {"name": "store"}, "planner": {"name": "fixed"}}
    assert not settings(**elastic).arm(STEP, (2,)).is_resident


def test_the_oracle_reads_the_lengths_that_are_replayed(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.jsonl", {"a": [1000, 400], "b": [10, 20]})
    oracle = settings(predictor={"name": "oracle"}, replay={"trace": str(trace), "scale": 0.1})
    truth = oracle.arm(STEP, (2,)).truth
    assert truth is not None and truth.tolist() == [100, 40, 1, 2]


def test_a_paced_run_believes_what_is_declared_even_on_a_gpu() -> None:
    pool = settings(PaceModel(60.0, tp_speedup={2: 2.0}), ("accelerator_type:H100",)).pool((2,) * 4)
    assert pool.perf[2].iteration_s(1, 10) == pytest.approx(0.030, rel=1e-3)
    assert (pool.num_gpus, pool.gpus_per_node) == (8, 8)


def test_a_gpu_is_known_by_its_name_and_the_models_shape() -> None:
    perf = settings(resources=("accelerator_type:H100",), dispatcher={"name": "length_bucket"}).pool((2,) * 4).perf[2]
    assert perf.gpu.name == "H100" and perf.shape.hidden == 2048


def test_a_model_without_a_price_is_refused_unless_nothing_asks_for_one() -> None:
    latent = {**DENSE, "kv_lora_rank": 8}
    resources = ("accelerator_type:H100",)
    with pytest.raises(ConfigError, match=r"rlhfless\.dispatcher\.name='length_bucket'.*latent.*dispatcher=stock"):
        settings(None, resources, latent, dispatcher={"name": "length_bucket"}).pool((2,))
    assert settings(None, resources, latent).pool((2,)).perf[2]


PLANNED = {
    "pool": {"name": "elastic"},
    "weights": {"name": "store"},
    "planner": {"name": "cost_aware"},
    "predictor": {"name": "history"},
}
LARGE = {
    "num_attention_heads": 64, "hidden_size": 8192, "num_key_value_heads": 8, "num_hidden_layers": 80,
    "intermediate_size": 28672, "vocab_size": 32000,
}  # fmt: skip


def planned(
    planner: dict[str, Any], pace: PaceModel | None = None, model: Any = DENSE, replica_gpus: int = 8
) -> RoutingSettings:
    config = parse_config({**PLANNED, "planner": {"name": "cost_aware", **planner}})
    resources = () if pace else ("accelerator_type:H100",)
    return RoutingSettings(config, 2, 8, EngineLimits(64, 8192), 100, model, pace, resources, 8, replica_gpus)


def test_a_plan_may_lease_what_the_trainer_leaves() -> None:
    pool = planned({}).planning_pool()
    assert (pool.num_gpus, pool.trainer.num_gpus, pool.keeps_trainer) == (8, 8, True)
    assert sorted(pool.perf) == [1, 2, 4, 8] and not pool.warm


@pytest.mark.parametrize(
    ("keeps", "share", "may"), [(False, "auto", True), (False, "never", False), (True, "auto", False)]
)
def test_a_plan_may_share_the_gpus_of_a_trainer_that_could_leave(keeps: bool, share: str, may: bool) -> None:
    config = parse_config({**PLANNED, "pool": {"name": "elastic", "share_trainer": share}})
    pool = replace(planned({}), config=config, keeps_trainer=keeps).planning_pool()
    assert pool.has_resident is may


def test_sizes_that_do_not_hold_the_model_or_are_not_declared_are_left_out() -> None:
    assert sorted(planned({}, model=LARGE).planning_pool().perf) == [4, 8]
    assert sorted(planned({}, PaceModel(60.0, tp_speedup={2: 1.6})).planning_pool().perf) == [1, 2]


def test_a_small_gpu_of_a_type_holds_the_model_at_fewer_sizes() -> None:
    small = replace(planned({}, model=LARGE), resources=("accelerator_type:A100",), device_bytes=42_400_000_000)
    assert sorted(replace(small, device_bytes=0).planning_pool().perf) == [4, 8]
    assert sorted(small.planning_pool().perf) == [8]


def test_a_size_that_was_asked_for_and_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel_sizes=\[3\]: 3 must be at most 8 GPUs.*Possible: \[1, 2"):
        planned({"tensor_parallel_sizes": [3]}).planning_pool()
    with pytest.raises(ConfigError, match="leave no KV cache"):
        planned({"tensor_parallel_sizes": [1]}, model=LARGE).planning_pool()
    with pytest.raises(ConfigError, match="declare tp_speedup"):
        planned({"tensor_parallel_sizes": [4]}, PaceModel(60.0)).planning_pool()


@pytest.mark.parametrize("planner", [{}, {"tensor_parallel_sizes": [2]}])
def test_a_trainer_that_keeps_every_gpu_is_told_of_the_way_that_needs_no_more(planner: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"no GPU of the cluster .* trainer's 8, which it keeps.*\+rlhfless=resident"):
        planned(planner, replica_gpus=0).planning_pool()


def test_a_budget_in_money_is_one_in_gpu_seconds() -> None:
    goal = planned({"max_usd_per_step": 0.5, "usd_per_gpu_hour": 3.6}).goal()
    assert goal.max_gpu_s == pytest.approx(500.0) and goal.usd_per_gpu_s == pytest.approx(0.001)
