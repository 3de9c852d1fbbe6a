"""The activity log of one vLLM engine: when it was busy, what it computed, and when it loaded weights.

JSON Lines, one file per engine and lease, written by rank 0 of its workers. Times are ``time.time()`` seconds.

Invariants: an engine is busy from the start of the first iteration that computes a request until the scheduler reports
that no request runs any more. After each iteration everything older than a second is on disk, so a crash costs at most
the last second; a torn last line is no error.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import time
from typing import IO, Any

from verl_rlhfless.errors import DataError
from verl_rlhfless.live.iteration import Iteration
from verl_rlhfless.live.pacing import NOT_PACED, PacedTime
from verl_rlhfless.live.variables import LEASE_VARIABLE

FLUSH_INTERVAL_S = 1.0
"""Longest time that a busy engine keeps a record in memory."""


@dataclass(frozen=True, slots=True)
class EngineSpan:
    """A time in which an engine had at least one running request.

    Attributes:
        start_s: Start of its first iteration.
        end_s: When the scheduler reported that all requests ended, else the end of the last recorded iteration.
        iterations: Engine iterations.
        prefill_tokens: Prompt tokens computed.
        decode_tokens: Response tokens sampled, the first token of each response included.
        finished: Requests that ended, aborted ones included.
        declared_s: Sum of the paced iterations' declared times; 0 when the engine is not paced.
        overruns: Paced iterations that missed their declared end.
        overrun_s: By how much, in total.
    """

    start_s: float
    end_s: float
    iterations: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    finished: int = 0
    declared_s: float = 0.0
    overruns: int = 0
    overrun_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineLog:
    """Everything that one engine's log holds.

    Attributes:
        pid: Process id of the worker that wrote it.
        lease: Lease that the engine runs on or on a part of (:data:`LEASE_VARIABLE`); ``None`` when not told.
        replica_rank: verl's rank of the replica; ``None`` outside verl.
        tp: Tensor-parallel size.
        started_s: When the worker started.
        busy: Spans in order; they neither overlap nor touch.
        loaded_s: When each weight load was complete.
    """

    pid: int
    lease: str | None
    replica_rank: int | None
    tp: int
    started_s: float
    busy: tuple[EngineSpan, ...]
    loaded_s: tuple[float, ...]


class EngineLogWriter:
    """Turns iterations into busy spans and appends them to a file about once a second."""

    def __init__(self, directory: Path, tp: int, clock: Callable[[], float] = time) -> None:
        self._directory, self._tp, self._clock = directory, tp, clock
        self._file = _create(directory)
        self._span: EngineSpan | None = None
        rank = os.environ.get("VERL_REPLICA_RANK")
        self._write(
            {
                "event": "engine",
                "pid": os.getpid(),
                "lease": os.environ.get(LEASE_VARIABLE),
                "replica_rank": None if rank is None else int(rank),
                "tp": tp,
                "t": clock(),
            }
        )

    def begin(self, iteration: Iteration) -> None:
        """Record that the engine is about to compute ``iteration``, or was only told which requests finished."""
        now_s = self._clock()
        if self._span is None and iteration.num_requests:
            self._span = EngineSpan(now_s, now_s)
        if self._span is None:
            return
        self._span = replace(self._span, finished=self._span.finished + iteration.num_finished)
        if not iteration.num_running:
            self._write_span(replace(self._span, end_s=now_s))
            self._span = None

    def end(self, iteration: Iteration, paced: PacedTime = NOT_PACED) -> None:
        """Record that ``iteration`` has been computed, and waited for when the engine is paced."""
        span = self._span
        if span is None or not iteration.num_requests:
            return
        span = replace(
            span,
            end_s=self._clock(),
            iterations=span.iterations + 1,
            prefill_tokens=span.prefill_tokens + iteration.prefill_tokens,
            decode_tokens=span.decode_tokens + iteration.sampled_tokens,
            declared_s=span.declared_s + paced.declared_s,
            overruns=span.overruns + (paced.overrun_s > 0),
            overrun_s=span.overrun_s + paced.overrun_s,
        )
        if span.end_s - span.start_s >= FLUSH_INTERVAL_S:
            self._write_span(span)
            span = EngineSpan(span.end_s, span.end_s)  # the same time: a reader joins records that touch
        self._span = span

    def successor(self) -> EngineLogWriter:
        """End this log, of an engine that rests, and return the one for the lease that the environment names now."""
        if self._span is not None:
            self._write_span(self._span)  # its requests were aborted, and the worker was not told
        self._file.close()
        return EngineLogWriter(self._directory, self._tp, self._clock)

    def loaded(self) -> None:
        """Record that a weight load is complete."""
        self._write({"event": "loaded", "t": self._clock()})

    def _write_span(self, span: EngineSpan) -> None:
        self._write({"event": "busy"} | {name: getattr(span, name) for name in EngineSpan.__slots__})

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


def _create(directory: Path) -> IO[str]:
    """Open ``engine-<pid>.jsonl``; a pid that an earlier log of the same run has gets a counter."""
    directory.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        suffix = f"-{number}" if number > 1 else ""
        with contextlib.suppress(FileExistsError):
            return open(directory / f"engine-{os.getpid()}{suffix}.jsonl", "x", encoding="utf-8")
    raise AssertionError("counting never ends")


def read_engine_log(path: str | Path) -> EngineLog:
    """Return what the log at ``path`` holds; a torn last line, as a killed engine leaves it, is ignored.

    Raises:
        DataError: The file is missing, or any other line is malformed; the message holds path and line number.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # whatever follows the last line break is torn, or empty
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}. Give the log of an engine.") from error
    log: EngineLog | None = None
    busy: list[EngineSpan] = []
    loaded_s: list[float] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            event = record.pop("event")
            if (event == "engine") != (number == 1):
                raise ValueError("the first line, and no other, is the header")
            if event == "engine":
                log = EngineLog(started_s=record.pop("t"), busy=(), loaded_s=(), **record)
            elif event == "busy":
                _append(busy, EngineSpan(**record))
            elif event == "loaded":
                loaded_s.append(record["t"])
            else:
                raise ValueError(f"unknown event {event!r}")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path}, line {number}: not a record of an engine log: {error!r}.") from error
    if log is None:
        raise DataError(f"{path}: the file has no header. The engine ended before it wrote one.")
    return replace(log, busy=tuple(busy), loaded_s=tuple(loaded_s))


def _append(busy: list[EngineSpan], span: EngineSpan) -> None:
    """Append ``span``, joined with the last one when it starts at that one's end."""
    if not busy or busy[-1].end_s != span.start_s:
        busy.append(span)
        return
    sums = {name: getattr(busy[-1], name) + getattr(span, name) for name in EngineSpan.__slots__[2:]}
    busy[-1] = EngineSpan(busy[-1].start_s, span.end_s, **sums)
