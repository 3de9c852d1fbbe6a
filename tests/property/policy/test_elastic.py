"""Planned fleets and their changes stay inside their bounds, whatever the batch and whatever the view."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.property.policy.test_policies import POOL, batches, late_view
from verl_rlhfless.errors import ConfigError
from verl_rlhfless.policy.elastic import Resizing
from verl_rlhfless.policy.goal import Goal
from verl_rlhfless.policy.plan import plan_fleet
from verl_rlhfless.policy.predict import LengthModel, learn, predict
from verl_rlhfless.policy.routing import Routing
from verl_rlhfless.policy.snapshot import FINISHED, GONE, READY, RUNNING, WAITING, Batch, ReplicaView, RolloutView

BESIDE = replace(POOL, num_gpus=12, keeps_trainer=True, has_resident=False)


@settings(deadline=None, max_examples=40)
@given(batches(), st.floats(0, 1), st.integers(1, 4), st.integers(0, 4))
def test_a_fleet_beside_the_trainer_is_elastic_and_inside_its_limits(
    case: tuple[Batch, np.ndarray],  # type: ignore[type-arg]
    weight: float,
    least: int,
    more: int,
) -> None:
    batch, lengths = case
    prior = predict(learn(LengthModel(), batch, lengths), batch)
    plan = plan_fleet(BESIDE, batch, prior, Goal(weight, min_replicas=least, max_replicas=least + more))
    assert not plan.is_resident and not plan.is_static
    assert sum(plan.fleet) <= BESIDE.num_gpus and all(tp in BESIDE.perf for tp in plan.fleet)
    assert least <= len(plan.fleet) <= least + more
    assert plan.predicted_rollout_s is not None and plan.predicted_step_s is not None and plan.predicted_gpu_s
    assert 0 < plan.predicted_rollout_s < plan.predicted_step_s
    assert plan.predicted_gpu_s > BESIDE.trainer.num_gpus * plan.predicted_step_s, "the trainer pays all the time"


@settings(deadline=None, max_examples=30)
@given(batches(), st.integers(1, 16), st.integers(8, 16))
def test_a_trainer_that_leaves_may_be_smaller_than_a_replica(
    case: tuple[Batch, np.ndarray],  # type: ignore[type-arg]
    trainer_gpus: int,
    budget: int,
) -> None:
    batch, lengths = case
    prior = predict(learn(LengthModel(), batch, lengths), batch)
    pool = replace(POOL, num_gpus=budget, trainer=replace(POOL.trainer, num_gpus=trainer_gpus), has_resident=False)
    plan = plan_fleet(pool, batch, prior, Goal())
    assert not plan.is_resident and sum(plan.fleet) <= budget
    assert plan.static_step_s is not None and 0 < plan.static_step_s < float("inf")


@settings(deadline=None, max_examples=20)
@given(batches())
def test_more_weight_on_cost_never_costs_more(case: tuple[Batch, np.ndarray]) -> None:  # type: ignore[type-arg]
    batch, lengths = case
    prior = predict(learn(LengthModel(), batch, lengths), batch)
    fast, cheap = (plan_fleet(BESIDE, batch, prior, Goal(weight)) for weight in (0.0, 1.0))
    assert fast.predicted_step_s is not None and cheap.predicted_step_s is not None
    assert fast.predicted_gpu_s is not None and cheap.predicted_gpu_s is not None
    assert fast.predicted_step_s <= cheap.predicted_step_s * 1.01
    assert cheap.predicted_gpu_s <= fast.predicted_gpu_s * 1.01


@settings(deadline=None, max_examples=20)
@given(batches(), st.integers(13, 99))
def test_more_replicas_than_gpus_are_refused_in_one_line(
    case: tuple[Batch, np.ndarray],  # type: ignore[type-arg]
    least: int,
) -> None:
    batch, _ = case
    with pytest.raises(ConfigError, match=r"^rlhfless\.planner\.min_replicas=.*Lower it"):
        plan_fleet(BESIDE, batch, predict(LengthModel(), batch), Goal(min_replicas=least))


def look(seed: int) -> RolloutView:
    """Return a late rollout whose replicas are all up, an empty one among them; some samples may wait for the first."""
    view = late_view(seed)
    fleet = [*view.replicas, ReplicaView(len(view.replicas), 1, READY, 0, 0, 0)]
    ready = tuple(replace(r, state=READY) for r in fleet)
    waits = (view.state == RUNNING) & (view.replica_of < seed % 2) & (view.batch.group_of % 2 == 0)
    free = max(0, view.pool.num_gpus - sum(r.tp for r in ready))
    state = np.where(waits, WAITING, view.state).astype(np.int8)
    return replace(view, replicas=ready, free_gpus=free, state=state, generated=np.where(waits, 0, view.generated))


def test_a_look_ends_only_empty_replicas_and_starts_only_what_fits() -> None:
    seen: Counter[str] = Counter()

    def holds(seed: int) -> None:
        view, price = look(seed), 10 ** float(np.random.default_rng(seed).uniform(-1, 2.3))
        dispatcher = "stock" if seed % 4 == 0 else "length_bucket"
        arm = Routing(tuple(r.tp for r in view.replicas), dispatcher, "cut_and_migrate", is_resident=False)
        model = learn(LengthModel(), view.batch, np.maximum(view.generated, 1))
        plan = replace(arm.plan(model, view.pool, view.batch), price=price)
        policy = Resizing(arm.policy(model, view.batch), Goal())
        reaction = policy.react(view, plan)
        assert repr(reaction) == repr(policy.react(view, plan))
        meant = view.replica_of.copy()
        for move in reaction.moves:
            assert (view.state[move.samples] != FINISHED).all()
            assert view.replicas[move.replica].state != GONE and move.replica not in reaction.releases
            meant[move.samples] = move.replica
        assert not set(reaction.releases) & set(meant[view.state != FINISHED].tolist())
        assert len(set(reaction.releases)) == len(reaction.releases) < len(view.replicas), (
            "somebody serves what is left"
        )
        assert sum(reaction.starts) <= view.free_gpus
        assert not (reaction.starts and reaction.releases)
        assert reaction.next_look_s > view.now_s
        seen["starts beside an empty one"] += bool(reaction.starts)
        seen["ends what it moves from"] += bool(set(reaction.releases) & set(view.replica_of[view.alive].tolist()))
        seen["moves what waits"] += bool(reaction.moves) and "waiting" in reaction.reason

    for seed in range(120):
        holds(seed)
    assert len(seen) == 3 and min(seen.values()) >= 1, f"what is tested must happen: {seen}"
