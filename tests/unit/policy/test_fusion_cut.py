"""The cut of a resident step's tail: fewer replicas decode when the inference on the others' GPUs saves more."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.sim.cases import cell, steps
from verl_rlhfless.policy.fusion_cut import Cuts, Inference, cut_for_inference, price_cuts
from verl_rlhfless.policy.goal import Goal
from verl_rlhfless.policy.migrate import Change
from verl_rlhfless.policy.ours import Ours
from verl_rlhfless.policy.prediction import exact
from verl_rlhfless.policy.snapshot import FINISHED, READY, RUNNING, PoolSnapshot, ReplicaView, RolloutView
from verl_rlhfless.policy.stages import Lane, depth_edges
from verl_rlhfless.policy.transitions import RECIPES
from verl_rlhfless.sim.run import ArmRun

DATA = steps(1, 64, 8, mean=500.0, cap=2048)
ONE = cell(DATA)
FLEET = (4, 4)
"""Replicas of four GPUs, four of them."""


def late(depth: int = 1400, *, pool: PoolSnapshot = ONE.pool, queued: int = 0) -> RolloutView:
    """Return a rollout of which everything shorter than ``depth`` has finished, on GPUs that are all in use."""
    batch, lengths = DATA[0].batch, DATA[0].lengths
    generated = np.minimum(lengths, depth)
    state = np.where(lengths <= depth, FINISHED, RUNNING).astype(np.int8)
    replica_of = np.arange(batch.num_samples, dtype=np.int64) % 4
    held = np.bincount(replica_of[state == RUNNING], minlength=4)
    replicas = tuple(ReplicaView(r, 4, READY, queued, int(held[r]), int(held[r]) * depth) for r in range(4))
    done = int((batch.prompt_tokens + lengths)[state == FINISHED].sum())
    count = int((state == FINISHED).sum())
    return RolloutView(30.0, batch, pool, generated, state, replica_of, replicas, 0, done, count, 0)


def cut(view: RolloutView) -> Change:
    return cut_for_inference(view, exact(DATA[0].lengths))


def test_the_tail_goes_to_the_fullest_replicas_and_every_sample_of_the_others_moves_once() -> None:
    view = late()
    change = cut(view)
    assert not change.starts and "for inference" in change.reason
    targets = {move.replica for move in change.moves}
    moved = np.concatenate([move.samples for move in change.moves])
    left = set(view.replica_of[moved].tolist())
    assert len(moved) == len(set(moved.tolist())) and not targets & left
    assert set(moved.tolist()) == set(view.alive[np.isin(view.replica_of[view.alive], list(left))].tolist())
    held = np.bincount(view.replica_of[view.alive], minlength=4)
    assert min(held[list({0, 1, 2, 3} - left)]) >= max(held[list(left)])
    assert change.remaining_s > 0


def test_nothing_is_cut_without_finished_samples_with_a_queue_or_on_one_replica() -> None:
    view = late()
    alone, over = np.zeros_like(view.replica_of), np.full_like(view.state, FINISHED)
    for one in (replace(view, fuse_tokens=0), late(queued=1), replace(view, replica_of=alone)):
        change = cut(one)
        assert not change.moves and not change.reason and change.remaining_s > 0
    assert cut(replace(view, state=over)) == Change(0.0)


def test_models_that_do_not_fit_on_one_gpu_cut_nothing() -> None:
    small = replace(ONE.pool.trainer.gpu, memory_bytes=16e9)
    trainer = replace(ONE.pool.trainer, gpu=small, recipe=RECIPES["ppo-rm"])
    assert not cut(late(pool=replace(ONE.pool, trainer=trainer))).moves


def test_a_tail_that_ends_before_the_models_are_loaded_is_not_cut() -> None:
    times = replace(ONE.pool.trainer.times, hybrid_sleep_s=1000.0)
    slow = replace(ONE.pool, trainer=replace(ONE.pool.trainer, times=times))
    assert cut(late()).moves and not cut(late(pool=slow)).moves


def lane(alive: list[float], context: float = 100.0) -> Lane:
    edges = depth_edges(8000)
    at = np.interp(np.arange(len(edges) - 1), np.linspace(0, len(edges) - 2, len(alive)), alive)
    return Lane(edges, at, context, 0.0, -np.expm1(-at), 0.0)


def test_a_cut_costs_the_tail_and_saves_inference_and_none_of_it_costs_and_saves_nothing() -> None:
    cuts = price_cuts(ONE.pool, lane([64.0, 16.0, 4.0, 1.0]), FLEET, Inference(512, 400_000, 400_000))
    assert cuts.counts.tolist() == [1, 2, 3, 4]
    assert (np.diff(cuts.rollout_s[0]) < 0).all(), "fewer replicas take longer"
    assert np.ptp(cuts.rollout_s[:, -1]) == pytest.approx(0.0) == np.ptp(cuts.total_s[:, -1])
    assert (cuts.rollout_s[-1] < cuts.rollout_s[0])[:3].all(), "late is less than early"
    assert (cuts.total_s > cuts.rollout_s).all() and cuts.saved_s > 0


def test_the_trainer_infers_afterwards_what_no_phase_has_taken() -> None:
    edges = depth_edges(8000)
    alive = np.full(len(edges) - 1, 8.0)
    eight = Lane(edges, alive, 100.0, 0.0, np.ones_like(alive), 0.0)  # 8 samples that end with 8,100 tokens
    mean = (400_000 + 8 * 8100) / 512
    for waiting in (0, 300_000, 400_000):
        cuts = price_cuts(ONE.pool, eight, FLEET, Inference(512, 400_000, waiting))
        after_s = cuts.total_s[0, -1] - cuts.rollout_s[0, -1]
        assert after_s == pytest.approx(ONE.pool.trainer.inference_s(8 * 8100 + waiting, mean))


def test_more_that_waits_makes_a_cut_pay_more() -> None:
    saved = [
        price_cuts(ONE.pool, lane([64.0, 4.0, 1.0]), FLEET, Inference(512, 800_000, waiting)).saved_s
        for waiting in (0, 100_000, 400_000, 800_000)
    ]
    assert saved == sorted(saved) and saved[0] < saved[-1]


def test_gpus_that_infer_already_leave_less_for_a_cut() -> None:
    saved = [
        price_cuts(ONE.pool, lane([64.0, 4.0, 1.0]), FLEET, Inference(512, 800_000, 800_000, 0, gpus)).saved_s
        for gpus in (0, 1, 64)
    ]
    assert saved[0] > saved[1] > saved[2] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("now_s", "later_s", "is_cut"), [(8.0, 7.9, True), (8.0, 5.0, False), (9.95, 9.95, False), (10.0, 10.0, False)]
)
def test_a_cut_waits_while_a_later_one_is_clearly_better_and_is_worth_something(
    now_s: float, later_s: float, is_cut: bool
) -> None:
    total_s = np.array([[now_s, 10.0], [later_s, 10.0]])
    assert Cuts(np.array([1, 2]), np.full((2, 2), 9.0), total_s).best_now() == (0 if is_cut else 1)


def test_resident_steps_end_earlier_with_the_cut_than_by_the_tuned_rule_of_rlhfuse_or_without_fusion() -> None:
    data = steps(3, 64, 8, mean=500.0, cap=2048)
    one = cell(data)
    pool = replace(one.pool, num_gpus=one.pool.trainer.num_gpus)

    def mean_s(arm: object) -> float:
        record = ArmRun(arm, one.cluster, pool, data).run()  # type: ignore[arg-type]
        assert all("resident" in step.fleet for step in record.steps)
        return float(np.mean([step.step_s for step in record.steps]))

    doubtful = Goal(payback=1e9)
    ours, plain = mean_s(Ours(doubtful)), mean_s(Ours(doubtful, can_fuse=False))
    assert ours < mean_s(one.arm("rlhfuse")) < plain
