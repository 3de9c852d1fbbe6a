"""Inference beside the rollout: a thread that looks for finished samples and has chunks of them inferred.

verl's thread waits in its replay buffer meanwhile and calls no worker, so the trainer's worker groups are this thread's
until ``end`` returns.

Invariants: a sample is taken once; a chunk that fails ends the step's fusion, is reported, and leaves the step to
compute what it would have computed without.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import transfer_queue as tq
from transfer_queue import KVBatchMeta

from verl_rlhfless.errors import RlhflessError
from verl_rlhfless.live.events import EventLog
from verl_rlhfless.live.fusion_recall import num_tokens
from verl_rlhfless.policy.fuse import CallCost, next_chunk

logger = logging.getLogger(__name__)

_PARTITION = "train"
_LOOK_S = 0.2  # a look asks the queue for its keys, about a millisecond


@dataclass(frozen=True, slots=True)
class FusionPorts:
    """What the loop acts through.

    Attributes:
        infer: Runs every phase on a chunk; before each one it asks whether it is still wanted.
        quantum: Returns what the number of samples of a chunk must be a multiple of.
        cost: Returns the measured cost of a chunk, if there is one.
        remaining_s: Returns the predicted seconds until the rollout ends.
    """

    infer: Callable[[KVBatchMeta, Callable[[], bool]], None]
    quantum: Callable[[], int]
    cost: Callable[[], CallCost | None]
    remaining_s: Callable[[], float]


@dataclass(slots=True)
class FusedWork:
    """What was done in one step.

    Attributes:
        num_chunks: Chunks that were inferred.
        infer_s: Seconds that they took.
        wait_s: Seconds that the step waited for the last one.
        failure: Why fusion ended early; empty when it did not.
    """

    num_chunks: int = 0
    infer_s: float = 0.0
    wait_s: float = 0.0
    failure: str = ""


@dataclass(slots=True)
class FusionLoop:
    """The thread of one rollout.

    Attributes:
        step: Training step.
        ports: What it acts through.
        events: Where every chunk is noted.
        work: What it did; complete when ``end`` has returned.
    """

    step: int
    ports: FusionPorts
    events: EventLog
    work: FusedWork = field(default_factory=FusedWork)
    _finished: dict[str, dict[str, Any]] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)
    _is_ending: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def begin(self) -> None:
        """Start to look for finished samples."""
        self._thread = threading.Thread(target=self._run, name="rlhfless-fusion", daemon=True)
        self._thread.start()

    def end(self, timeout_s: float) -> FusedWork:
        """Return what was done, when the call that runs has ended. Safe to call twice.

        Raises:
            RlhflessError: It did not end within ``timeout_s``.
        """
        self._is_ending.set()
        if self._thread is not None:
            began_s = time.monotonic()
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise RlhflessError(
                    f"step {self.step}: fused inference went on after the rollout for more than "
                    f"rlhfless.fusion.end_timeout_s={timeout_s:g}. Look for the trainer workers' errors above, "
                    "raise it, or set rlhfless/fusion=off."
                )
            self.work.wait_s += time.monotonic() - began_s
            self._thread = None
        return self.work

    def _run(self) -> None:
        try:
            while not self._is_ending.wait(_LOOK_S):
                self.look()
        except Exception as error:  # noqa: BLE001  recorded; the step computes what is missing, and fails if it can't
            self.work.failure = f"{type(error).__name__}: {error}"
            self.events.write("fusion_failed", step=self.step, reason=self.work.failure)
            logger.warning(
                "rlhfless: step %d: fused inference ended, the rest follows the rollout: %s", self.step, error
            )

    def look(self) -> None:
        """Infer the next chunk, if one is worth it now."""
        self._finished.update(finished_samples(tq.kv_list(_PARTITION) or {}))
        waiting = {key: tag for key, tag in self._finished.items() if key not in self._taken}
        tokens = np.array([tag["seq_len"] for tag in waiting.values()], dtype=np.int64)
        count = next_chunk(tokens, self.ports.quantum(), self.ports.cost(), self.ports.remaining_s())
        if not count:
            return
        keys = list(waiting)[:count]
        self._taken.update(keys)
        batch = KVBatchMeta(partition_id=_PARTITION, keys=keys, tags=[waiting[key] for key in keys])
        began_s = time.monotonic()
        self.ports.infer(batch, lambda: not self._is_ending.is_set())
        seconds = time.monotonic() - began_s
        self.work.num_chunks += 1
        self.work.infer_s += seconds
        self.events.write("fused", step=self.step, samples=count, tokens=num_tokens(batch), seconds=seconds)


def finished_samples(listed: Mapping[str, Mapping[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the tags of samples that are in the training partition with all their fields, by key.

    A sample's tags arrive after its fields. verl keeps groups there too, whose status is another word.
    """
    entries = listed.get(_PARTITION, {})
    return {key: tag for key, tag in entries.items() if tag.get("status") == "success"}
