"""Whatever the model, the GPU and the batch: more work never takes less time, and closed forms are what they sum up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.policy.test_shapes import shape
from verl_rlhfless.policy.gpus import GPUS
from verl_rlhfless.policy.perf import EngineLimits, EnginePerf
from verl_rlhfless.policy.shapes import MODELS
from verl_rlhfless.policy.transitions import RECIPES, TrainerPerf

KINDS = ("Gemma-2-9B", "Mistral-7B", "DeepSeek-V2-Lite", "Nemotron-H-8B")  # windows, nothing else, latents, states
ENGINES = st.builds(
    EnginePerf,
    st.sampled_from([MODELS["qwen2.5-3b"], MODELS["qwen2.5-7b"], *map(shape, KINDS)]),
    st.sampled_from([GPUS["L40S"], GPUS["H100"]]),
    st.sampled_from([1, 2, 4]),
    limits=st.just(EngineLimits(max_num_seqs=64)),
)
TRAINERS = st.builds(
    TrainerPerf,
    st.just(MODELS["qwen2.5-7b"]),
    st.sampled_from([GPUS["L40S"], GPUS["H100"]]),
    st.sampled_from([2, 8, 16]),
    st.just(8),
    st.sampled_from([*RECIPES.values()]),
)
BATCH, CONTEXT, TOKENS = st.integers(0, 64), st.integers(0, 200_000), st.integers(0, 4096)
MORE = st.tuples(st.integers(0, 200), st.integers(0, 50_000), st.integers(0, 2000), st.integers(0, 10**6))


@given(ENGINES, BATCH, CONTEXT, TOKENS, st.integers(0, 10**6), MORE)
def test_an_iteration_with_more_to_do_never_takes_less(
    perf: EnginePerf, decodes: int, context: int, prefill: int, attended: int, more: tuple[int, int, int, int]
) -> None:
    work = (decodes, context, prefill, attended if prefill else 0)
    before_s = perf.iteration_s(*work)
    assert before_s > 0
    for part, added in enumerate(more):
        bigger = [count + added * (at == part) for at, count in enumerate(work)]
        assert perf.iteration_s(*bigger) >= before_s * (1 - 1e-12)


@given(ENGINES, st.integers(1, 64), CONTEXT, st.integers(0, 300), st.floats(0.01, 0.99))
def test_a_run_of_iterations_takes_their_sum_and_as_many_end_within_that_time(
    perf: EnginePerf, decodes: int, context: int, count: int, share: float
) -> None:
    seconds = perf.decode_s(decodes, context, count)
    each_s = [perf.iteration_s(decodes, context + i * decodes) for i in range(count + 1)]
    assert seconds == pytest.approx(sum(each_s[:count]))
    assert perf.iterations_within(decodes, context, seconds) == count
    assert perf.iterations_within(decodes, context, seconds + share * each_s[count]) == count


@given(ENGINES, st.floats(0, 300), st.floats(1, 30_000), st.floats(0, 100), st.floats(0, 10_000))
def test_requests_that_share_an_engine_never_get_a_token_sooner_than_fewer_with_shorter_contexts(
    perf: EnginePerf, batch: float, context: float, more_requests: float, more_context: float
) -> None:
    def seconds(requests: float, tokens: float) -> float:
        return float(perf.fluid_iteration_s(np.array(requests), np.array(tokens)))

    assert 0 < seconds(batch, context) <= seconds(batch + more_requests, context) * (1 + 1e-9)
    assert seconds(batch, context) <= seconds(batch, context + more_context) * (1 + 1e-9)


@given(ENGINES, st.integers(1, 63), st.floats(0, 1), st.integers(1, 500))
def test_what_fits_decodes_as_an_iteration_of_the_engine_and_a_mean_of_requests_as_the_mean(
    perf: EnginePerf, requests: int, part: float, context: int
) -> None:
    one_s, next_s = (perf.iteration_s(count, count * context) for count in (requests, requests + 1))
    seconds = float(perf.fluid_iteration_s(np.array(requests + part), np.array(float(context))))
    assert seconds == pytest.approx((1 - part) * one_s + part * next_s)


@given(ENGINES, st.floats(0, 50_000), st.floats(0, 10_000))
def test_a_transfer_never_makes_a_move_longer_nor_a_longer_context_shorter(
    perf: EnginePerf, tokens: float, more: float
) -> None:
    with_transfer, without = (perf.move_s(tokens, has_transfer) for has_transfer in (True, False))
    assert 0 <= with_transfer <= without == tokens * perf.prefill_s_per_token
    assert with_transfer <= perf.move_s(tokens + more, True)


@given(TRAINERS, st.floats(1, 1e7), st.floats(1, 1e7), st.floats(1, 20_000), st.floats(0, 20_000))
def test_phases_take_more_for_more_tokens_and_less_in_one_than_in_parts(
    trainer: TrainerPerf, tokens: float, others: float, context: float, more: float
) -> None:
    assert trainer.inference_s(0.0, context) == 0.0
    for phase in (trainer.inference_s, trainer.update_s):
        whole_s, part_s = phase(tokens + others, context), phase(tokens, context)
        assert 0 < part_s <= whole_s <= (part_s + phase(others, context)) * (1 + 1e-9)
        assert phase(tokens, context + more) >= part_s
    assert replace(trainer, slowness=2.0).update_s(tokens, context) == pytest.approx(
        2 * trainer.update_s(tokens, context)
    )


@settings(max_examples=40)
@given(TRAINERS, st.sampled_from([*RECIPES]), st.floats(1, 1e7))
def test_no_recipe_takes_less_than_grpo_and_more_gpus_hold_less_each(
    trainer: TrainerPerf, recipe: str, tokens: float
) -> None:
    least, other = (replace(trainer, recipe=RECIPES[name]) for name in ("grpo", recipe))
    for name in ("reshard_s", "publish_s", "state_copy_s", "fuse_load_s", "fuse_bytes"):
        assert 0 < getattr(least, name) <= getattr(other, name)
    assert least.update_s(tokens, 1000) <= other.update_s(tokens, 1000)
    assert least.inference_s(tokens, 1000) <= other.inference_s(tokens, 1000)
    assert least.fuse_tokens_per_s(1000) >= other.fuse_tokens_per_s(1000) > 0
    twice = replace(other, num_gpus=2 * other.num_gpus)
    assert twice.state_copy_s * 2 == pytest.approx(other.state_copy_s)


@given(ENGINES, st.lists(st.integers(1, 20_000), min_size=1, max_size=20))
def test_reads_of_a_mean_context_are_at_least_those_of_its_requests(perf: EnginePerf, contexts: list[int]) -> None:
    alone_s = sum(perf.iteration_s(1, context) - perf.iteration_s(1, 0) for context in contexts)
    together_s = perf.iteration_s(len(contexts), sum(contexts)) - perf.iteration_s(len(contexts), 0)
    assert together_s >= alone_s - 1e-12


@given(ENGINES, st.integers(1, 500), st.integers(0, 500))
def test_more_requests_have_no_more_blocks_together(perf: EnginePerf, requests: int, more: int) -> None:
    assert 0 <= perf.blocks_of(requests + more) <= perf.blocks_of(requests)
