"""Whatever the workload, capacity and moves: tokens and requests are conserved and nothing hangs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.sim.cases import request
from verl_rlhfless.policy.gpus import GPUS
from verl_rlhfless.policy.layers import Recurrent, Window
from verl_rlhfless.policy.perf import BLOCK_TOKENS, EngineLimits, EnginePerf
from verl_rlhfless.policy.shapes import MODELS, ModelShape
from verl_rlhfless.policy.snapshot import Batch, SharedPrefix
from verl_rlhfless.policy.transitions import LeaseTimes
from verl_rlhfless.sim.cell import Cell
from verl_rlhfless.sim.cluster import CLUSTERS
from verl_rlhfless.sim.engine import Engine
from verl_rlhfless.sim.request import Request
from verl_rlhfless.sim.workload import StepData

SHAPE, GPU = MODELS["qwen2.5-7b"], GPUS["L40S"]
SHAPES = (
    SHAPE,
    replace(SHAPE, window=Window(256, 28)),
    replace(SHAPE, window=Window(500, 21)),
    replace(SHAPE, attention=14, recurrent=Recurrent(14, 0, 400_000, ())),
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(1, 600), st.integers(0, 4)), min_size=1, max_size=24),
    st.integers(1, 8),
    st.sampled_from([64, 512, 8192]),
    st.lists(st.tuples(st.floats(0, 20), st.integers(0, 23)), max_size=8),
    st.sampled_from(SHAPES),
)
def test_every_request_finishes_once_with_its_length_whatever_is_cut(
    requests: list[tuple[int, int, int]], seats: int, budget: int, cuts: list[tuple[float, int]], shape: ModelShape
) -> None:
    perf = EnginePerf(shape, GPU, 1, limits=EngineLimits(max_num_seqs=seats, max_batched_tokens=budget + seats))
    env = simpy.Environment()
    done: dict[int, int] = {}
    engines: list[Engine] = []

    def leave(index: int, one: Request, is_cut: bool) -> None:
        if is_cut and one.generated < one.target:
            engines[1 - index].submit(one)
            return
        assert one.sample not in done
        done[one.sample] = one.generated

    engines += [Engine(env, perf, lambda r, cut, i=i: leave(i, r, cut)) for i in (0, 1)]
    prompts = {group: prompt for prompt, _, group in requests}  # siblings have one prompt
    for sample, (_, length, group) in enumerate(requests):
        engines[sample % 2].submit(request(sample, group, prompts[group], length))
    for engine in engines:
        engine.start()

    def cutter() -> simpy.events.ProcessGenerator:
        for at, sample in sorted(cuts):
            yield env.timeout(max(0.0, at - env.now))
            for engine in engines:
                engine.abort({sample})

    env.process(cutter())
    env.run()
    assert done == {sample: length for sample, (_, length, _) in enumerate(requests)}
    for engine in engines:
        assert engine.is_empty
        assert engine.context_tokens == 0
        assert engine.blocks.in_use() == 0
        assert all(len(span) == 2 and span[0] <= span[1] for span in engine.busy)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 3000), min_size=2, max_size=30), st.floats(0.36, 0.5), st.sampled_from(SHAPES))
def test_blocks_in_use_never_exceed_the_capacity(lengths: list[int], share: float, shape: ModelShape) -> None:
    perf = EnginePerf(shape, GPU, 1, limits=replace(EngineLimits(), memory_utilization=share + 0.03))
    env = simpy.Environment()
    left: list[int] = []
    engine = Engine(env, perf, lambda one, is_cut: left.append(one.generated))
    for sample, length in enumerate(lengths):
        engine.submit(request(sample, sample, 64, min(length, perf.blocks_of(1) * 16 - 96)))
    engine.start()
    while env.peek() < float("inf"):
        env.step()
        running, context = len(engine.decoding) + len(engine.prefilling), engine.blocks.context_tokens
        assert engine.blocks.in_use() <= perf.blocks_of(running)
        if engine.decoding:  # what is kept of the mean context is at least the mean of what is kept
            kept = len(engine.decoding) * float(shape.attended(context / len(engine.decoding)))
            states = running * 2 * shape.state_bytes / shape.kv_bytes_per_token
            assert kept + states <= perf.kv_blocks * BLOCK_TOKENS
    assert len(left) == len(lengths)
    assert np.array(sorted(left)).sum() == sum(min(n, perf.blocks_of(1) * 16 - 96) for n in lengths)


@settings(max_examples=25)
@given(
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["ours", "rlhfuse", "rlhfless_paper", "seer"]),
)
def test_whatever_a_trace_holds_and_a_node_takes_away_every_token_and_leased_second_is_accounted_for(
    seed: int, has_kv_transfer: bool, is_spot: bool, arm: str
) -> None:
    rng = np.random.default_rng(seed)
    groups, n = int(rng.integers(1, 12)), int(rng.integers(1, 6))
    count = groups * n
    lengths = np.clip(np.exp(rng.normal(5.5, 1.2, count)), 1, 6000).astype(np.int64)
    prompts = rng.integers(1, 400, groups)
    prefixes = tuple(
        SharedPrefix(f"s{i % 2}", int(rng.integers(1, p + 1))) if i % 3 else None for i, p in enumerate(prompts)
    )
    names = tuple(f"p{i}" for i in range(groups))
    batch = Batch(1, names, np.repeat(np.arange(groups), n), np.repeat(prompts, n), 6000, prefixes)
    cuts = [sorted({*rng.integers(1, length + 1, 3).tolist(), length}) for length in lengths.tolist()]
    turns = {sample: tuple(ends) for sample, ends in enumerate(cuts) if len(ends) > 1 and sample % 2}
    step = StepData(batch, lengths, turns, rng.uniform(0, 20, count), np.repeat(rng.uniform(0, 30, groups), n))
    outage = (((float(rng.uniform(120, 160)), 200.0), (210.0, 300.0)),)
    cluster = replace(CLUSTERS["l40s-16"], has_kv_transfer=has_kv_transfer, outages=outage if is_spot else ())
    one = Cell((step, replace(step, batch=replace(batch, step=2))), cluster, MODELS["qwen2.5-3b"], LeaseTimes())
    record = one.run(one.arm(arm))
    for done in record.steps:
        assert done.tokens == lengths.sum()
        assert done.prefill_tokens >= done.distinct_prompt_tokens - BLOCK_TOKENS * groups * 2
        assert done.gpu_s_busy + done.gpu_s_idle + done.gpu_s_startup == pytest.approx(done.gpu_s_allocated)
        assert done.step_s >= float((step.min_start_s + step.score_s).max())
    assert record.max_gpus <= cluster.num_gpus
