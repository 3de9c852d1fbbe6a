"""Our arm's memory: what a step teaches beside lengths."""

from __future__ import annotations

from dataclasses import replace

from tests.unit.sim.cases import cell, steps
from verl_rlhfless.policy.arm import Outcome
from verl_rlhfless.policy.ours import Memory, Ours

DATA = steps(1, 64, 8, mean=2000.0, cap=16384)
ARM = Ours()


def after(factor: float, *, is_resident: bool = False) -> Memory:
    """Return the memory after a step that took ``factor`` times what was predicted."""
    one = cell(DATA)
    memory = ARM.begin(one.pool, DATA[0].batch)
    plan = ARM.plan(memory, replace(one.pool, warm=dict.fromkeys(one.pool.perf, 16)), DATA[0].batch)
    static_s = 50.0
    plan = replace(plan, is_resident=is_resident, static_step_s=static_s, predicted_step_s=static_s)
    base = ARM.learn(memory, Outcome(DATA[0].batch, DATA[0].lengths, 0.0, 0.0)).saved_s
    return ARM.learn(memory, Outcome(DATA[0].batch, DATA[0].lengths, factor * base, 1.0, plan))


def test_an_elastic_step_that_took_longer_than_predicted_makes_the_next_plan_careful() -> None:
    assert after(1.3).caution > after(1.1).caution > after(0.9).caution == 1.0


def test_a_resident_step_says_nothing_about_elastic_ones() -> None:
    assert after(1.3, is_resident=True).caution == 1.0


def test_seconds_saved_and_lost_are_kept() -> None:
    assert after(0.8).saved_s > 0 > after(1.2).saved_s
