"""Whatever the workload, capacity and moves: tokens and requests are conserved and nothing hangs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_rlhfless.policy.gpus import GPUS
from verl_rlhfless.policy.perf import EngineLimits, EnginePerf
from verl_rlhfless.policy.shapes import MODELS
from verl_rlhfless.sim.engine import Engine, Request

SHAPE, GPU = MODELS["qwen2.5-7b"], GPUS["L40S"]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(1, 600), st.integers(0, 4)), min_size=1, max_size=24),
    st.integers(1, 8),
    st.sampled_from([64, 512, 8192]),
    st.lists(st.tuples(st.floats(0, 20), st.integers(0, 23)), max_size=8),
)
def test_every_request_finishes_once_with_its_length_whatever_is_cut(
    requests: list[tuple[int, int, int]], seats: int, budget: int, cuts: list[tuple[float, int]]
) -> None:
    perf = EnginePerf(SHAPE, GPU, 1, limits=EngineLimits(max_num_seqs=seats, max_batched_tokens=budget + seats))
    env = simpy.Environment()
    done: dict[int, int] = {}
    engines: list[Engine] = []

    def leave(index: int, request: Request, is_cut: bool) -> None:
        if is_cut and request.generated < request.target:
            engines[1 - index].submit(request)
            return
        assert request.sample not in done
        done[request.sample] = request.generated

    engines += [Engine(env, perf, lambda r, cut, i=i: leave(i, r, cut)) for i in (0, 1)]
    prompts = {group: prompt for prompt, _, group in requests}  # siblings have one prompt
    for sample, (_, length, group) in enumerate(requests):
        engines[sample % 2].submit(Request(sample, group, prompts[group], length))
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
        assert engine.num_requests == 0
        assert engine.context_tokens == 0
        assert engine._blocks(0) == 0
        assert all(len(span) == 2 and span[0] <= span[1] for span in engine.busy)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 3000), min_size=2, max_size=30), st.floats(0.36, 0.5))
def test_blocks_in_use_never_exceed_the_capacity(lengths: list[int], share: float) -> None:
    perf = EnginePerf(SHAPE, GPU, 1, limits=replace(EngineLimits(), memory_utilization=share + 0.03))
    env = simpy.Environment()
    left: list[int] = []
    engine = Engine(env, perf, lambda request, is_cut: left.append(request.generated))
    for sample, length in enumerate(lengths):
        engine.submit(Request(sample, sample, 64, min(length, perf.kv_blocks * 16 - 96)))
    engine.start()
    while env.peek() < float("inf"):
        env.step()
        assert engine._blocks(0) <= perf.kv_blocks
    assert len(left) == len(lengths)
    assert np.array(sorted(left)).sum() == sum(min(n, perf.kv_blocks * 16 - 96) for n in lengths)
