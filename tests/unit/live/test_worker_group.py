"""What a worker group refuses to leave behind on its devices, without processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from verl_rlhfless.errors import DeviceMemoryError
from verl_rlhfless.live.residency import RankMemory
from verl_rlhfless.live.worker_group import ElasticWorkerGroup

RESIDUE_BYTES = 700_000_000


def group_with_a_residue() -> Any:
    """Return a suspendable group of two ranks, the first of which keeps memory on its device."""
    group: Any = ElasticWorkerGroup.__new__(ElasticWorkerGroup)
    group.name_prefix = "trainer"
    pool = SimpleNamespace(lease="held", release=lambda timeout_s: setattr(pool, "lease", None))
    group._elastic_pool = lambda: pool
    group._on_every_rank = lambda call, verb, timeout_s: [RankMemory(RESIDUE_BYTES, 0), RankMemory(0, 0)]
    return group


def test_memory_that_stays_is_refused_with_the_ways_out() -> None:
    group = group_with_a_residue()
    with pytest.raises(DeviceMemoryError, match=rf"by rank \{{0: {RESIDUE_BYTES}\}}, limit 536870912") as refused:
        group.suspend(1.0)
    ways_out = ("rlhfless.pool.suspend_residual_bytes", "+rlhfless=resident", "trainer.n_gpus_per_node")
    assert all(way in str(refused.value) for way in ways_out)
    assert group._elastic_pool().lease == "held"


def test_a_recipe_that_allows_more_to_stay_leaves() -> None:
    group = group_with_a_residue()
    assert group.suspend(1.0, RESIDUE_BYTES).lease == "held" and group._elastic_pool().lease is None
