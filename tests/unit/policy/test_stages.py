"""The future of a lane: what starts, what it waits for, and what everything takes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.sim.cases import cell, steps
from verl_rlhfless.policy.snapshot import PoolSnapshot
from verl_rlhfless.policy.stages import Frontier, Lane, Options, depth_edges, frontier, options_for

POOL = replace(cell(steps(1, 4, 2)).pool, warm={4: 4})
NARROW_OR_WIDE = Options(np.array([1, 4]), np.array([1, 1]))
"""One replica of one GPU, or one of four."""


def future(pool: PoolSnapshot, options: Options = NARROW_OR_WIDE, prefill_tokens: float = 0.0) -> Frontier:
    """Return the best future of 32 samples that all get 8,000 tokens, where a second is worth 64 GPU-seconds."""
    edges = depth_edges(8000)
    alive = np.full(len(edges) - 1, 32.0)
    lane = Lane(edges, alive, 1000.0, prefill_tokens, np.ones_like(alive), 1.0)
    return frontier(pool, options, lane, np.array([64.0]))


def test_replicas_that_start_in_mid_rollout_are_leased_until_they_are_up_and_have_their_weights() -> None:
    times, wide = POOL.trainer.times, POOL.perf[4]
    slow_link = replace(wide, gpu=replace(wide.gpu, host_bytes_per_s=wide.gpu.host_bytes_per_s / 2))
    pools = (POOL, replace(POOL, warm={}), replace(POOL, perf=POOL.perf | {4: slow_link}))
    woken, cold, loading = (future(pool) for pool in pools)
    assert [one.first[0, 0] for one in (woken, cold, loading)] == [1, 1, 1], "all hand over to four GPUs at once"
    assert cold.gpu_s[0, 0] - woken.gpu_s[0, 0] == pytest.approx(4 * (times.cold_start_s - times.wake_s))
    assert loading.gpu_s[0, 0] - woken.gpu_s[0, 0] == pytest.approx(4 * wide.load_s)


def test_what_hands_over_is_leased_until_the_others_are_up_so_both_must_fit() -> None:
    assert [int(future(replace(POOL, num_gpus=gpus)).first[0, 0]) for gpus in (4, 5)] == [0, 1]


@pytest.mark.parametrize(("tp", "count"), [(1, 1), (4, 1), (2, 4)])
def test_prompts_are_computed_first_on_all_replicas_side_by_side(tp: int, count: int) -> None:
    options = options_for(POOL)
    without, with_prompts = (future(POOL, options, tokens) for tokens in (0.0, 50_000.0))
    at, prefill_s = options.index(tp, count), 50_000 * POOL.perf[tp].prefill_s_per_token / count
    assert with_prompts.time_s[0, at] - without.time_s[0, at] == pytest.approx(prefill_s)
    assert with_prompts.gpu_s[0, at] - without.gpu_s[0, at] == pytest.approx(prefill_s * tp * count)
