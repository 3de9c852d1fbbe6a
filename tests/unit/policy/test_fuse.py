"""Fusion: freed GPUs work on finished samples when the shorter step is worth more than what it costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.sim.cases import cell, steps
from verl_rlhfless.policy.fuse import fits, fuse_gpus
from verl_rlhfless.policy.snapshot import FINISHED, READY, RUNNING, ReplicaView, RolloutView
from verl_rlhfless.policy.transitions import RECIPES

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
    return RolloutView(30.0, batch, pool, DATA[0].lengths, state, replica_of, (one,), free, done, 0)


def test_gpus_are_given_back_when_a_second_is_worth_little_and_fuse_when_it_is_worth_much() -> None:
    assert fuse_gpus(view(), remaining_s=40.0, price=0.01, is_leased=False) == 0
    assert fuse_gpus(view(), remaining_s=40.0, price=100.0, is_leased=False) > 0


def test_gpus_that_are_paid_for_anyway_fuse_at_any_price() -> None:
    assert fuse_gpus(view(), remaining_s=40.0, price=0.01, is_leased=True) > 0


@pytest.mark.parametrize("remaining_s", [0.0, 1.0])
def test_nothing_is_loaded_for_a_tail_that_ends_before_the_models_are_there(remaining_s: float) -> None:
    assert fuse_gpus(view(), remaining_s, price=100.0, is_leased=False) == 0


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
