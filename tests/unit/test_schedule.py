"""The fixed planner repeats its schedule; a validation wakes what sleeps."""

from __future__ import annotations

import pytest

from verl_rlhfless.policy.schedule import fleet_within, largest_fleet, scheduled_fleet, validation_fleet


def test_schedule_repeats_and_says_why() -> None:
    sizes = [len(scheduled_fleet(step, (1, 2, 3), tp=2).replicas) for step in range(1, 7)]
    assert sizes == [1, 2, 3, 1, 2, 3]
    decision = scheduled_fleet(2, (1, 2, 3), tp=2)
    assert decision.num_gpus == 4 and "step 2" in decision.reason and "2 x TP2" in decision.reason


@pytest.mark.parametrize(("num_gpus", "count"), [(8, 3), (5, 2), (1, 1)])
def test_a_fleet_loses_the_replicas_for_which_there_is_no_gpu_but_for_one(num_gpus: int, count: int) -> None:
    assert len(fleet_within(scheduled_fleet(1, (3,), tp=2), num_gpus).replicas) == count


def test_validation_gets_the_largest_fleet() -> None:
    assert len(largest_fleet(1, (1, 4, 2), tp=1).replicas) == 4


@pytest.mark.parametrize(
    ("asleep", "num_gpus", "max_replicas", "sizes"),
    [
        ([1] * 8, 8, None, [1] * 8),
        ([2, 1, 1], 8, None, [2, 1, 1, 1, 1, 1, 1]),
        ([4, 4], 10, None, [4, 4]),
        ([1, 4, 2], 4, None, [1, 2, 1]),
        ([], 8, None, [2] * 4),
        ([], 1, None, [2]),
        ([1] * 8, 8, 3, [1] * 3),
        ([1], 8, 3, [1] * 3),
    ],
)
def test_a_validation_between_plans_wakes_what_sleeps_and_fills_the_budget_with_the_narrowest(
    asleep: list[int], num_gpus: int, max_replicas: int | None, sizes: list[int]
) -> None:
    decision = validation_fleet(3, asleep, tp=2, num_gpus=num_gpus, max_replicas=max_replicas)
    assert [replica.tp for replica in decision.replicas] == sizes


def test_a_validation_says_what_it_wakes_and_starts() -> None:
    assert "wakes 2 replicas that sleep and starts 4 x TP1" in validation_fleet(3, [2, 1], 2, 7, None).reason
    assert "wakes 0 replicas that sleep and starts 4 x TP2" in validation_fleet(3, [], 2, 8, None).reason
