"""The environment decides what a worker records, and rank 0 alone writes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from verl_rlhfless.errors import ConfigError
from verl_rlhfless.live import pacing
from verl_rlhfless.live.engine_log import EngineLog, read_engine_log
from verl_rlhfless.live.engine_probe import EngineProbe


def output(new: tuple[str, ...] = (), cached: tuple[str, ...] = (), finished: tuple[str, ...] = ()) -> Any:
    request = {"prompt_token_ids": [0] * 5, "prompt_embeds": None, "prefill_token_ids": None, "num_computed_tokens": 0}
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=name, **request) for name in new],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(cached), num_computed_tokens=[5] * len(cached), num_output_tokens=[1] * len(cached)
        ),
        num_scheduled_tokens=dict.fromkeys(new, 5) | dict.fromkeys(cached, 1),
        finished_req_ids=set(finished),
    )


def serve(probe: EngineProbe) -> None:
    """Two requests of two tokens each."""
    for iteration in (output(new=("a", "b")), output(cached=("a", "b")), output(finished=("a", "b"))):
        probe.begin(iteration)
        probe.end()
    probe.loaded()


def only_log(directory: Path) -> EngineLog:
    (path,) = directory.iterdir()
    return read_engine_log(path)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("RLHFLESS_OBSERVER_DIR", raising=False)
    monkeypatch.delenv("RLHFLESS_PACE", raising=False)
    return monkeypatch


def test_nothing_is_written_unless_asked(tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    environment.chdir(tmp_path)

    serve(EngineProbe.from_environment(rank=0, tp=1))

    assert list(tmp_path.iterdir()) == []


def test_rank_0_writes_what_it_served(tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RLHFLESS_OBSERVER_DIR", str(tmp_path))

    serve(EngineProbe.from_environment(rank=0, tp=2))
    serve(EngineProbe.from_environment(rank=1, tp=2))

    log = only_log(tmp_path)
    (span,) = log.busy
    assert (span.iterations, span.prefill_tokens, span.decode_tokens, span.finished) == (2, 10, 4, 2)
    assert (log.tp, len(log.loaded_s), span.declared_s) == (2, 1, 0.0)


def test_an_end_without_a_begin_counts_nothing(tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RLHFLESS_OBSERVER_DIR", str(tmp_path))
    probe = EngineProbe.from_environment(rank=0, tp=1)

    probe.end()
    probe.begin(output(new=("a",)))
    probe.end()
    probe.end()
    probe.begin(output(finished=("a",)))

    assert [span.iterations for span in only_log(tmp_path).busy] == [1]


def test_every_rank_is_paced(tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    environment.setattr(pacing.Pacer.__init__, "__defaults__", (lambda: 0.0, slept.append))
    environment.setenv("RLHFLESS_OBSERVER_DIR", str(tmp_path))
    environment.setenv("RLHFLESS_PACE", '{"base_ms": 100, "per_prefill_token_ms": 10}')

    for rank in (0, 1):
        serve(EngineProbe.from_environment(rank=rank, tp=1))

    (span,) = only_log(tmp_path).busy
    assert slept == pytest.approx([0.2, 0.3] * 2)  # the clock stands still, so deadlines add up
    assert span.declared_s == pytest.approx(0.3)


def test_a_bad_pace_stops_the_worker_at_its_start(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RLHFLESS_PACE", '{"base_ms": 100, "tp_speedup": {"2": 1.6}}')

    with pytest.raises(ConfigError, match="tensor-parallel size 4"):
        EngineProbe.from_environment(rank=3, tp=4)
