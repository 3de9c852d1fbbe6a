"""The fixed planner repeats its schedule."""

from __future__ import annotations

from verl_rlhfless.policy.schedule import largest_fleet, scheduled_fleet


def test_schedule_repeats_and_says_why() -> None:
    sizes = [len(scheduled_fleet(step, (1, 2, 3), tp=2).replicas) for step in range(1, 7)]
    assert sizes == [1, 2, 3, 1, 2, 3]
    decision = scheduled_fleet(2, (1, 2, 3), tp=2)
    assert decision.num_gpus == 4 and "step 2" in decision.reason and "2 x TP2" in decision.reason


def test_validation_gets_the_largest_fleet() -> None:
    assert len(largest_fleet(1, (1, 4, 2), tp=1).replicas) == 4
