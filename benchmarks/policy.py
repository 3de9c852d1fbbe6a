"""Milliseconds of the policies on one core, against their budgets.

python -m benchmarks.policy          # about 1 minute; writes benchmarks/results/policy.json
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks import command
from benchmarks.record import write_result
from verl_rlhfless.policy.dedup import dedup
from verl_rlhfless.policy.elastic import Resizing
from verl_rlhfless.policy.fusion_cut import cut_for_inference
from verl_rlhfless.policy.plan import Goal, plan_fleet
from verl_rlhfless.policy.predict import LengthModel, learn, predict, refine
from verl_rlhfless.policy.routing import Routing
from verl_rlhfless.policy.shapes import MODELS
from verl_rlhfless.policy.snapshot import (
    FINISHED,
    READY,
    RUNNING,
    WAITING,
    Batch,
    PoolSnapshot,
    ReplicaView,
    RolloutView,
)
from verl_rlhfless.policy.transitions import LeaseTimes
from verl_rlhfless.sim.cell import make_pool
from verl_rlhfless.sim.cluster import CLUSTERS
from verl_rlhfless.sim.workload import StepData


def step(groups: int, n: int, seed: int = 0) -> StepData:
    """Return one step with a heavy tail."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.exp(rng.normal(6.8, 1.0, groups * n)), 1, 32768).astype(np.int64)
    names = tuple(f"p{i}" for i in range(groups))
    return StepData(Batch(1, names, np.repeat(np.arange(groups), n), np.full(groups * n, 250), 32768), lengths)


def pool_of(cluster: str) -> PoolSnapshot:
    """Return a pool whose engines are all warm."""
    pool = make_pool(CLUSTERS[cluster], MODELS["qwen2.5-7b"], LeaseTimes())
    return replace(pool, warm=dict.fromkeys(pool.perf, pool.num_gpus))


def median_ms(work: Callable[[], object], repeats: int) -> dict[str, float]:
    """Return median and worst milliseconds of CPU time."""
    taken = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        taken.append((time.process_time() - began) * 1e3)
    return {"median_ms": round(statistics.median(taken), 2), "worst_ms": round(max(taken), 2), "repeats": repeats}


def planning() -> dict[str, float]:
    """Plan 1,024 groups x 16 on 160 GPUs, prediction included."""
    data, pool = step(1024, 16), pool_of("h100-160")
    model = learn(LengthModel(), data.batch, data.lengths)
    return median_ms(lambda: plan_fleet(pool, data.batch, predict(model, data.batch), Goal()), 15)


def rollout(groups: int, n: int, cluster: str, goal: Goal, share_waiting: float = 0.0) -> tuple[Any, ...]:
    """Return plan, memory, prior and view of a rollout at about half of its lengths; a share of its groups waits."""
    data, pool = step(groups, n), pool_of(cluster)
    model = learn(LengthModel(), data.batch, data.lengths)
    prior = predict(model, data.batch)
    plan = plan_fleet(pool, data.batch, prior, goal)
    depth = int(np.median(data.lengths))
    waits = data.batch.group_of < groups * share_waiting
    reached = depth - np.random.default_rng(0).integers(0, depth // 2, len(data.lengths))  # none begin at one moment
    generated = np.where(waits, 0, np.minimum(data.lengths, reached))
    state = np.where(waits, WAITING, np.where(data.lengths <= reached, FINISHED, RUNNING)).astype(np.int8)
    waiting, running = (np.bincount(plan.replica_of[state == s], minlength=len(plan.fleet)) for s in (WAITING, RUNNING))
    replicas = tuple(
        ReplicaView(r, tp, READY, int(waiting[r]), int(running[r]), int(running[r]) * depth)
        for r, tp in enumerate(plan.fleet)
    )
    free = pool.num_gpus - sum(plan.fleet)
    view = RolloutView(9.0, data.batch, pool, generated, state, plan.replica_of, replicas, free, 10**6, 10**3, 0)
    return plan, model, prior, view


def resident_tick(groups: int, n: int, cluster: str) -> dict[str, float]:
    """One look at a rollout beside the trainer: lengths refined, then every cut for inference on its GPUs priced."""
    plan, model, prior, view = rollout(groups, n, cluster, Goal(payback=1e9))
    assert plan.is_resident
    finished = (view.state == FINISHED).astype(float)

    def look() -> None:
        cut_for_inference(view, refine(model, prior, view.batch, view.generated, finished))

    return median_ms(look, 15)


def tick(groups: int, n: int, cluster: str, share_waiting: float) -> dict[str, float]:
    """One look of a live run at leased replicas: lengths, what waits, what runs, then the fleet itself."""
    plan, model, _, view = rollout(groups, n, cluster, Goal(), share_waiting)
    assert not plan.is_resident
    routing = Routing(plan.fleet, migration="cut_and_migrate", is_resident=False)
    policy = Resizing(routing.policy(model, view.batch), Goal())
    return median_ms(lambda: policy.react(view, plan), 15)


def dispatching(groups: int, n: int, cluster: str) -> dict[str, float]:
    """Place a batch on idle replicas, as is done where no plan of lanes fits the replicas that came."""
    plan, model, _, view = rollout(groups, n, cluster, Goal())
    arm = Routing(plan.fleet, is_resident=False)
    return median_ms(lambda: arm.plan(model, view.pool, view.batch), 15)


def deduplicating() -> dict[str, float]:
    """Radix dedup of 1,024 x 1,024 tokens: 256 distinct prompts, 4 samples each, one system prompt."""
    rng = np.random.default_rng(0)
    system = rng.integers(0, 150_000, 256)
    prompts = [np.concatenate((system, rng.integers(0, 150_000, 768))) for _ in range(256)]
    return median_ms(lambda: dedup([p for p in prompts for _ in range(4)]), 15)


def main() -> None:
    """Measure everything once: milliseconds of CPU time of one process."""
    found = {
        "plan_1024x16_on_160": planning() | {"budget_ms": 30},
        "dispatch_1024x16_on_160": dispatching(1024, 16, "h100-160") | {"budget_ms": 30},
        "tick_128x8_on_16": tick(128, 8, "h100-16", 0.0) | {"budget_ms": 10},
        "tick_1024x16_on_160": tick(1024, 16, "h100-160", 0.0) | {"budget_ms": 10},
        "tick_1024x16_on_160_half_waiting": tick(1024, 16, "h100-160", 0.5) | {"budget_ms": 10},
        "resident_tick_1024x16_on_160": resident_tick(1024, 16, "h100-160") | {"budget_ms": 10},
        "dedup_1024x1024": deduplicating() | {"budget_ms": 50},
    }
    write_result("policy", found, command="python -m benchmarks.policy")


if __name__ == "__main__":
    command.run(main, __doc__)
