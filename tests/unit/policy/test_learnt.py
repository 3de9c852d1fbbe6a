"""What was measured reaches the next plan, survives a checkpoint, and a broken state is refused in one line."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.policy.paced import POOL
from verl_rlhfless.errors import DataError
from verl_rlhfless.live.devices import PoolBounds, declared_pool
from verl_rlhfless.live.pacing import PaceModel
from verl_rlhfless.policy.calibrate import IterationSample
from verl_rlhfless.policy.learnt import CostModel, ReplicaTimes, Standby, StepTimes, apply, learn_speed, learn_step
from verl_rlhfless.policy.perf import EngineLimits
from verl_rlhfless.policy.snapshot import Batch

BATCH = Batch(1, ("a", "b"), np.repeat(np.arange(2), 4), np.full(8, 100), 200)
LENGTHS = np.full(8, 150)
WARM, COLD = ReplicaTimes("warm_start", 0.2, 12.0, 0.4), ReplicaTimes("cold_start", 0.4, 50.0, 0.6)
TIMES = StepTimes((WARM, COLD), 0.7, 9.0, 1.5)
SERVERS = Standby(num_servers=2)
TWO_SIZES = declared_pool(
    PoolBounds((1, 2), 4, 4, EngineLimits(8, 8192), 10**6), PaceModel(60.0, 2.0, 0.1, tp_speedup={2: 1.5})
)


def learnt(times: StepTimes = TIMES, model: CostModel | None = None) -> CostModel:
    return learn_step(model or CostModel(), POOL, (BATCH, LENGTHS), times)


def samples(pace: PaceModel) -> list[IterationSample]:
    return [IterationSample(n, 200 * n, 0, pace.iteration_s(1, n, 200 * n, 0)) for n in (1, 2, 3, 4, 5, 6, 7, 8)]


def test_nothing_measured_changes_nothing() -> None:
    pool = apply(CostModel(), POOL, Standby())
    assert not any((*pool.warm.values(), *pool.warm_beside.values())) and not pool.has_resident
    assert replace(pool, warm={}, warm_beside={}, has_resident=True) == replace(POOL, warm={}, has_resident=True)


def test_starts_phases_and_publication_of_a_step_are_what_the_next_plan_counts_with() -> None:
    pool = apply(learnt(), POOL, SERVERS)
    times, trainer = pool.trainer.times, pool.trainer
    assert times.grant_s == pytest.approx(0.3)
    assert (times.wake_s, times.cold_start_s, times.park_s) == pytest.approx((12.0, 50.0, 0.7))
    assert pool.perf[1].load_s == pytest.approx(0.5)
    assert trainer.publish_s == pytest.approx(1.5)
    tokens = float(BATCH.prompt_tokens.sum() + LENGTHS.sum())
    assert trainer.inference_s(tokens, tokens / 8) + trainer.update_s(tokens, tokens / 8) == pytest.approx(9.0)


def test_a_parked_engine_is_not_expected_to_take_as_long_as_a_start() -> None:
    parked = Standby({1: 1, 2: 2}, num_servers=2, beside={2: 1})
    times = apply(learnt(), TWO_SIZES, parked).trainer.times
    assert (times.wake_s, times.cold_start_s) == (TWO_SIZES.trainer.times.wake_s, 12.0), "no wake was seen yet"
    woken = replace(TIMES, starts=(ReplicaTimes("wake", 0.2, 0.1, 0.4), WARM))
    pool = apply(learnt(woken), TWO_SIZES, parked)
    assert (pool.trainer.times.wake_s, pool.trainer.times.cold_start_s) == (0.1, 12.0)
    assert pool.warm == {1: 1, 2: 4} and pool.warm_beside == {1: 0, 2: 2}
    assert apply(learnt(woken), TWO_SIZES, Standby({2: 1}, num_servers=2)).warm == {1: 0, 2: 2}, "it has one size"


def test_without_parked_engines_those_on_waiting_servers_come_up_first() -> None:
    pool = apply(learnt(), TWO_SIZES, SERVERS)
    assert (pool.trainer.times.wake_s, pool.trainer.times.cold_start_s) == (12.0, 50.0)
    assert pool.warm == {1: 2, 2: 4}


def test_how_long_a_trainer_takes_to_leave_and_come_back_is_learnt() -> None:
    leaving = replace(TIMES, moves_s=(4.0, 7.0))
    trainer = apply(learnt(leaving), POOL, SERVERS).trainer
    assert trainer.state_copy_s == pytest.approx(4.0)
    assert trainer.state_copy_s + trainer.times.resume_s == pytest.approx(7.0)
    stayed = learnt(TIMES, learnt(leaving))
    assert apply(stayed, POOL, SERVERS).trainer.state_copy_s == pytest.approx(4.0), "a step that moved nobody says none"
    quick = apply(learnt(replace(TIMES, moves_s=(4.0, 3.0))), POOL, SERVERS).trainer
    assert quick.times.resume_s == 0.0


@pytest.mark.parametrize(
    ("may_share", "standby", "shares"),
    [
        (True, Standby({1: 4}, beside={1: 2}), True),
        (True, Standby({1: 4}), False),
        (False, Standby({1: 4}, beside={1: 2}), False),
        (True, Standby({2: 4}, beside={2: 2}), False),
    ],
)
def test_only_engines_that_can_wake_there_are_planned_beside_the_trainer(
    may_share: bool, standby: Standby, shares: bool
) -> None:
    assert apply(CostModel(), replace(POOL, has_resident=may_share), standby).has_resident is shares


def test_a_start_that_was_not_seen_keeps_its_figure() -> None:
    only_cold = replace(TIMES, starts=TIMES.starts[1:], release_s=None, publish_s=None)
    times = apply(learnt(only_cold), POOL, SERVERS).trainer.times
    assert times.cold_start_s == pytest.approx(50.0)
    assert (times.wake_s, times.park_s) == (POOL.trainer.times.wake_s, POOL.trainer.times.park_s)


def test_a_cold_start_that_was_not_seen_is_not_taken_for_a_warm_one() -> None:
    only_warm = replace(TIMES, starts=(WARM,))
    assert apply(learnt(only_warm), POOL, SERVERS).trainer.times.cold_start_s == POOL.trainer.times.cold_start_s


def test_a_slow_first_step_is_not_expected_of_the_next_ones_but_a_lasting_change_is() -> None:
    model = CostModel()
    seen = []
    for release_s in (60.0, 0.5, 0.7, 3.0, 3.0, 3.0, 3.0):
        model = learnt(replace(TIMES, release_s=release_s), model)
        seen.append(model.figure("release_s"))
    assert seen == [60.0, 0.5, 0.7, 0.7, 3.0, 3.0, 3.0]
    assert len(model.latest["release_s"]) == 5


def test_a_device_that_is_slower_than_declared_is_believed_slower() -> None:
    slower = PaceModel(90.0, 2.0, 0.1)
    model = learn_speed(CostModel(), POOL.perf, {1: samples(slower)})
    assert apply(model, POOL, SERVERS).perf[1].iteration_s(5, 1000) == pytest.approx(
        slower.iteration_s(1, 5, 1000, 0), rel=0.02
    )


def test_a_size_that_never_ran_is_as_much_slower_as_the_one_that_did() -> None:
    model = learn_speed(CostModel(), TWO_SIZES.perf, {1: samples(PaceModel(120.0, 2.0, 0.1))})
    assert apply(model, TWO_SIZES, SERVERS).perf[2].iteration_s(1, 1) == pytest.approx(0.122 / 1.5, rel=0.05)


def test_a_few_iterations_change_nothing() -> None:
    assert learn_speed(CostModel(), POOL.perf, {1: samples(PaceModel(90.0))[:3]}) == CostModel()


def test_the_state_survives_a_checkpoint() -> None:
    model = learn_speed(learnt(replace(TIMES, moves_s=(4.0, 7.0))), POOL.perf, {1: samples(PaceModel(90.0))})
    assert model.figure("resume_s") == 7.0
    assert CostModel.from_json(model.to_json()) == model
    assert CostModel.from_json(CostModel().to_json()) == CostModel()


@pytest.mark.parametrize(
    "text",
    [
        "", "{}", "[1]", '{"format": "rlhfless-lengths/1"}', CostModel().to_json()[:-5],
        CostModel({"grant_s": (1.0,)}).to_json().replace("1.0", "-1"),
        CostModel({"grant": (1.0,)}).to_json(),
        CostModel({"grant_s": (1.0,)}).to_json().replace("[1.0]", "null"),
        CostModel().to_json().replace('"speeds": {}', '"speeds": {"1": [1.0]}'),
    ],
)  # fmt: skip
def test_a_broken_state_is_refused_and_says_what_to_do(text: str) -> None:
    with pytest.raises(DataError, match="Delete the state file"):
        CostModel.from_json(text)
