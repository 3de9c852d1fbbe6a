"""What a watched run left in its folder, read into values: no derivation happens here.

The files are those of the observer (``live/observer.py``), of the engines (``live/engine_log.py``), of the elastic
trainer (``live/events.py``) and of verl itself: ``metrics.jsonl`` (file logger) and ``rollouts/<step>.jsonl``
(``trainer.rollout_data_dir``). A killed run may have torn the last line of any of them, which is then left out.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_rlhfless.errors import DataError
from verl_rlhfless.live.engine_log import EngineLog, read_engine_log
from verl_rlhfless.live.observer import HOST_FILE, LEASES_FILE, METRICS_FILE, STEPS_FILE
from verl_rlhfless.live.sample_log import read_samples

ROLLOUT_FOLDER = "rollouts"
"""``trainer.rollout_data_dir`` of the observed run must be this folder in the observed folder."""

_PADDING_UID = "pad"  # verl's synthetic samples: upsample_batch_to_divisible_size in trainer/ppo/padding_utils.py


@dataclass(frozen=True, slots=True)
class Hold:
    """A lease as the observer saw it; ``released_s`` is ``None`` when it was still held at the end of the watch."""

    lease_id: str
    role: str
    num_gpus: int
    granted_s: float
    released_s: float | None


@dataclass(frozen=True, slots=True)
class HostSample:
    """One look at the host; ``memory_peak_bytes`` is relative to the start of the watch."""

    t: float
    cpu_percent: float
    memory_peak_bytes: int
    observer_cpu_s: float


@dataclass(frozen=True, slots=True)
class RealSamples:
    """What of a training batch was generated, padding left out.

    Attributes:
        num_samples: Samples: distinct pairs of prompt group and session.
        num_rows: Rows; a multi-turn sample may have several.
        scores: Mean score of each prompt group; empty when the dump has none.
    """

    num_samples: int
    num_rows: int
    scores: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Observed:
    """Everything that one run's folder holds.

    Attributes:
        holds: Leases in the order of their grants.
        logged_s: When verl wrote the metrics of a step [s since the epoch], by step.
        metrics: verl's metrics by step; an initial validation is a step without ``timing_s/step``.
        samples: Real samples by step; empty without rollout dumps.
        engines: Activity of every engine.
        events: What the elastic trainer told, in the order of time.
        lengths: Mean response tokens of each prompt group that was generated for training; empty when not recorded.
        host: Samples of the host, in order.
    """

    holds: tuple[Hold, ...]
    logged_s: Mapping[int, float]
    metrics: Mapping[int, Mapping[str, Any]]
    samples: Mapping[int, RealSamples]
    engines: tuple[EngineLog, ...]
    events: tuple[Mapping[str, Any], ...]
    lengths: tuple[float, ...]
    host: tuple[HostSample, ...]


def read_observed(folder: Path) -> Observed:
    """Return what the run in ``folder`` left.

    Raises:
        DataError: A file of the observer or verl's metrics are missing, or a line is malformed; with path and line.
    """
    try:
        return _read(folder)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise DataError(f"{folder}: a line of its records has another form ({what}). Run the arm again.") from error


def ended_steps(folder: Path) -> frozenset[int]:
    """Return the training steps whose end verl logged.

    Raises:
        DataError: verl's metrics are missing, or a line is malformed; with path and line.
    """
    try:
        return frozenset(line["step"] for line in _lines(folder / METRICS_FILE) if "timing_s/step" in line["data"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / METRICS_FILE}: a line has another form ({error!r}). Run the arm again.") from error


def _read(folder: Path) -> Observed:
    events = [event for path in sorted(folder.glob("events-*.jsonl")) for event in _lines(path)]
    return Observed(
        holds=tuple(_holds(folder / LEASES_FILE)),
        logged_s={line["step"]: line["t"] for line in _lines(folder / STEPS_FILE)},
        metrics={line["step"]: line["data"] for line in _lines(folder / METRICS_FILE)},
        samples={int(path.stem): _real_samples(path) for path in sorted((folder / ROLLOUT_FOLDER).glob("*.jsonl"))},
        engines=tuple(read_engine_log(path) for path in sorted(folder.glob("engine-*.jsonl"))),
        events=tuple(sorted(events, key=lambda event: float(event["t"]))),
        lengths=tuple(_group_lengths(folder)),
        host=tuple(HostSample(**line) for line in _lines(folder / HOST_FILE)),
    )


def _lines(path: Path) -> Iterator[Any]:
    """Yield each line's JSON value; a last line without its end is left out."""
    if not path.exists():
        raise DataError(f"{path}: is missing. Run the arm under the observer, with verl's file logger writing there.")
    with path.open(encoding="utf-8", errors="replace") as file:  # what is no text is no JSON either
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: is not JSON: {error}. Run the arm again.") from error


def _group_lengths(folder: Path) -> Iterator[float]:
    groups: dict[tuple[int, str], list[int]] = defaultdict(list)
    for sample in read_samples(folder):
        groups[sample.step, sample.uid].append(sample.response_tokens)
    return (statistics.fmean(group) for group in groups.values())


def _holds(path: Path) -> list[Hold]:
    holds: list[Hold] = []
    held: dict[str, dict[str, Any]] = {}
    for line in _lines(path):
        if line["event"] == "granted":
            held[line["lease"]] = line
        else:
            holds.append(_hold(held.pop(line["lease"]), line["t"]))
    holds += [_hold(granted, None) for granted in held.values()]
    return sorted(holds, key=lambda hold: hold.granted_s)


def _hold(granted: Mapping[str, Any], released_s: float | None) -> Hold:
    return Hold(granted["lease"], granted["role"], granted["num_gpus"], granted["t"], released_s)


def _real_samples(path: Path) -> RealSamples:
    """Count verl's trajectory keys ``{uid}_{session}_{index}`` in the dump of one step."""
    rows = [line for line in _lines(path) if not line["uid"].startswith(_PADDING_UID)]
    scores: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if "score" in row:
            scores[row["uid"].rsplit("_", 2)[0]].append(row["score"])
    return RealSamples(
        num_samples=len({row["uid"].rsplit("_", 1)[0] for row in rows}),
        num_rows=len(rows),
        scores=tuple(statistics.fmean(group) for group in scores.values()),
    )
