"""One GPU does one thing: inference beside a rollout takes what it can get, and turns stay off its GPUs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import simpy

from tests.unit.sim.cases import cell, steps
from verl_rlhfless.policy.baselines.rlhfless_paper import History, RlhflessPaper
from verl_rlhfless.policy.baselines.stock import StockSync
from verl_rlhfless.policy.snapshot import RUNNING, WAITING, Batch, Reaction, RolloutPlan, RolloutView
from verl_rlhfless.sim.fused import FusedInference
from verl_rlhfless.sim.leases import Lease, LeaseBook
from verl_rlhfless.sim.rollout import SimRollout
from verl_rlhfless.sim.workload import StepData


class _Greedy:
    """Infers on every GPU that it is told it may."""

    def react(self, view: RolloutView, plan: RolloutPlan) -> Reaction:
        return Reaction(view.now_s + 1.0, fuse_gpus=view.fusible_gpus if view.fuse_tokens else 0)


@dataclass(frozen=True)
class _GreedyPaper(RlhflessPaper):
    def policy(self, memory: History, batch: Batch) -> _Greedy:  # type: ignore[override]
        return _Greedy()


def test_leased_inference_is_granted_and_ends_beside_preemptible_nodes() -> None:
    one = cell(steps(2, 64, 8, mean=2500.0, cap=16384), "h100-16-spot")
    record = one.run(_GreedyPaper(num_actors=4, tp=2))
    assert all(step.fused_tokens > 0 for step in record.steps)
    assert record.max_gpus <= 16


def test_nobody_waits_behind_inference_of_a_rollout_that_is_over() -> None:
    one, env = cell(steps(1, 4, 4)), simpy.Environment()
    book, granted = LeaseBook(env, one.cluster), list[Lease]()
    book.request_gpus("trainer", 4, granted.append, 0.0)
    inference = FusedInference(book, one.pool.trainer, None)
    inference.fuse(16)
    book.request_gpus("trainer", 12, granted.append, 0.1)
    env.run(until=1.0)
    assert len(granted) == 1
    inference.end()
    assert len(granted) == 2


@pytest.mark.parametrize(("num_fused", "num_used"), [(0, 4), (4, 3), (8, 2), (12, 1)])
def test_no_turn_goes_to_a_replica_whose_gpus_run_inference(num_fused: int, num_used: int) -> None:
    step = steps(1, 4, 4, mean=2000.0)[0]
    half = [(int(length) // 2, int(length)) for length in step.lengths]
    rollout = resident(replace(step, turn_ends=dict(enumerate(half))))
    env, replicas = rollout.env, rollout.replicas
    while not replicas.all[0].engine.decoding:
        env.step()
    if num_fused:
        rollout.fuse(num_fused)
    while not rollout.is_done():
        env.step()
        assert replicas.num_working_gpus + rollout.inference.num_gpus <= 16
    assert sum(bool(replica.engine.prefill_tokens) for replica in replicas.all) == num_used


def resident(step: StepData) -> SimRollout:
    """Return a rollout on the trainer's 16 GPUs, 4 replicas of which the first has every sample."""
    one, arm, env = cell((step,)), StockSync(4), simpy.Environment()
    everything = np.zeros(step.batch.num_samples, dtype=np.int64)
    plan = replace(arm.plan(4, one.pool, step.batch), replica_of=everything, rebinds_turns=True)
    rollout = SimRollout(LeaseBook(env, one.cluster), one.pool, step, plan, "trainer")
    rollout.start(plan.fleet)
    rollout.place(plan.order, 0)
    return rollout


def test_a_prompt_in_prefill_runs_and_one_in_the_queue_waits() -> None:
    step = steps(1, 64, 1)[0]
    step = replace(step, batch=replace(step.batch, prompt_tokens=np.full(64, 3000)))
    rollout = resident(step)
    while not rollout.replicas.all[0].engine.prefilling:
        rollout.env.step()
    view = rollout.observe()
    in_prefill = len(rollout.replicas.all[0].engine.prefilling)
    assert view.replicas[0].num_running == in_prefill > 0
    assert view.replicas[0].num_waiting == 64 - in_prefill
    assert [int((view.state == state).sum()) for state in (RUNNING, WAITING)] == [in_prefill, 64 - in_prefill]
