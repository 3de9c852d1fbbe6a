"""Finished samples are inferred once, in chunks that are worth it, and a failure costs no more than the fusion."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from transfer_queue import KVBatchMeta

from tests.unit.live.fusion_fakes import FakeQueue
from verl_rlhfless.errors import RlhflessError
from verl_rlhfless.live import fusion_loop as module
from verl_rlhfless.live.events import EventLog
from verl_rlhfless.live.fusion_loop import FusionLoop, FusionPorts, finished_samples
from verl_rlhfless.policy.fuse import CallCost


@dataclass
class Trainer:
    """What the loop acts through: two ranks, calls that take 0.1 s and nothing for a token."""

    left_s: float = 100.0
    chunks: list[list[str]] = field(default_factory=list)
    on_infer: Callable[[Callable[[], bool]], None] = lambda is_wanted: None

    def infer(self, batch: KVBatchMeta, is_wanted: Callable[[], bool]) -> None:
        self.on_infer(is_wanted)
        self.chunks.append(list(batch.keys))

    def ports(self) -> FusionPorts:
        return FusionPorts(self.infer, lambda: 2, lambda: CallCost(0.1, 0.001), lambda: self.left_s)


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> FakeQueue:
    made = FakeQueue()
    monkeypatch.setattr(module, "tq", made)
    monkeypatch.setattr(module, "_LOOK_S", 0.001)
    return made


def loop(trainer: Trainer) -> FusionLoop:
    return FusionLoop(3, trainer.ports(), EventLog(None))


def test_samples_are_taken_once_in_the_order_in_which_they_finished(queue: FakeQueue) -> None:
    trainer = Trainer()
    fusion = loop(trainer)
    queue.finish("b_0_0", "a_1_0", "b_1_0")
    fusion.look()
    assert trainer.chunks == [["b_0_0", "a_1_0"]], "the third one waits for a fourth"
    queue.finish("a_0_0")
    fusion.look()
    fusion.look()
    assert trainer.chunks[1:] == [["b_1_0", "a_0_0"]]
    assert fusion.work.num_chunks == 2


def test_groups_and_samples_without_fields_are_no_samples() -> None:
    tags = {"u": {"is_prompt": True, "status": "finished"}, "u_0_0": {"status": "success"}, "u_1_0": {}}
    assert list(finished_samples({"train": tags, "val": {"v_0_0": {"status": "success"}}})) == ["u_0_0"]


def test_nothing_starts_when_the_rollout_is_about_to_end(queue: FakeQueue) -> None:
    trainer = Trainer(left_s=0.05)
    queue.finish("a_0_0", "a_1_0")
    loop(trainer).look()
    assert trainer.chunks == []


def test_the_end_waits_for_the_chunk_that_runs_and_lets_no_further_phase_begin(queue: FakeQueue) -> None:
    began, may_go_on = threading.Event(), threading.Event()
    wanted: list[bool] = []

    def infer(is_wanted: Callable[[], bool]) -> None:
        wanted.append(is_wanted())
        began.set()
        assert may_go_on.wait(10)
        wanted.append(is_wanted())

    trainer = Trainer(on_infer=infer)
    queue.finish("a_0_0", "a_1_0")
    fusion = loop(trainer)
    fusion.begin()
    assert began.wait(10)
    with pytest.raises(RlhflessError, match=r"step 3: .*rlhfless\.fusion\.end_timeout_s=0\.01"):
        fusion.end(0.01)
    may_go_on.set()
    assert fusion.end(10).num_chunks == 1
    assert wanted == [True, False]
    queue.finish("b_0_0", "b_1_0")
    assert trainer.chunks == [["a_0_0", "a_1_0"]]
    assert fusion.end(10).num_chunks == 1, "ending twice changes nothing"


def test_a_chunk_that_fails_ends_the_fusion_of_the_step_and_is_told(
    queue: FakeQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    ended = threading.Event()

    def fail(is_wanted: Callable[[], bool]) -> None:
        raise RuntimeError("out of memory")

    def write(self: EventLog, event: str, **fields: Any) -> None:
        told.append((event, fields))
        ended.set()

    monkeypatch.setattr(EventLog, "write", write)
    queue.finish("a_0_0", "a_1_0")
    fusion = loop(Trainer(on_infer=fail))
    fusion.begin()
    assert ended.wait(10)
    work = fusion.end(10)
    assert work.failure == "RuntimeError: out of memory"
    assert told == [("fusion_failed", {"step": 3, "reason": work.failure})]
    assert work.num_chunks == 0
