"""Groups that share a prefix go where it is computed already, while that saves more time than uneven load costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.policy.paced import POOL
from tests.unit.sim.cases import cell, steps
from verl_rlhfless.policy import lane_placement
from verl_rlhfless.policy.affinity import affine_groups
from verl_rlhfless.policy.dispatch import balanced_groups
from verl_rlhfless.policy.ours import Ours
from verl_rlhfless.policy.predict import LengthModel
from verl_rlhfless.policy.routing import Routing
from verl_rlhfless.policy.snapshot import Batch, SharedPrefix
from verl_rlhfless.sim.workload import StepData

TASKS = 8


def tasks(step: StepData, prefix_tokens: int, names: int = TASKS) -> StepData:
    """Return the step with prompts of ``names`` tasks that begin with the task's description."""
    shared = tuple(SharedPrefix(f"t{g % names}", prefix_tokens) for g in range(len(step.batch.prompt_ids)))
    prompt_tokens = step.batch.prompt_tokens + prefix_tokens
    return replace(step, batch=replace(step.batch, prompt_tokens=prompt_tokens, prefixes=shared))


def num_homes(batch: Batch, replica_of: np.ndarray) -> float:  # type: ignore[type-arg]
    """Return on how many replicas a task lies in the mean."""
    task = np.array([prefix.name for prefix in batch.prefixes if prefix is not None])[batch.group_of]
    return float(np.mean([len(set(replica_of[task == name].tolist())) for name in set(task.tolist())]))


ONE = steps(1, 64, 4)[0]


def test_groups_of_a_task_stay_together_when_its_prefix_is_dear_and_spread_when_it_is_cheap() -> None:
    load = np.repeat(np.random.default_rng(1).uniform(300, 500, 64), 4)
    dear, cheap = (tasks(ONE, tokens).batch for tokens in (30_000, 8))
    homes = [num_homes(batch, affine_groups(batch, load, 8, 0.5)) for batch in (dear, cheap)]
    assert homes[0] < homes[1] / 2


def test_load_stays_even_when_all_share_one_prefix() -> None:
    batch = tasks(ONE, 8000, 1).batch
    counts = np.bincount(affine_groups(batch, np.full(256, 400.0), 8, 0.1))
    assert counts.max() - counts.min() <= 4


def test_without_shared_prefixes_nothing_changes() -> None:
    load = np.random.default_rng(0).random(256)
    expected = balanced_groups(ONE.batch, load, [1.0] * 8)
    assert (affine_groups(ONE.batch, load, 8, 0.5) == expected).all()


def test_a_group_that_is_too_heavy_is_split_all_the_same() -> None:
    batch = tasks(steps(1, 2, 8)[0], 100).batch
    load = np.where(batch.group_of == 0, 1000.0, 1.0)
    assert len(set(affine_groups(batch, load, 4, 0.5)[:8].tolist())) > 2


def test_the_live_dispatcher_prices_a_shared_prefix_too() -> None:
    batch = tasks(steps(1, 16, 4)[0], 3000, 4).batch
    placed = Routing((1,) * 4).plan(LengthModel(level=4.0), POOL, replace(batch, max_response_tokens=400)).replica_of
    assert num_homes(batch, placed) < 2.0


def test_a_simulated_step_is_faster_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents: 16 environments of 12,000 tokens, short answers."""
    data = tuple(tasks(step, 12_000, 16) for step in steps(2, 64, 4, mean=60.0, cap=512))
    priced = cell(data).run(Ours(can_fuse=False)).steps[-1]
    monkeypatch.setattr(
        lane_placement, "affine_groups", lambda batch, load, num, _: balanced_groups(batch, load, [1.0] * num)
    )
    blind = cell(data).run(Ours(can_fuse=False)).steps[-1]
    assert blind.prefill_tokens > 1.5 * priced.prefill_tokens > priced.distinct_prompt_tokens
    assert priced.gen_s < 0.9 * blind.gen_s
