"""The simulated engine against cases worked out by hand from the performance model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import simpy

from tests.unit.sim.cases import request
from verl_rlhfless.policy.gpus import GPUS
from verl_rlhfless.policy.layers import Recurrent, Window
from verl_rlhfless.policy.perf import EngineLimits, EnginePerf
from verl_rlhfless.policy.shapes import MODELS
from verl_rlhfless.sim.engine import Engine
from verl_rlhfless.sim.request import Request, chain_of

PERF = EnginePerf(MODELS["qwen2.5-7b"], GPUS["L40S"], 1)


def run(requests: list[Request], perf: EnginePerf = PERF) -> tuple[Engine, dict[int, float], float]:
    """Return the engine, when each sample finished, and the end of the simulation."""
    env = simpy.Environment()
    ends: dict[int, float] = {}

    def left(one: Request, is_cut: bool) -> None:
        assert not is_cut
        assert one.generated == one.target
        ends[one.sample] = env.now

    engine = Engine(env, perf, left)
    for one in requests:
        engine.submit(one)
    engine.start()
    env.run()
    return engine, ends, env.now


def test_one_request_takes_its_prefill_and_one_iteration_per_further_token() -> None:
    _, ends, _ = run([request(0, 0, 100, 11)])
    prefill = PERF.iteration_s(0, 0, 100, 100 * 101 // 2)
    decode = sum(PERF.iteration_s(1, 101 + i) for i in range(10))
    assert ends[0] == pytest.approx(prefill + decode, rel=1e-9)


def test_two_requests_share_iterations_until_the_shorter_one_ends() -> None:
    _, ends, _ = run([request(0, 0, 64, 5), request(1, 1, 64, 9)])
    first = PERF.iteration_s(0, 0, 128, 2 * 64 * 65 // 2)
    both = sum(PERF.iteration_s(2, 2 * (65 + i)) for i in range(4))
    alone = sum(PERF.iteration_s(1, 69 + i) for i in range(4))
    assert ends[0] == pytest.approx(first + both, rel=1e-9)
    assert ends[1] == pytest.approx(first + both + alone, rel=1e-9)


def test_siblings_on_one_engine_prefill_full_blocks_of_their_prompt_once() -> None:
    engine, _, _ = run([request(i, 0, 100, 4) for i in range(8)])
    assert engine.prefill_tokens == 100 + 7 * (100 - 96)
    apart, _, _ = run([request(i, i, 100, 4) for i in range(8)])
    assert apart.prefill_tokens == 800


def test_a_shared_system_prompt_is_computed_once() -> None:
    engine, _, _ = run([Request(i, 100, 2, chain_of(((99, 64), (i, 100)))) for i in range(4)])
    assert engine.prefill_tokens == 100 + 3 * 36


def test_prefixes_nest_over_several_levels() -> None:
    chains = [((90, 64), (91, 128), (0, 200)), ((90, 64), (91, 128), (1, 200)), ((90, 64), (2, 200))]
    engine, _, _ = run([Request(i, 200, 2, chain_of(chain)) for i, chain in enumerate(chains)])
    assert engine.prefill_tokens == 200 + 72 + 136


@pytest.mark.parametrize(("turn", "again"), [(41, 13), (28, 1)])
def test_the_next_turn_of_a_session_computes_only_what_is_not_in_full_blocks(turn: int, again: int) -> None:
    env = simpy.Environment()
    done: list[int] = []

    def left(one: Request, is_cut: bool) -> None:
        done.append(one.generated)
        if len(done) == 1:
            one.target, one.is_last_turn = turn + 10, True
            engine.submit(one)

    engine = Engine(env, PERF, left)
    session = request(0, 0, 100, turn)
    session.is_last_turn = False
    engine.submit(session)
    engine.start()
    env.run()
    assert done == [turn, turn + 10]
    assert engine.prefill_tokens == 100 + again  # 128 of 141 tokens lie in full blocks


def test_idle_prefixes_make_room_oldest_first() -> None:
    small = EnginePerf(PERF.shape, PERF.gpu, 1, limits=replace(PERF.limits, memory_utilization=0.40))
    prompt = small.kv_blocks * 16 * 2 // 5
    engine, _, _ = run([request(i, i, prompt, 2) for i in range(3)] + [request(3, 2, prompt, 2)], small)
    assert engine.prefill_tokens < 3 * prompt + 16
    again = [request(i, i, prompt, 2) for i in range(4)] + [request(4, 0, prompt, 2)]
    engine, _, _ = run(again, small)
    assert engine.prefill_tokens == 5 * prompt


def test_a_long_prompt_is_prefilled_in_chunks_while_others_decode() -> None:
    perf = EnginePerf(PERF.shape, PERF.gpu, 1, limits=EngineLimits(max_batched_tokens=512))
    _, ends, _ = run([request(0, 0, 1200, 1)], perf)
    chunks = [(512, 0), (512, 512), (176, 1024)]
    expected = sum(perf.iteration_s(0, 0, n, n * start + n * (n + 1) // 2) for n, start in chunks)
    assert ends[0] == pytest.approx(expected, rel=1e-9)


def test_no_more_than_max_num_seqs_run_at_once() -> None:
    perf = EnginePerf(PERF.shape, PERF.gpu, 1, limits=EngineLimits(max_num_seqs=2))
    _, ends, _ = run([request(i, i, 16, 100) for i in range(4)], perf)
    assert ends[2] > ends[1]
    assert ends[3] == pytest.approx(2 * ends[1], rel=0.05)


def test_running_out_of_blocks_preempts_the_youngest_and_recomputes_it() -> None:
    small = replace(PERF.limits, memory_utilization=0.40)
    perf = EnginePerf(PERF.shape, PERF.gpu, 1, limits=small)
    tokens = perf.kv_blocks * 16
    engine, ends, _ = run([request(i, i, tokens // 8, tokens // 3) for i in range(3)], perf)
    assert engine.num_preemptions >= 1
    assert len(ends) == 3
    assert max(ends, key=lambda s: ends[s]) == 2
    assert engine.prefill_tokens > 3 * (tokens // 8)


def test_states_bound_how_many_run_at_once() -> None:
    plain = replace(PERF, shape=replace(PERF.shape, attention=14))
    held = plain.kv_blocks * 16 * plain.shape.kv_bytes_per_token
    shape = replace(plain.shape, recurrent=Recurrent(14, 0, int(held / 3.5 / 2 / 14), ()))  # three and a half pairs
    perf = replace(plain, shape=shape)
    engine, ends, _ = run([request(i, i, 100, 50) for i in range(6)], perf)
    assert min(ends[i] for i in (3, 4, 5)) > max(ends[i] for i in (0, 1, 2))
    assert engine.prefill_tokens == 6 * 100 and engine.num_preemptions == 0


def test_windows_leave_room_for_contexts_that_would_preempt_others() -> None:
    small = replace(PERF, limits=replace(PERF.limits, memory_utilization=0.40))
    tokens = small.kv_blocks * 16
    perf = replace(small, shape=replace(small.shape, window=Window(1024, 14)))
    requests = [(tokens // 8, tokens // 3)] * 3
    assert run([request(i, i, *sizes) for i, sizes in enumerate(requests)], small)[0].num_preemptions
    assert not run([request(i, i, *sizes) for i, sizes in enumerate(requests)], perf)[0].num_preemptions


def test_a_request_that_can_never_fit_is_an_error_not_a_hang() -> None:
    perf = EnginePerf(PERF.shape, PERF.gpu, 1, limits=replace(PERF.limits, memory_utilization=0.40))
    with pytest.raises(ValueError, match="does not fit"):
        run([request(0, 0, perf.kv_blocks * 16 + 16, 4)], perf)


def test_an_abort_takes_effect_at_the_next_iteration_and_keeps_the_tokens() -> None:
    env = simpy.Environment()
    left: list[tuple[int, bool, int, float]] = []
    engine = Engine(env, PERF, lambda r, cut: left.append((r.sample, cut, r.generated, env.now)))
    engine.submit(request(0, 0, 64, 1000))
    engine.submit(request(1, 1, 64, 1000))
    engine.start()
    env.run(until=5.0)
    before = dict(zip(*engine.progress(), strict=True))
    engine.abort({0})
    env.run()
    sample, is_cut, generated, when = left[0]
    assert (sample, is_cut) == (0, True)
    assert generated == before[0] + 1
    assert 5.0 <= when <= 5.0 + PERF.iteration_s(2, 2500)
    assert left[1][:3] == (1, False, 1000)


def test_an_engine_that_is_lost_keeps_what_the_journal_had_one_interval_ago() -> None:
    def running(until_s: float) -> Engine:
        env = simpy.Environment()
        engine = Engine(env, PERF, lambda request, is_cut: None)
        for sample in (0, 1):
            engine.submit(request(sample, sample, 64, 1000))
        engine.start()
        env.run(until=until_s)
        return engine

    samples, journaled = running(19.5).progress()
    left = running(20.0).kill(0.5)
    assert {one.sample: one.generated for one in left} == dict(zip(samples.tolist(), journaled.tolist(), strict=True))
    assert all(one.generated < running(20.0).progress()[1][0] for one in left)


def test_requests_of_one_length_decode_together_and_end_together() -> None:
    count, length = 64, 400
    engine, ends, end = run([request(i, i, 32, length) for i in range(count)])
    prefill_s = PERF.iteration_s(0, 0, count * 32, count * 32 * 33 // 2)
    decode_s = sum(PERF.iteration_s(count, count * (33 + i)) for i in range(length - 1))
    assert set(ends.values()) == {end} and end == pytest.approx(prefill_s + decode_s, rel=1e-9)
    assert engine.busy == [[0, end]]
