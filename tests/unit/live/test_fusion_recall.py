"""What was inferred once is not inferred again, and arrives where verl looks for it."""

from __future__ import annotations

import pytest
import torch

from tests.unit.live.fusion_fakes import FakeGroup, FakeQueue
from verl_rlhfless.live import fusion_recall as module
from verl_rlhfless.live.fusion_recall import InferenceMemory, Phase, RecallingGroup

FIELDS = ("log_probs", "entropy")
OLD = Phase("_compute_old_log_prob", "actor_rollout_wg", "compute_log_prob", "actor", FIELDS)
REF = Phase("_compute_ref_log_prob", "ref_policy_wg", "compute_ref_log_prob", "ref", ("log_probs",))
KEYS = tuple(f"u{group}_{session}_0" for group in range(2) for session in range(4))


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> FakeQueue:
    made = FakeQueue()
    monkeypatch.setattr(module, "tq", made)
    made.finish(*KEYS)
    return made


@pytest.fixture
def group(queue: FakeQueue) -> FakeGroup:
    return FakeGroup(queue, FIELDS)


def fuse(memory: InferenceMemory, group: FakeGroup, phase: Phase, batch: module.KVBatchMeta) -> None:
    memory.is_open = True
    getattr(RecallingGroup(group, phase, memory), phase.call)(batch)
    memory.is_open = False


def test_the_final_call_computes_only_what_is_missing(queue: FakeQueue, group: FakeGroup) -> None:
    memory = InferenceMemory()
    fuse(memory, group, OLD, queue.batch(*KEYS[:4]))
    output = RecallingGroup(group, OLD, memory).compute_log_prob(queue.batch(*KEYS))
    assert len(output) == len(KEYS)
    assert sorted(group.calls[1]) == sorted(KEYS[4:])
    assert (memory.of(OLD).num_recalled, memory.of(OLD).num_computed) == (4, 4)


def test_every_sample_gets_its_own_result_whatever_the_order_of_the_batch(queue: FakeQueue, group: FakeGroup) -> None:
    memory = InferenceMemory()
    fuse(memory, group, OLD, queue.batch(*KEYS[3::-1]))
    for key in KEYS:
        queue.fields[key].pop("log_probs", None)
        queue.fields[key].pop("entropy", None)
    group.factor = 7.0  # tells what is computed now from what is recalled
    RecallingGroup(group, OLD, memory).compute_log_prob(queue.batch(*KEYS[::-1]))
    for number, key in enumerate(KEYS):
        factor = 1.0 if number < 4 else 7.0
        ids = queue.fields[key]["input_ids"]
        assert torch.equal(queue.fields[key]["log_probs"], ids * factor)
        assert torch.equal(queue.fields[key]["entropy"], ids * factor * 2)


def test_a_later_phase_under_the_same_field_does_not_replace_an_earlier_one(queue: FakeQueue, group: FakeGroup) -> None:
    memory, reference = InferenceMemory(), FakeGroup(queue)
    reference.factor = 5.0
    batch = queue.batch(*KEYS[:2])
    fuse(memory, group, OLD, batch)
    fuse(memory, reference, REF, batch)
    RecallingGroup(group, OLD, memory).compute_log_prob(batch)
    assert torch.equal(queue.fields[KEYS[0]]["log_probs"], queue.fields[KEYS[0]]["input_ids"] * 1.0)
    RecallingGroup(reference, REF, memory).compute_ref_log_prob(batch)
    assert torch.equal(queue.fields[KEYS[0]]["log_probs"], queue.fields[KEYS[0]]["input_ids"] * 5.0)
    assert len(group.calls) == len(reference.calls) == 1


@pytest.mark.parametrize(("asked", "computed"), [(KEYS[1:6], 2), (KEYS[:5], 2), (KEYS[:4], 0)])
def test_known_samples_fill_a_rest_that_ranks_can_not_share_evenly(
    queue: FakeQueue, group: FakeGroup, asked: tuple[str, ...], computed: int
) -> None:
    memory = InferenceMemory()
    fuse(memory, group, OLD, queue.batch(*KEYS[:4]))
    RecallingGroup(group, OLD, memory).compute_log_prob(queue.batch(*asked))
    last = group.calls[1] if computed else []
    assert len(last) == computed
    assert set(asked) - set(KEYS[:4]) <= set(last)


def test_without_anything_known_the_call_is_verls_own(queue: FakeQueue, group: FakeGroup) -> None:
    RecallingGroup(group, OLD, InferenceMemory()).compute_log_prob(queue.batch(*KEYS))
    assert group.calls == [list(KEYS)], "not even the order differs"


def test_when_all_is_known_no_worker_is_called(queue: FakeQueue, group: FakeGroup) -> None:
    memory = InferenceMemory()
    fuse(memory, group, OLD, queue.batch(*KEYS))
    output = RecallingGroup(group, OLD, memory).compute_log_prob(queue.batch(*KEYS))
    assert len(group.calls) == 1
    assert output.futures == [], "verl waits for the critic's"


def test_a_call_that_fails_is_not_remembered(queue: FakeQueue, group: FakeGroup) -> None:
    memory = InferenceMemory()
    group.failure = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        fuse(memory, group, OLD, queue.batch(*KEYS[:4]))
    assert not memory.of(OLD).results


def test_nothing_is_known_in_the_next_step_but_what_a_call_costs(queue: FakeQueue, group: FakeGroup) -> None:
    memory = InferenceMemory()
    assert memory.cost([OLD, REF]) is None
    fuse(memory, group, OLD, queue.batch(*KEYS))
    assert memory.cost([OLD]) is not None and memory.cost([OLD, REF]) is None
    memory.clear()
    RecallingGroup(group, OLD, memory).compute_log_prob(queue.batch(*KEYS))
    assert len(group.calls) == 2
    assert memory.cost([OLD]) is not None


def test_ranks_share_the_tokens_of_a_chunk(queue: FakeQueue, group: FakeGroup) -> None:
    for key, tokens in zip(KEYS[:4], (100, 90, 10, 5), strict=True):
        queue.tags[key]["seq_len"] = tokens
    fuse(InferenceMemory(), group, OLD, queue.batch(*KEYS[:4]))
    (first, second) = group.calls[0][:2], group.calls[0][2:]
    assert {frozenset(first), frozenset(second)} == {frozenset({KEYS[0], KEYS[3]}), frozenset({KEYS[1], KEYS[2]})}


def test_everything_else_of_the_group_is_its_own(group: FakeGroup) -> None:
    assert RecallingGroup(group, OLD, InferenceMemory()).world_size == 2
    with pytest.raises(AttributeError):
        _ = RecallingGroup(group, OLD, InferenceMemory()).no_such_method


def test_static_micro_batches_make_the_quantum_larger(group: FakeGroup) -> None:
    static = Phase(OLD.method, OLD.group, OLD.call, OLD.mesh, OLD.fields, micro_batch=8)
    assert (OLD.quantum(group), static.quantum(group)) == (2, 16)
