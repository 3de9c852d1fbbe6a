"""The lower bounds: nothing beats them, and less time never costs less."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from tests.unit.sim.cases import cell, steps
from verl_rlhfless.policy.baselines.stock import StockSync
from verl_rlhfless.policy.layers import Window
from verl_rlhfless.policy.shapes import MODELS
from verl_rlhfless.policy.transitions import RECIPES
from verl_rlhfless.sim.bound import _reads, step_bound

LONG = steps(1, 64, 8, mean=2000.0, cap=16384)


def test_less_time_never_costs_less() -> None:
    one = cell(LONG)
    fastest_s = step_bound(one.pool, LONG[0]).step_s
    limits = [math.inf, *(fastest_s * factor for factor in (8.0, 3.0, 1.5, 1.1))]
    costs = [step_bound(one.pool, LONG[0], limit_s).gpu_s for limit_s in limits]
    assert all(later >= earlier for earlier, later in pairwise(costs))
    assert costs[-1] > costs[0]


def test_no_static_fleet_costs_less_than_the_bound_for_its_own_time() -> None:
    one = cell(LONG)
    for tp in one.pool.perf:
        step = one.run(StockSync(tp)).steps[0]
        assert step.gpu_s_allocated >= step_bound(one.pool, LONG[0], step.step_s).gpu_s


def test_no_elastic_fleet_costs_less_than_the_bound_for_its_own_time() -> None:
    one = cell(LONG)
    for name in ("ours", "oracle", "oracle_prompts", "rlhfless_paper"):
        step = one.run(one.arm(name)).steps[0]
        assert step.gpu_s_allocated >= step_bound(one.pool, LONG[0], step.step_s).gpu_s


def test_turns_whose_first_token_a_prefill_yields_lower_the_bound() -> None:
    one, step = cell(LONG), LONG[0]
    ends = {sample: (*range(4, length, 4), length) for sample, length in enumerate(step.lengths.tolist())}
    turns = replace(step, turn_ends=ends)
    plain, cut = (step_bound(one.pool, each) for each in (step, turns))
    assert cut.step_s < plain.step_s and cut.gpu_s < plain.gpu_s


def test_prompts_without_tokens_have_a_bound() -> None:
    step = replace(LONG[0], batch=replace(LONG[0].batch, prompt_tokens=np.zeros_like(LONG[0].lengths)))
    one = cell((step,))
    for limit_s in (math.inf, 100.0):
        bound = step_bound(one.pool, step, limit_s)
        assert 0 < bound.gpu_s < step_bound(one.pool, LONG[0], limit_s).gpu_s


@pytest.mark.parametrize(("prompt", "length"), [(10, 5), (10, 400), (90, 200), (99, 1), (100, 1), (500, 300)])
def test_reads_behind_a_window_are_left_out(prompt: int, length: int) -> None:
    shape = replace(MODELS["qwen2.5-7b"], window=Window(100, 21))
    contexts = prompt + np.arange(1, length + 1)
    exact = float(shape.attended(contexts).sum())
    found = float(_reads(shape, np.array([prompt]), np.array([float(length)]))[0])
    assert found <= exact and found == pytest.approx(exact, rel=0.02, abs=1.0 * length)


def test_every_phase_of_the_recipe_is_paid_at_the_lowest_price() -> None:
    one, step = cell(LONG), LONG[0]
    pools = {
        name: replace(one.pool, trainer=replace(one.pool.trainer, recipe=RECIPES[name]))
        for name in ("grpo", "grpo-rm", "ppo-rm")
    }
    bounds = {name: step_bound(pool, step) for name, pool in pools.items()}
    tokens = int(step.batch.prompt_tokens.sum() + step.lengths.sum())
    context = tokens / step.batch.num_samples
    pass_gpu_s = tokens / pools["grpo-rm"].trainer.fuse_tokens_per_s(context) / 3
    reward_gpu_s = bounds["grpo-rm"].gpu_s - bounds["grpo"].gpu_s
    assert 0.75 * pass_gpu_s <= reward_gpu_s <= pass_gpu_s
    critic_s = pools["grpo"].trainer.update_s(tokens, context)
    assert bounds["ppo-rm"].step_s - bounds["grpo-rm"].step_s == pytest.approx(critic_s)
    critic_gpu_s = bounds["ppo-rm"].gpu_s - bounds["grpo-rm"].gpu_s
    assert critic_gpu_s == pytest.approx(reward_gpu_s + critic_s * one.pool.trainer.num_gpus)
