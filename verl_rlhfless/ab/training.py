"""One arm: its training under the observer, told step by step, and ended with certainty."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from verl_rlhfless.ab.cluster import Cluster
from verl_rlhfless.ab.process import end_group
from verl_rlhfless.config import InstrumentConfig
from verl_rlhfless.errors import RlhflessError
from verl_rlhfless.live.instrument import instrument_environment
from verl_rlhfless.live.observer import METRICS_FILE, Observer

LOG_FILE = "train.log"
Say = Callable[[str], None]
OpenCluster = Callable[[Mapping[str, str]], AbstractContextManager[Cluster]]
"""Returns the cluster whose processes inherit the given environment."""

_POLL_S = 0.5
_TAIL_BYTES = 65536


@dataclass(frozen=True, slots=True)
class ArmOutcome:
    """How an arm ended.

    Attributes:
        folder: Everything that the arm wrote.
        exit_code: Of the training command; ``None`` = it did not end by itself.
        leftovers: Engine processes and shared-memory segments that outlived the training job.
        why: Why it failed, in one line; ``None`` = it did not.
    """

    folder: Path
    exit_code: int | None
    leftovers: tuple[str, ...]
    why: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the outcome without its folder, which may be moved."""
        return {key: value for key, value in asdict(self).items() if key != "folder"}


@dataclass(frozen=True, slots=True)
class Training:
    """What is run for an arm.

    Attributes:
        argv: The command line, without what the cluster adds.
        folder: Where everything goes.
        open_cluster: Returns the cluster to run on.
        environment: Of every process of the run, the instrument's left out.
        pace: Declares the device that each replica stands for (``rlhfless.instrument.pace``); ``None`` = itself.
        cwd: Working directory; ``None`` = this process's.
        timeout_s: After this time the arm is ended and has failed.
        num_steps: Steps that it must do; a script may end well when its training did not (``| tee log``).
    """

    argv: Sequence[str]
    folder: Path
    open_cluster: OpenCluster
    environment: Mapping[str, str]
    pace: str | None = None
    cwd: Path | None = None
    timeout_s: float = 86400.0
    num_steps: int = 0


def observed_environment(environment: Mapping[str, str], folder: Path, pace: str | None = None) -> dict[str, str]:
    """Return ``environment`` with where to record, and the declared device."""
    return {**environment, **instrument_environment(InstrumentConfig(pace=pace, observer=str(folder)))}


def train(training: Training, say: Say) -> ArmOutcome:
    """Train one arm under the observer and return how it ended."""
    folder = training.folder
    folder.mkdir(parents=True, exist_ok=True)
    environment = observed_environment(training.environment, folder, training.pace)
    with training.open_cluster(environment) as cluster, Observer(folder):
        exit_code = _run([*training.argv, *cluster.overrides], training, cluster, say)
        leftovers = tuple(cluster.leftovers())
    return ArmOutcome(folder, exit_code, leftovers, _why_failed(training, exit_code))


def _why_failed(training: Training, exit_code: int) -> str | None:
    metrics = training.folder / METRICS_FILE
    done = metrics.read_text().count('"timing_s/step":') if metrics.exists() else 0
    if exit_code == 0 and done >= training.num_steps:
        return None
    how = f"with exit code {exit_code}" if exit_code else f"after {done} of {training.num_steps} steps"
    return f"verl ended {how}: {last_words(training.folder / LOG_FILE)}"


def _run(argv: Sequence[str], training: Training, cluster: Cluster, say: Say) -> int:
    log, metrics = training.folder / LOG_FILE, training.folder / METRICS_FILE
    say(f"starting verl, its log is {log}")
    started = time.monotonic()
    with (
        log.open("w") as output,
        subprocess.Popen(
            argv,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=cluster.child_environment(),
            cwd=training.cwd,
            start_new_session=True,
        ) as process,
    ):
        try:
            done = 0
            while process.poll() is None:
                if time.monotonic() - started > training.timeout_s:
                    raise RlhflessError(f"the arm did not end within {training.timeout_s:g} s; see {log}")
                done = _tell_new_steps(metrics, done, started, say)
                time.sleep(_POLL_S)
            _tell_new_steps(metrics, done, started, say)
            return process.returncode
        finally:
            end_group(process)


def _tell_new_steps(metrics: Path, done: int, started: float, say: Say) -> int:
    if not metrics.exists():
        return done
    lines = metrics.read_text().splitlines(keepends=True)
    for line in lines[done:]:
        if not line.endswith("\n"):
            break
        done += 1
        record = json.loads(line)
        data = record["data"]
        if "timing_s/step" in data:  # a validation before the first step has a line of its own
            reward = data.get("critic/score/mean")
            told = "" if reward is None else f" (reward {reward:.3f})"
            say(
                f"step {record['step']} took {data['timing_s/step']:.1f} s{told}, "
                f"{time.monotonic() - started:.0f} s since the start"
            )
    return done


def last_words(log: Path) -> str:
    """Return the line of a training log that says best why it ended: our own error, else the last exception."""
    if not log.exists():
        return "nothing was started"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    ours = [line for line in lines if "rlhfless: error:" in line]
    errors = [line for line in lines if "Error: " in line or line.startswith(("Could not", "Key "))]
    said = ours or errors or [line for line in lines if line] or ["its log is empty"]
    return f"{said[-1][:300]} (see {log})"
