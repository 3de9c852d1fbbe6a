"""Fusion: freed GPUs work on finished samples when the shorter step is worth more than what it costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.sim.cases import cell, steps
from verl_rlhfless.policy.baselines.rlhfuse import RlhfuseCut
from verl_rlhfless.policy.fuse import CallCost, fit_cost, fits, fuse_gpus, next_chunk
from verl_rlhfless.policy.snapshot import FINISHED, READY, RUNNING, IntArray, ReplicaView, RolloutPlan, RolloutView
from verl_rlhfless.policy.transitions import RECIPES, TrainerPerf

DATA = steps(1, 64, 8, mean=2000.0, cap=16384)
ONE = cell(DATA)


def view(recipe: str = "grpo", free: int = 12) -> RolloutView:
    """Return a rollout of which one sample in eight still runs, and ``free`` GPUs have nothing to do."""
    batch = DATA[0].batch
    state = np.where(np.arange(batch.num_samples) % 8 == 0, RUNNING, FINISHED).astype(np.int8)
    pool = replace(ONE.pool, trainer=replace(ONE.pool.trainer, recipe=RECIPES[recipe]))
    replica_of = np.zeros(batch.num_samples, dtype=np.int64)
    done = int((batch.prompt_tokens + DATA[0].lengths)[state == FINISHED].sum())
    one = ReplicaView(0, 4, READY, 0, 64, 64 * 2000)
    count = int((state == FINISHED).sum())
    return RolloutView(30.0, batch, pool, DATA[0].lengths, state, replica_of, (one,), free, done, count, 0, free)


def test_gpus_are_given_back_when_a_second_is_worth_little_and_fuse_when_it_is_worth_much() -> None:
    assert fuse_gpus(view(), remaining_s=40.0, price=0.01, is_leased=False) == 0
    assert fuse_gpus(view(), remaining_s=40.0, price=100.0, is_leased=False) > 0


def test_gpus_that_are_paid_for_anyway_all_fuse_at_any_price() -> None:
    assert fuse_gpus(view(), remaining_s=40.0, price=0.01, is_leased=True) == 12
    assert fuse_gpus(view(), remaining_s=0.1, price=0.01, is_leased=True) == 0


def test_inference_takes_no_free_gpu_that_it_would_not_get() -> None:
    some = replace(view(), fusible_gpus=2)
    assert fuse_gpus(some, remaining_s=40.0, price=100.0, is_leased=False) == 2
    assert fuse_gpus(replace(some, fusible_gpus=0), remaining_s=40.0, price=100.0, is_leased=False) == 0


def test_the_more_gpus_infer_already_the_fewer_begin() -> None:
    begin = [fuse_gpus(replace(view(), fusing_gpus=gpus), 40.0, 100.0, is_leased=False) for gpus in (0, 2, 64)]
    assert begin[0] > begin[1] > begin[2] == 0


def test_rlhfuse_infers_on_every_gpu_that_its_cut_frees() -> None:
    reaction = RlhfuseCut(share=0.2, num_targets=1).react(
        view(), RolloutPlan((4,), *[view().replica_of] * 2, True, True)
    )
    assert reaction.fuse_gpus == 12
    late = replace(view(), fuse_tokens=0)
    assert (
        not RlhfuseCut(share=0.2, num_targets=1)
        .react(late, RolloutPlan((4,), *[late.replica_of] * 2, True, True))
        .fuse_gpus
    )


@pytest.mark.parametrize("remaining_s", [0.0, 1.0])
def test_nothing_is_loaded_for_a_tail_that_ends_before_the_models_are_there(remaining_s: float) -> None:
    assert fuse_gpus(view(), remaining_s, price=100.0, is_leased=False) == 0


def test_speed_follows_the_context_of_the_samples_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    speed = TrainerPerf.fuse_tokens_per_s

    def spied(trainer: TrainerPerf, mean_context: float) -> float:
        seen.append(mean_context)
        return speed(trainer, mean_context)

    monkeypatch.setattr(TrainerPerf, "fuse_tokens_per_s", spied)
    fuse_gpus(replace(view(), fuse_tokens=40_000, fuse_samples=2), 40.0, 100.0, is_leased=False)
    assert seen == [20_000]


def test_a_reward_model_is_more_to_do_and_more_to_load() -> None:
    rule, model = view("grpo"), view("grpo-rm")
    assert model.pool.trainer.fuse_load_s > rule.pool.trainer.fuse_load_s
    assert fuse_gpus(model, 40.0, 100.0, is_leased=False) >= fuse_gpus(rule, 40.0, 100.0, is_leased=False)


def test_models_that_do_not_fit_on_one_gpu_together_are_not_fused() -> None:
    small = replace(ONE.pool.trainer.gpu, memory_bytes=16e9)  # holds two models of 6.2 GB, not four
    for recipe, is_possible in (("grpo", True), ("ppo-rm", False)):
        pool = view(recipe).pool
        pool = replace(pool, trainer=replace(pool.trainer, gpu=small))
        assert fits(pool) == is_possible
        chosen = fuse_gpus(replace(view(recipe), pool=pool), 40.0, 100.0, is_leased=False)
        assert (chosen > 0) == is_possible


def test_the_cost_of_calls_is_a_part_for_each_call_and_one_for_each_token() -> None:
    cost = fit_cost([(100, 1.2), (400, 1.8), (1000, 3.0)])
    assert (cost.call_s, cost.token_s) == pytest.approx((1.0, 0.002))


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([(100, 0.5)], (0.0, 0.005)),
        ([(100, 0.4), (100, 0.6)], (0.0, 0.005)),
        ([(100, 9.0), (400, 1.0)], (0.0, 0.02)),
        ([(100, 0.1), (200, 0.4)], (0.0, 0.5 / 300)),
    ],
    ids=["one call", "one size", "a slow first call", "no fixed part"],
)
def test_no_part_of_a_cost_is_negative(calls: list[tuple[int, float]], expected: tuple[float, float]) -> None:
    cost = fit_cost(calls)
    assert (cost.call_s, cost.token_s) == pytest.approx(expected)


COST = CallCost(call_s=0.5, token_s=0.001)
TEN = np.full(10, 1000)


@pytest.mark.parametrize(
    ("tokens", "remaining_s", "count"),
    [
        (TEN, 100.0, 8),
        (TEN[:3], 100.0, 0),
        (TEN, 5.0, 4),
        (TEN, 4.4, 4),
        (TEN, 0.6, 4),
        (TEN, 0.5, 0),
        (TEN, 0.0, 0),
    ],
    ids=[
        "all that fill whole quanta",
        "too few for one",
        "as many as end in time",
        "one quantum that ends 0.1 s late",
        "one that is little more than begun",
        "no gain over the call itself",
        "the rollout is over",
    ],
)
def test_a_chunk_ends_with_the_rollout_or_saves_more_than_its_call(
    tokens: IntArray, remaining_s: float, count: int
) -> None:
    assert next_chunk(tokens, 4, COST, remaining_s) == count


def test_the_smallest_chunk_measures_an_unknown_cost() -> None:
    assert next_chunk(TEN, 4, None, 100.0) == 4
    assert next_chunk(TEN, 4, None, 0.0) == 0
