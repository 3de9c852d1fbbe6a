"""Properties of the suspend rule over any history."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from verl_rlhfless.policy.suspend import (
    KEEP_RATIO,
    RETRY_AFTER,
    START_RATIO,
    RolloutNeeds,
    SuspendHistory,
    decide_suspend,
    learn_rollout,
)

SECONDS = st.floats(0.01, 1e5)
GPUS = st.integers(1, 512)
HISTORIES = st.builds(
    SuspendHistory,
    rollouts_s=st.lists(SECONDS, min_size=1, max_size=3).map(tuple),
    suspends_s=st.lists(SECONDS, min_size=1, max_size=3).map(tuple),
    resumes_s=st.lists(SECONDS, min_size=1, max_size=3).map(tuple),
    num_kept=st.integers(0, RETRY_AFTER - 1),
)
NEEDS = st.builds(RolloutNeeds, GPUS, GPUS, GPUS, st.booleans())


@given(HISTORIES, NEEDS)
def test_the_budget_is_never_exceeded(history: SuspendHistory, needs: RolloutNeeds) -> None:
    decision = decide_suspend(history, needs)
    assert needs.has_room_for_both or (decision.is_first and decision.resume_after_s is None)
    assert decision.is_suspended or not decision.is_first


@given(HISTORIES, NEEDS)
def test_it_comes_back_within_the_predicted_rollout(history: SuspendHistory, needs: RolloutNeeds) -> None:
    decision = decide_suspend(history, needs)
    assert decision.predicted_gpu_s >= 0 and decision.reason
    if decision.resume_after_s is not None:
        assert 0 <= decision.resume_after_s <= max(history.rollouts_s)


@given(HISTORIES, NEEDS, SECONDS)
def test_a_longer_rollout_never_keeps_a_trainer_that_would_leave(
    history: SuspendHistory, needs: RolloutNeeds, more_s: float
) -> None:
    longer = SuspendHistory(
        tuple(rollout_s + more_s for rollout_s in history.rollouts_s),
        history.suspends_s,
        history.resumes_s,
        history.num_kept,
    )
    assert decide_suspend(longer, needs).is_suspended >= decide_suspend(history, needs).is_suspended


@given(st.lists(st.floats(0.9, 1.1), min_size=1, max_size=60), st.booleans())
def test_noise_of_a_tenth_around_any_break_even_changes_the_decision_at_most_once(
    noise: list[float], starts_kept: bool
) -> None:
    moves_s = (1.0, 1.0)
    break_even_s = 2.0 * (1 + (START_RATIO + KEEP_RATIO) / 2)
    history = SuspendHistory((break_even_s,), (1.0,), (1.0,), num_kept=int(starts_kept))
    decisions = []
    for factor in noise[: RETRY_AFTER - 1]:
        is_suspended = decide_suspend(history, RolloutNeeds(2, 1, 4)).is_suspended
        decisions.append(is_suspended)
        history = learn_rollout(history, break_even_s * factor, moves_s if is_suspended else None)
    assert sum(a != b for a, b in itertools.pairwise(decisions)) <= 1
