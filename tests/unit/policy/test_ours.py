"""Our arm's memory: what a step teaches beside lengths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.sim.cases import cell, steps
from verl_rlhfless.policy.arm import Outcome
from verl_rlhfless.policy.goal import Goal
from verl_rlhfless.policy.ours import Memory, Ours, OursPolicy
from verl_rlhfless.policy.plan import plan_fleet, static_steps_s
from verl_rlhfless.policy.predict import LengthModel, predict
from verl_rlhfless.policy.prediction import exact
from verl_rlhfless.policy.snapshot import FINISHED, READY, RUNNING, ReplicaView, RolloutPlan, RolloutView

DATA = steps(1, 64, 8, mean=2000.0, cap=16384)
ARM = Ours()


def after(factor: float, *, is_resident: bool = False) -> Memory:
    """Return the memory after a step that took ``factor`` times what was predicted."""
    one = cell(DATA)
    memory = ARM.begin(one.pool, DATA[0].batch)
    plan = ARM.plan(memory, replace(one.pool, warm=dict.fromkeys(one.pool.perf, 16)), DATA[0].batch)
    static_s = 50.0
    plan = replace(plan, is_resident=is_resident, static_step_s=static_s, predicted_step_s=static_s)
    base = ARM.learn(memory, Outcome(DATA[0].batch, DATA[0].lengths, 0.0)).saved_s
    return ARM.learn(memory, Outcome(DATA[0].batch, DATA[0].lengths, factor * base, plan))


def test_an_elastic_step_that_took_longer_than_predicted_makes_the_next_plan_careful() -> None:
    assert after(1.3).caution > after(1.1).caution > after(0.9).caution == 1.0


def test_a_resident_step_says_nothing_about_elastic_ones() -> None:
    assert after(1.3, is_resident=True).caution == 1.0


def test_seconds_saved_and_lost_are_kept() -> None:
    assert after(0.8).saved_s > 0 > after(1.2).saved_s


def test_the_first_engines_are_of_a_size_that_serves_the_whole_rollout_alone() -> None:
    """The best fleet of engines of every size begins wide and goes on with many narrow ones: those are not started."""
    (data,) = steps(1, 48, 8, cap=32768)
    batch = replace(data.batch, prompt_tokens=np.full(384, 30))
    assert ARM.begin(cell((data,), "h100-16").pool, batch).first_sizes == (2,)


def test_where_the_trainers_gpus_do_best_their_engines_are_started() -> None:
    (data,) = steps(1, 32, 4, cap=4096)
    pool = cell((data,), "h100-16").pool
    first_sizes = ARM.begin(pool, data.batch).first_sizes
    warm = replace(pool, warm=dict.fromkeys(pool.perf, 16))
    plan = plan_fleet(warm, data.batch, predict(LengthModel(), data.batch), Goal())
    assert plan.is_resident
    assert first_sizes == (plan.fleet[0],)


def late_view(arm: Ours) -> tuple[OursPolicy, RolloutView, RolloutPlan]:
    """Return an elastic rollout of which replica 0 has finished nearly everything."""
    one, batch = cell(DATA), DATA[0].batch
    fleet = (1, 1, 1, 1)
    plan = RolloutPlan(fleet, np.arange(512) % 4, np.arange(512), False, False, price=16.0)
    state = np.where((plan.replica_of == 0) & (np.arange(512) >= 8), FINISHED, RUNNING).astype(np.int8)
    held = np.bincount(plan.replica_of[state == RUNNING], minlength=4).tolist()
    replicas = tuple(ReplicaView(r, 1, READY, 0, held[r], 600 * held[r]) for r in range(4))
    view = RolloutView(9.0, batch, one.pool, np.full(512, 500), state, plan.replica_of, replicas, 12, 0, 0, 0)
    return arm.policy(arm.begin(one.pool, batch), batch), view, plan


def test_the_migration_rule_is_chosen_by_name() -> None:
    def moved(migration: str, tau: float = 0.8) -> set[int]:
        policy, view, plan = late_view(Ours(migration=migration, tau=tau))
        reaction = policy.react(view, plan)
        assert migration == "cut_and_migrate" or not reaction.starts
        return {int(sample) for move in reaction.moves for sample in move.samples}

    assert moved("rlhfless") == {0, 4}  # what is left on the replica that is past tau
    assert moved("rlhfless", tau=0.999) == set()
    assert moved("rlhfuse") == set()  # too many are left of all
    assert moved("rlhfuse", tau=0.1) > {0, 4}
    assert moved("off") == set()


def test_a_resident_step_owes_no_time() -> None:
    assert after(1.3, is_resident=True).saved_s == 0.0


def resident_outcome(tp: int, step_s: float, hidden_s: float = 0.0) -> Outcome:
    """Return the outcome of a step on engines of ``tp`` GPUs that share the trainer's lease."""
    plan = RolloutPlan((tp,) * (16 // tp), np.zeros(512, np.int64), np.arange(512), is_resident=True, is_static=True)
    return Outcome(DATA[0].batch, DATA[0].lengths, step_s, plan, hidden_s)


def test_resident_steps_pay_back_what_elastic_ones_lost() -> None:
    """Else one unlucky step would keep a run that must not be slower resident for ever."""
    static_s = static_steps_s(cell(DATA).pool, DATA[0].batch, exact(DATA[0].lengths))
    best, memory = min(static_s, key=lambda tp: static_s[tp]), experienced(saved_s=-20.0)
    for step in range(1, 4):
        memory = ARM.learn(memory, resident_outcome(best, 100.0, hidden_s=5.0))
        assert memory.saved_s == pytest.approx(-20.0 + 5.0 * step)


def test_resident_steps_on_a_size_that_is_not_the_best_save_nothing_by_it() -> None:
    """What the model is off by is seen on the size that ran; the seconds to beat are the best size's."""
    static_s = static_steps_s(cell(DATA).pool, DATA[0].batch, exact(DATA[0].lengths))
    slower = max(static_s, key=lambda tp: static_s[tp])
    memory = ARM.learn(experienced(), resident_outcome(slower, 1.1 * static_s[slower]))
    assert memory.saved_s == pytest.approx(1.1 * (min(static_s.values()) - static_s[slower]))
    assert memory.saved_s < 0


def test_few_known_lengths_must_promise_more_than_many() -> None:
    """With 8 samples seen, a gain that pays the transition once is not trusted yet."""
    few = steps(1, 1, 8, mean=2000.0, cap=16384)[0]
    known = [ARM.learn(ARM.begin(cell(DATA).pool, d.batch), Outcome(d.batch, d.lengths, 9.0)) for d in (few, DATA[0])]
    assert ARM.doubt(known[0]) > 1.5 > 1.1 > ARM.doubt(known[1]) > 1


def test_a_gain_that_does_not_repay_its_doubts_leaves_the_fleet_resident() -> None:
    one = cell(DATA)
    memory = replace(ARM.begin(one.pool, DATA[0].batch), lengths=replace(LengthModel(), level=6.5))
    pool = replace(one.pool, warm=dict.fromkeys(one.pool.perf, 16))
    sure = replace(memory, lengths=replace(memory.lengths, num_samples=1e6))
    doubtful = replace(memory, lengths=replace(memory.lengths, num_samples=0.1))
    assert not ARM.plan(sure, pool, DATA[0].batch).is_resident
    assert "does not repay" in ARM.plan(doubtful, pool, DATA[0].batch).reason


def warm_plan(arm: Ours, memory: Memory) -> RolloutPlan:
    pool = cell(DATA).pool
    return arm.plan(memory, replace(pool, warm=dict.fromkeys(pool.perf, 16)), DATA[0].batch)


def experienced(**parts: float) -> Memory:
    """Return the memory of many steps."""
    lengths = replace(LengthModel(), level=6.5, num_samples=1e6)
    return replace(ARM.begin(cell(DATA).pool, DATA[0].batch), lengths=lengths, **parts)


def test_of_the_time_that_earlier_steps_saved_the_next_one_spends_up_to_half() -> None:
    arm = Ours(Goal(is_notslower=True))
    plan = warm_plan(arm, experienced(saved_s=20.0))
    assert plan.predicted_step_s is not None and plan.static_step_s is not None
    assert 0 < plan.predicted_step_s - plan.static_step_s <= 10.0
    assert "to catch up 10.0 s" in warm_plan(arm, experienced(saved_s=-20.0)).reason


def test_steps_that_took_far_longer_than_predicted_make_the_next_one_resident() -> None:
    assert [warm_plan(ARM, experienced(caution=caution)).is_resident for caution in (1.0, 1.5)] == [False, True]
