"""Busy time is from the first iteration to the report that all requests ended; what was flushed survives a crash."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from verl_rlhfless.errors import DataError
from verl_rlhfless.live.engine_log import EngineLogWriter, EngineSpan, read_engine_log
from verl_rlhfless.live.iteration import Iteration
from verl_rlhfless.live.pacing import PacedTime

PREFILL = Iteration(2, 0, 2, 0, prefill_tokens=9, context_tokens=9, sampled_tokens=2)
DECODE = Iteration(2, 2, 2, 0, prefill_tokens=0, context_tokens=11, sampled_tokens=2)
DONE = Iteration(0, 0, 0, 2, 0, 0, 0)


class Engine:
    """Drives a writer along a clock that only moves when told."""

    def __init__(self, directory: Path) -> None:
        self.now_s = 1000.0
        self.directory = directory
        self.log = EngineLogWriter(directory, tp=2, clock=lambda: self.now_s)

    def iterate(self, iteration: Iteration, seconds: float, paced: PacedTime | None = None) -> None:
        self.log.begin(iteration)
        self.now_s += seconds
        self.log.end(iteration, *([paced] if paced else []))

    @property
    def path(self) -> Path:
        return max(self.directory.iterdir())

    def busy(self) -> tuple[EngineSpan, ...]:
        return read_engine_log(self.path).busy


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(tmp_path / "logs")


def test_the_header_is_there_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHFLESS_LEASE", "lease-7")
    monkeypatch.setenv("VERL_REPLICA_RANK", "3")

    engine = Engine(tmp_path)

    assert engine.path.name == f"engine-{os.getpid()}.jsonl"
    assert json.loads(engine.path.read_text()) == {
        "event": "engine", "pid": os.getpid(), "lease": "lease-7", "replica_rank": 3, "tp": 2, "t": 1000.0,
    }  # fmt: skip


def test_outside_verl_lease_and_rank_are_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLHFLESS_LEASE", raising=False)
    monkeypatch.delenv("VERL_REPLICA_RANK", raising=False)

    log = read_engine_log(Engine(tmp_path).path)

    assert (log.pid, log.lease, log.replica_rank, log.tp, log.started_s) == (os.getpid(), None, None, 2, 1000.0)


def test_one_span_from_first_iteration_to_the_report(engine: Engine) -> None:
    engine.iterate(PREFILL, 0.2)
    engine.now_s += 0.1  # a gap while requests run is busy time
    engine.iterate(DECODE, 0.2)
    engine.now_s += 0.05
    engine.log.begin(DONE)
    engine.now_s += 9

    (span,) = engine.busy()

    assert (span.start_s, span.end_s) == (1000.0, pytest.approx(1000.55))
    assert (span.iterations, span.prefill_tokens, span.decode_tokens, span.finished) == (2, 9, 4, 2)


def test_idle_time_separates_spans(engine: Engine) -> None:
    for _ in range(2):
        engine.iterate(PREFILL, 0.2)
        engine.log.begin(DONE)
        engine.now_s += 3.0

    assert [(round(span.start_s, 6), round(span.end_s, 6)) for span in engine.busy()] == [
        (1000.0, 1000.2),
        (1003.2, 1003.4),
    ]


def test_new_work_in_the_report_of_the_old_keeps_the_span(engine: Engine) -> None:
    engine.iterate(PREFILL, 0.2)
    engine.iterate(Iteration(1, 0, 1, 2, prefill_tokens=4, context_tokens=4, sampled_tokens=1), 0.2)
    engine.log.begin(Iteration(0, 0, 0, 1, 0, 0, 0))

    (span,) = engine.busy()

    assert (span.finished, span.decode_tokens) == (3, 3)


def test_an_iteration_that_runs_some_requests_and_ends_others(engine: Engine) -> None:
    engine.iterate(PREFILL, 0.2)
    engine.iterate(Iteration(1, 1, 1, 1, 0, 6, 1), 0.2)
    engine.log.begin(Iteration(0, 0, 0, 1, 0, 0, 0))

    (span,) = engine.busy()

    assert span.finished == 2


def test_at_most_a_second_is_lost_in_a_crash(engine: Engine) -> None:
    engine.iterate(PREFILL, 0.3)
    for _ in range(9):
        engine.iterate(DECODE, 0.3)  # and here the engine is killed

    (span,) = engine.busy()

    assert engine.now_s - span.end_s < 1.0
    assert span.iterations == round((span.end_s - span.start_s) / 0.3)


def test_records_of_a_long_span_are_joined(engine: Engine) -> None:
    engine.iterate(PREFILL, 0.3)
    for _ in range(99):
        engine.iterate(DECODE, 0.3)
    engine.log.begin(DONE)

    (span,) = engine.busy()

    assert (span.start_s, span.end_s) == (1000.0, pytest.approx(1030.0))
    assert (span.iterations, span.decode_tokens, span.finished) == (100, 200, 2)
    assert len(engine.path.read_text().splitlines()) < 40  # not one record per iteration


def test_a_report_without_work_leaves_no_trace(engine: Engine) -> None:
    engine.log.begin(Iteration(0, 0, 0, 0, 0, 0, 0))
    engine.log.end(Iteration(0, 0, 0, 0, 0, 0, 0))

    assert engine.busy() == ()


def test_pacing_is_summed(engine: Engine) -> None:
    engine.iterate(PREFILL, 0.2, PacedTime(0.1, 0.1))
    engine.iterate(DECODE, 0.2, PacedTime(0.2, 0.0))
    engine.log.begin(DONE)

    (span,) = engine.busy()

    assert (span.declared_s, span.overruns, span.overrun_s) == (pytest.approx(0.3), 1, 0.1)


def test_weight_loads_are_listed(engine: Engine) -> None:
    engine.log.loaded()
    engine.now_s += 5
    engine.log.loaded()

    assert read_engine_log(engine.path).loaded_s == (1000.0, 1005.0)


def test_a_torn_last_line_is_ignored(engine: Engine) -> None:
    engine.iterate(PREFILL, 0.2)
    engine.log.begin(DONE)
    whole = engine.path.read_bytes()

    for cut in range(1, len(whole.splitlines()[-1])):
        engine.path.write_bytes(whole[: -1 - cut])
        assert engine.busy() == ()


def test_a_pid_that_comes_back_keeps_both_logs(tmp_path: Path) -> None:
    Engine(tmp_path).log.loaded()
    Engine(tmp_path)

    loads = [len(read_engine_log(path).loaded_s) for path in tmp_path.iterdir()]

    assert sorted(loads) == [0, 1]


@pytest.fixture
def header(engine: Engine) -> Iterator[str]:
    yield engine.path.read_text()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ("[]", "line 2"),
        ('{"event": "gone"}', "unknown event"),
        ('{"event": "busy"}', "line 2"),
        ('{"event": "busy", "start_s": 1, "end_s": 2, "extra": 3}', "extra"),
        ('{"event": "engine", "pid": 1}', "header"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, header: str, line: str, message: str) -> None:
    path = tmp_path / "damaged.jsonl"
    path.write_text(header + line + "\n")

    with pytest.raises(DataError, match=message):
        read_engine_log(path)


def test_missing_and_headless_logs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_engine_log(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="no header"):
        read_engine_log(tmp_path / "empty.jsonl")
