"""Seer's order: a probe of each group first, then the longest groups, as far as an engine's slots are short."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.unit.sim.cases import cell, steps
from verl_rlhfless.policy.baselines.seer import Divided, Seer
from verl_rlhfless.policy.perf import EngineLimits
from verl_rlhfless.policy.snapshot import FINISHED, HELD, READY, RUNNING, PoolSnapshot, ReplicaView, RolloutView
from verl_rlhfless.sim.run import ArmRun

DATA = steps(2, 4, 8)
BATCH = DATA[0].batch
ONE = cell(DATA)


def with_slots(count: int) -> PoolSnapshot:
    limits = EngineLimits(max_num_seqs=count)
    return replace(ONE.pool, perf={tp: replace(perf, limits=limits) for tp, perf in ONE.pool.perf.items()})


def test_probes_have_slots_first_and_only_what_has_none_is_held_back() -> None:
    plan = Seer(8).plan(8, with_slots(6), BATCH)
    assert sorted(plan.order[:4].tolist()) == [0, 8, 16, 24]
    assert (plan.replica_of[plan.order[:4]] >= 0).all()
    assert np.bincount(plan.replica_of[plan.replica_of >= 0]).tolist() == [6, 6]
    assert (Seer(8).plan(8, with_slots(16), BATCH).replica_of >= 0).all()


def test_free_slots_go_to_the_longest_groups_and_to_siblings_of_those_that_ran_there() -> None:
    pool = with_slots(6)
    plan = Seer(8).plan(8, pool, BATCH)
    homes = plan.replica_of[[0, 8, 16, 24]]
    state = np.where(plan.replica_of < 0, HELD, RUNNING).astype(np.int8)
    generated = np.where(state == RUNNING, np.repeat([50, 400, 300, 200], 8), 0)
    ended = np.flatnonzero(state == RUNNING)[:3]  # all of group 0
    state[ended] = FINISHED
    held = np.bincount(plan.replica_of[state == RUNNING], minlength=2).tolist()
    replicas = tuple(ReplicaView(r, 8, READY, 0, held[r], 0) for r in range(2))
    view = RolloutView(9.0, BATCH, pool, generated, state, plan.replica_of, replicas, 0, 0, 0, 0)
    (move,) = Divided().react(view, plan).moves
    assert move.replica == homes[0] and len(move.samples) == 6 - held[homes[0]] == 3
    other = [group for group in (1, 2, 3) if homes[group] == homes[0]]
    assert (BATCH.group_of[move.samples] == other).all() and (state[move.samples] == HELD).all()
    full = replace(view, state=np.where(state == FINISHED, RUNNING, state).astype(np.int8))
    assert not Divided().react(full, plan).moves


def test_a_run_with_few_slots_completes_every_sample() -> None:
    record = ArmRun(Seer(8), ONE.cluster, with_slots(6), DATA).run()
    assert [step.tokens for step in record.steps] == [int(step.lengths.sum()) for step in DATA]
    roomy = ArmRun(Seer(8), ONE.cluster, with_slots(16), DATA).run()
    assert record.steps[0].gen_s > roomy.steps[0].gen_s
