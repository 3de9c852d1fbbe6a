from dataclasses import replace

import pytest

from verl_rlhfless.report.guards import GuardLimits, judge
from verl_rlhfless.report.record import ArmRecord, Figures, Pull, Spread, StepRecord
from verl_rlhfless.types import GpuSeconds, LeaseSpan

LIMITS = GuardLimits(num_steps=2, num_samples=32, max_gpus=4, pulling_arms=("elastic",))
GPU = GpuSeconds(allocated=40.0, busy=10.0, idle=25.0, startup=5.0, max_gpus=4)
FIGURES = Figures(
    step_s=10.0,
    gen_s=5.0,
    gpu=GPU,
    gpu_s_parked=0.0,
    reward_mean=0.1,
    rollout_probs_diff_max=1e-8,
    rollout_probs_diff_mean=1e-9,
    response_tokens=100,
    num_samples=32,
    num_replicas=2,
)
PULL = Pull("rlhfless/replica/r0", expected_version=1, version=1, checksum="c1", published_checksum="c1")
GOOD = ArmRecord(
    steps=(StepRecord(1, FIGURES), StepRecord(2, FIGURES)),
    total=FIGURES,
    wall_s=60.0,
    leases=(LeaseSpan("pool", "trainer", 4, 0.0, 1.0, 10.0),),
    pulls=(PULL, PULL),
    host=None,
)


def with_step_2(**changes):
    return replace(GOOD, steps=(GOOD.steps[0], StepRecord(2, replace(FIGURES, **changes))))


def failed(arm, left_behind=()):
    guards = judge({"elastic": arm}, LIMITS, {"elastic": left_behind})
    return {guard.name: guard.value for guard in guards if not guard.ok}


def test_a_sound_arm_passes_every_guard():
    assert failed(GOOD) == {}


def test_every_arm_is_judged_by_name_and_only_pulling_arms_by_their_pulls():
    names = {guard.name for guard in judge({"stock": GOOD, "elastic": GOOD}, LIMITS, {"stock": [], "elastic": []})}
    common = {"num_steps", "rollout_probs_diff_max", "num_samples", "max_gpus", "ledger_adds_up", "left_behind"}
    pulling = {"weight_version/elastic", "weight_checksum/elastic"}
    assert names == {f"{name}/{arm}" for name in common for arm in ("stock", "elastic")} | pulling


@pytest.mark.parametrize(
    ("arm", "guard", "value"),
    [
        (replace(GOOD, steps=GOOD.steps[:1]), "num_steps", 1),
        (with_step_2(rollout_probs_diff_max=3e-3), "rollout_probs_diff_max", 3e-3),
        (with_step_2(rollout_probs_diff_max=1e-6), "rollout_probs_diff_max", 1e-6),
        (with_step_2(num_samples=28), "num_samples", 28),
        (with_step_2(num_samples=33), "num_samples", 33),
        (replace(GOOD, total=replace(FIGURES, gpu=replace(GPU, max_gpus=5))), "max_gpus", 5),
        (with_step_2(gpu=replace(GPU, idle=24.0)), "ledger_adds_up", pytest.approx(1 / 40)),
        (replace(GOOD, leases=(replace(GOOD.leases[0], num_gpus=3),)), "ledger_adds_up", pytest.approx(10 / 40)),
        (replace(GOOD, pulls=(PULL, replace(PULL, version=0))), "weight_version", 1),
        (replace(GOOD, pulls=(PULL, replace(PULL, checksum="c0"))), "weight_checksum", 1),
    ],
)
def test_a_broken_rule_fails_its_guard_and_no_other(arm, guard, value):
    assert failed(arm) == {f"{guard}/elastic": value}


@pytest.mark.parametrize(
    ("arm", "guards"),
    [
        (with_step_2(rollout_probs_diff_max=None), {"rollout_probs_diff_max"}),
        (with_step_2(rollout_probs_diff_max=float("nan")), {"rollout_probs_diff_max"}),
        (with_step_2(num_samples=None), {"num_samples"}),
        (with_step_2(gpu=None), {"ledger_adds_up"}),
        (replace(GOOD, leases=()), {"max_gpus", "ledger_adds_up"}),
        (replace(GOOD, pulls=()), {"weight_version", "weight_checksum"}),
        (
            replace(GOOD, pulls=(PULL, Pull("r1", None, None, None, None))),
            {"weight_version", "weight_checksum"},
        ),
        (replace(GOOD, pulls=(PULL, replace(PULL, published_checksum=None))), {"weight_checksum"}),
    ],
)
def test_a_guard_without_data_fails_and_says_that_it_does_not_know(arm, guards):
    assert failed(arm) == {f"{guard}/elastic": None for guard in guards}


def test_an_arm_without_a_single_step_fails():
    assert failed(replace(GOOD, steps=())) == {
        "num_steps/elastic": 0,
        "rollout_probs_diff_max/elastic": None,
        "num_samples/elastic": None,
    }


def test_what_was_left_behind_is_counted_and_not_having_looked_is_a_failure():
    assert failed(GOOD, left_behind=["process 12", "psm_1"]) == {"left_behind/elastic": 2}
    assert failed(GOOD, left_behind=None) == {"left_behind/elastic": None}


def test_an_arm_that_promises_nothing_is_not_judged_by_what_it_left_behind():
    assert "left_behind/stock" not in {guard.name for guard in judge({"stock": GOOD}, LIMITS, {})}


def test_a_lease_that_outlives_the_run_is_left_behind():
    held = LeaseSpan("rlhfless/replica/r7", "replica", 1, 10.0, 10.0, None)
    assert failed(replace(GOOD, leases=(*GOOD.leases, held))) == {"left_behind/elastic": 1}


LIKE = replace(GOOD, reward=Spread(0.5, 0.01, 64), response_tokens=Spread(60.0, 1.0, 64))
ROUNDED = replace(LIMITS, probs_diff=None, reference="stock", pulling_arms=())


def learning_failures(elastic, limits=ROUNDED, stock=LIKE):
    return {guard.name for guard in judge({"stock": stock, "elastic": elastic}, limits, {}) if not guard.ok}


def test_an_arm_that_learns_like_the_reference_passes():
    assert learning_failures(replace(LIKE, reward=Spread(0.53, 0.01, 64))) == set()


@pytest.mark.parametrize(
    ("changes", "guard"),
    [
        ({"reward": Spread(0.57, 0.01, 64)}, "reward_shift"),
        ({"response_tokens": Spread(52.0, 1.0, 64)}, "length_shift"),
        ({"reward": None}, "reward_shift"),
        ({"response_tokens": None}, "length_shift"),
    ],
)
def test_another_reward_or_other_lengths_than_the_reference_fail(changes, guard):
    assert learning_failures(replace(LIKE, **changes)) == {f"{guard}/elastic"}


def test_equal_lengths_without_any_spread_are_no_shift_and_different_ones_are():
    forced = replace(LIKE, response_tokens=Spread(60.0, 0.0, 64))
    assert learning_failures(forced, stock=forced) == set()
    other = replace(LIKE, response_tokens=Spread(61.0, 0.0, 64))
    assert learning_failures(other, stock=forced) == {"length_shift/elastic"}


def test_where_rounding_differs_the_mean_difference_is_held_against_the_reference():
    stale = replace(LIKE, steps=(GOOD.steps[0], StepRecord(2, replace(FIGURES, rollout_probs_diff_mean=2.5e-9))))
    assert learning_failures(stale) == {"rollout_probs_diff_mean/elastic"}
    rounded = replace(LIKE, steps=(GOOD.steps[0], StepRecord(2, replace(FIGURES, rollout_probs_diff_max=0.3))))
    assert learning_failures(rounded) == set()


def test_an_asynchronous_arm_is_another_algorithm_whose_learning_is_not_judged():
    other = replace(LIKE, reward=Spread(0.9, 0.01, 64), steps=with_step_2(rollout_probs_diff_max=0.3).steps)
    limits = replace(LIMITS, reference="stock", pulling_arms=(), asynchronous_arms=("elastic",))
    assert learning_failures(other, limits) == set()
    names = {guard.name for guard in judge({"elastic": other}, limits, {})}
    assert "num_samples/elastic" in names and "rollout_probs_diff_max/elastic" not in names
