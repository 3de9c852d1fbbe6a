"""When the trainer gives its GPUs back, and when it should begin to take them again."""

from __future__ import annotations

import pytest

from verl_rlhfless.policy.suspend import (
    KEEP_RATIO,
    RETRY_AFTER,
    START_RATIO,
    RolloutNeeds,
    SuspendHistory,
    decide_suspend,
    learn_rollout,
)

ROOM = RolloutNeeds(trainer_gpus=4, replica_gpus=4, budget_gpus=8)
FULL = RolloutNeeds(trainer_gpus=4, replica_gpus=4, budget_gpus=4)


def after(rollout_s: float, moves_s: float = 2.0, num_kept: int = 0) -> SuspendHistory:
    """A run whose rollouts take ``rollout_s``, and whose moves take ``moves_s`` together."""
    return SuspendHistory((rollout_s,), (moves_s / 4,), (moves_s * 3 / 4,), num_kept)


def test_the_first_rollout_is_the_measurement() -> None:
    decision = decide_suspend(SuspendHistory(), ROOM)
    assert decision.is_suspended and not decision.is_first
    assert decision.resume_after_s is None, "nobody knows when it will end"
    assert "first rollout" in decision.reason


def test_long_rollouts_repay_the_moves() -> None:
    decision = decide_suspend(after(60.0), ROOM)
    assert decision.is_suspended
    assert decision.predicted_gpu_s == 4 * (60 - 2)
    assert decision.reason == "4 GPUs for 58.0 s against 2.0 s of moves repay"


def test_the_trainer_is_back_when_the_rollout_is_predicted_to_end() -> None:
    assert decide_suspend(after(60.0), ROOM).resume_after_s == 60 - 1.5
    assert decide_suspend(after(60.0), FULL).resume_after_s is None, "replicas are on its devices until the end"


def test_short_rollouts_do_not_repay_the_moves() -> None:
    decision = decide_suspend(after(3.0), ROOM)
    assert not decision.is_suspended and decision.predicted_gpu_s == 0
    assert "don't repay" in decision.reason


def test_replicas_that_need_the_gpus_get_them_whatever_it_costs() -> None:
    decision = decide_suspend(after(1.0), FULL)
    assert decision.is_suspended and decision.is_first
    assert decision.reason == "the trainer's 4 GPUs and the replicas' 4 are more than the budget of 4"


def test_between_the_two_ratios_the_trainer_does_what_it_did() -> None:
    between = 2.0 * (1 + (START_RATIO + KEEP_RATIO) / 2)
    assert decide_suspend(after(between), ROOM).is_suspended
    assert not decide_suspend(after(between, num_kept=1), ROOM).is_suspended


def test_one_slow_resume_changes_nothing_but_slow_ones_do() -> None:
    history = after(30.0)
    history = learn_rollout(history, 30.0, (0.5, 1.5))
    history = learn_rollout(history, 30.0, (0.5, 25.0))
    assert decide_suspend(history, ROOM).is_suspended
    history = learn_rollout(history, 30.0, (0.5, 25.0))
    assert not decide_suspend(history, ROOM).is_suspended


def test_a_trainer_that_stayed_for_long_measures_again() -> None:
    history = after(30.0, moves_s=25.0)
    for _ in range(RETRY_AFTER):
        assert not decide_suspend(history, ROOM).is_suspended or history.num_kept == 0
        history = learn_rollout(history, 30.0, None)
    decision = decide_suspend(history, ROOM)
    assert decision.is_suspended and "measured again" in decision.reason
    assert learn_rollout(history, 30.0, (0.5, 1.5)).num_kept == 0


@pytest.mark.parametrize(("needs", "leaves"), [(ROOM, False), (FULL, True)])
def test_a_validation_moves_the_trainer_only_for_room(needs: RolloutNeeds, leaves: bool) -> None:
    validation = RolloutNeeds(needs.trainer_gpus, needs.replica_gpus, needs.budget_gpus, is_validation=True)
    for history in (SuspendHistory(), after(60.0)):
        decision = decide_suspend(history, validation)
        assert decision.is_suspended is leaves
        assert decision.resume_after_s is None and decision.predicted_gpu_s == 0
