"""Shared prefixes, turns, rewards and late prompts of a trace, on cases worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.unit.sim.cases import TWO_GPUS, cell, steps
from verl_rlhfless.policy.baselines.stock import StockSync
from verl_rlhfless.policy.dedup import batch_prefixes
from verl_rlhfless.policy.ours import Ours
from verl_rlhfless.policy.snapshot import SharedPrefix
from verl_rlhfless.sim.records import RunRecord, StepRecord
from verl_rlhfless.sim.workload import StepData, load_steps

PLAIN = steps(1, 4, 2, mean=300.0)[0]


def run(step: StepData, *, ours: bool = False) -> RunRecord:
    return cell((step,), TWO_GPUS).run(Ours() if ours else StockSync(1))


def first(step: StepData) -> StepRecord:
    return run(step).steps[0]


def test_what_groups_share_is_computed_once_per_replica() -> None:
    prefix = SharedPrefix("system", 96)
    shared = replace(PLAIN, batch=replace(PLAIN.batch, prefixes=(prefix, prefix, None, prefix)))
    plain, record = first(PLAIN), first(shared)
    assert plain.distinct_prompt_tokens == 4 * 120
    assert record.distinct_prompt_tokens == 4 * 120 - 2 * 96
    # stock spreads siblings, so that each of two replicas sees all four prompts: a later prompt finds 96 tokens
    assert plain.prefill_tokens - record.prefill_tokens == 2 * 2 * 96


def test_of_two_lengths_of_one_prefix_the_longer_holds_the_shorter() -> None:
    prefixes = (SharedPrefix("s", 100), SharedPrefix("s", 40), SharedPrefix("s", 100), None)
    found = batch_prefixes(replace(PLAIN.batch, prefixes=prefixes))
    assert found.num_tokens == 100 + 20 + 80 + 20 + 120
    assert [end for _, end in found.chain(0)] == [40, 100, 120]
    assert [end for _, end in found.chain(1)] == [40, 120]
    assert [end for _, end in found.chain(3)] == [120]


def test_the_update_waits_for_the_last_reward_and_inference_hides_the_others() -> None:
    last = int(np.argmax(PLAIN.lengths))
    score_s = np.zeros(8)
    score_s[last] = 50.0
    plain, scored = run(PLAIN), run(replace(PLAIN, score_s=score_s))
    wait = scored.steps[0].score_wait_s
    assert 45.0 < wait < 50.0
    assert scored.steps[0].step_s == pytest.approx(plain.steps[0].step_s + wait)
    assert scored.steps[0].gpu_s_idle == pytest.approx(plain.steps[0].gpu_s_idle + 2 * wait)
    hidden = run(replace(PLAIN, score_s=np.full(8, 0.1)))
    assert hidden.steps[0].score_wait_s == 0.0
    assert hidden.steps[0].step_s == plain.steps[0].step_s


@pytest.mark.parametrize("ours", [False, True])
def test_a_late_prompt_starts_no_earlier_than_it_may(ours: bool) -> None:
    late = np.zeros(8)
    late[:2] = 200.0
    record = run(replace(PLAIN, min_start_s=late), ours=ours).steps[0]
    assert record.step_s > 200.0
    assert record.tokens == PLAIN.lengths.sum()
    assert run(replace(PLAIN, min_start_s=np.full(8, 1e-3)), ours=ours).steps[0].tokens == PLAIN.lengths.sum()


@pytest.mark.parametrize("ours", [False, True])
def test_turns_generate_the_same_tokens_and_compute_only_what_fell_out_of_the_cache(ours: bool) -> None:
    ends = {sample: (length // 2, length) for sample, length in enumerate(PLAIN.lengths.tolist()) if length > 1}
    plain, record = run(PLAIN, ours=ours).steps[0], run(replace(PLAIN, turn_ends=ends), ours=ours).steps[0]
    assert record.tokens == plain.tokens
    extra = record.prefill_tokens - plain.prefill_tokens
    # ours may move a session to another replica, which computes all of it once more
    assert len(ends) <= extra <= (sum(120 + half for half, _ in ends.values()) if ours else 16 * len(ends))


def test_moved_keys_and_values_are_not_computed_again() -> None:
    long = steps(2, 64, 8, mean=2500.0, cap=16384)
    plain = cell(long)
    copying = replace(plain, cluster=replace(plain.cluster, has_kv_transfer=True))
    recomputed, copied = (one.run(one.arm("ours_nofuse")) for one in (plain, copying))
    assert sum(step.num_migrations for step in copied.steps) > 0
    per_move = [
        (sum(s.prefill_tokens - s.distinct_prompt_tokens for s in record.steps))
        / max(1, sum(s.num_migrations for s in record.steps))
        for record in (recomputed, copied)
    ]
    assert per_move[1] < 0.5 * per_move[0]
    assert [s.tokens for s in copied.steps] == [int(data.lengths.sum()) for data in long]


def test_every_optional_field_of_a_trace_reaches_the_simulator(tmp_path: Path) -> None:
    header = {"format": "rlhfless-trace/1", "name": "t", "unit": "tokens", "max_response_tokens": 50, "n": 2}
    header |= {"kind": "composed", "source": "s", "licence": "l", "note": ""}
    rich = {"prefix_id": "sys", "prefix_tokens": 32, "turns": [[3, 0, 4], [9]], "score_s": 1.5, "min_start_s": 2}
    groups = [
        {"prompt_id": "a", "prompt_tokens": 40, "response_tokens": [7, 9]} | rich,
        {"prompt_id": "b", "prompt_tokens": 40, "response_tokens": [0]},
    ]
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(header) + "\n" + json.dumps({"step": 1, "epoch": 1, "groups": groups}) + "\n")
    (step,) = load_steps(path)
    assert step.batch.prefixes == (SharedPrefix("sys", 32), None)
    assert step.lengths.tolist() == [7, 9, 1]
    assert step.turn_ends == {0: (3, 7)}
    assert step.score_s is not None
    assert step.score_s.tolist() == [1.5, 1.5, 0.0]
    assert step.min_start_s is not None
    assert step.min_start_s.tolist() == [2.0, 2.0, 0.0]
