"""Replicas stay inside a node: a fleet may have room in the budget and none on the nodes."""

from __future__ import annotations

import pytest

from verl_rlhfless.policy.packing import most_replicas, packs


@pytest.mark.parametrize(
    ("fleet", "num_gpus", "gpus_per_node", "fits"),
    [
        ((3, 3, 2), 8, 4, False),
        ((3, 3, 1, 1), 8, 4, True),
        ((3, 3), 6, 4, False),
        ((4, 2), 6, 4, True),
        ((4, 2, 2), 8, 4, True),
        ((4, 4, 1), 8, 4, False),
        ((8,), 8, 4, False),
        ((6,), 6, 8, True),
        ((), 0, 4, True),
    ],
)
def test_a_fleet_fits_or_not(fleet: tuple[int, ...], num_gpus: int, gpus_per_node: int, fits: bool) -> None:
    assert packs(fleet, num_gpus, gpus_per_node) is fits


@pytest.mark.parametrize(("tp", "num_gpus", "most"), [(3, 16, 4), (4, 16, 4), (2, 7, 3), (3, 7, 2), (5, 16, 0)])
def test_a_size_that_does_not_divide_a_node_leaves_gpus_of_each(tp: int, num_gpus: int, most: int) -> None:
    assert most_replicas(tp, num_gpus, 4) == most
    assert packs((tp,) * most, num_gpus, 4) and not packs((tp,) * (most + 1), num_gpus, 4)
