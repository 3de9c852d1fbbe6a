"""Whatever a trace holds, no arm beats the lower bounds on the time and the cost of a step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from verl_rlhfless.policy.gpus import GPUS
from verl_rlhfless.policy.layers import Recurrent, Window
from verl_rlhfless.policy.shapes import MODELS, ModelShape
from verl_rlhfless.policy.snapshot import Batch, SharedPrefix
from verl_rlhfless.policy.transitions import LeaseTimes, Recipe
from verl_rlhfless.sim.bound import step_bound
from verl_rlhfless.sim.cell import ARMS, Cell
from verl_rlhfless.sim.cluster import Cluster
from verl_rlhfless.sim.workload import StepData

LINK = 1e15
# Little room for keys and values, and a trainer that takes next to no time, so that decoding decides.
GPU = replace(GPUS["L40S"], memory_bytes=16e9, peer_bytes_per_s=LINK, network_bytes_per_s=LINK, host_bytes_per_s=LINK)
SMALL = Cluster("small", GPU, num_nodes=1, gpus_per_node=4, usd_per_gpu_h=3.77)
DECODING = Recipe(has_reference=False, mfu_train=400.0, mfu_infer=450.0, phase_s=0.0)
PLAIN = MODELS["qwen2.5-3b"]
SHAPES = (
    PLAIN,
    replace(PLAIN, window=Window(300, 36)),
    replace(PLAIN, window=Window(500, 30)),
    replace(PLAIN, attention=9, recurrent=Recurrent(27, 0, 400_000, ())),
)
QUICK = LeaseTimes(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, LINK)


def make_step(seed: int, groups: int, n: int, prompt: int, mean: float) -> StepData:
    """Return a step of ``groups`` prompts with ``n`` siblings; some prompts share a prefix, some samples have turns."""
    rng = np.random.default_rng(seed)
    count = groups * n
    lengths = np.clip(np.exp(rng.normal(np.log(mean), 0.5, count)), 1, 4000).astype(np.int64)
    prefixes = tuple(SharedPrefix("s", prompt // 2) if i % 3 == 1 and prompt > 1 else None for i in range(groups))
    cuts = [sorted({*rng.integers(1, length + 1, 3).tolist(), length}) for length in lengths.tolist()]
    turns = {sample: tuple(ends) for sample, ends in enumerate(cuts) if len(ends) > 1 and sample % 7 == 0}
    names = tuple(f"p{i}" for i in range(groups))
    batch = Batch(1, names, np.repeat(np.arange(groups), n), np.full(count, prompt), 4000, prefixes)
    return StepData(batch, lengths, turns)


@settings(max_examples=20)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 4),
    st.sampled_from([1, 8, 64, 160]),
    st.sampled_from([0, 100, 3000]),
    st.sampled_from([1.0, 100.0, 1000.0]),
    st.sampled_from([*ARMS]),
    st.sampled_from(SHAPES),
)
@example(seed=0, groups=2, n=8, prompt=0, mean=100.0, arm="stock_sync", shape=PLAIN)
@example(seed=0, groups=2, n=160, prompt=3000, mean=1000.0, arm="stock_sync", shape=SHAPES[2])
@example(seed=0, groups=2, n=160, prompt=3000, mean=1000.0, arm="stock_sync", shape=SHAPES[3])
def test_no_arm_beats_the_bounds(
    seed: int, groups: int, n: int, prompt: int, mean: float, arm: str, shape: ModelShape
) -> None:
    step = make_step(seed, groups, n, prompt, mean)
    one = Cell((step,), SMALL, shape, QUICK, recipe=DECODING)
    done = one.run(one.arm(arm)).steps[0]
    for bound in (step_bound(one.pool, step), step_bound(one.pool, step, done.step_s)):
        assert 0 < bound.step_s <= done.step_s
        assert 0 < bound.gpu_s <= done.gpu_s_allocated


@pytest.mark.parametrize("arm", ["stock_sync", "ours"])
def test_siblings_whose_contexts_exceed_the_cache_that_holds_their_prompt_once_do_not_beat_the_bound(arm: str) -> None:
    count, tokens = 4 * 128, 1000
    batch = Batch(1, ("a", "b", "c", "d"), np.arange(count) // 128, np.full(count, 3000), tokens)
    one = Cell((StepData(batch, np.full(count, tokens)),), SMALL, MODELS["qwen2.5-3b"], QUICK, recipe=DECODING)
    done = one.run(one.arm(arm)).steps[0]
    assert step_bound(one.pool, one.data[0]).gpu_s <= done.gpu_s_allocated
