"""What a finished live comparison of ``stock`` and ``elastic`` holds for the simulator: lengths, and what steps took.

Invariant: nothing here is fitted to a prediction; every figure was measured.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.live_arm import settings_of, trace_of
from benchmarks.record import UNKNOWN, Code
from verl_rlhfless.demo.columns import MAX_HOST_CPU, WARM_UP
from verl_rlhfless.live.pacing import PaceModel
from verl_rlhfless.live.routing_settings import RoutingSettings
from verl_rlhfless.report.ab import build_arm
from verl_rlhfless.report.folder import RECORD_FILE
from verl_rlhfless.report.observed import Observed, read_observed
from verl_rlhfless.report.record import Figures
from verl_rlhfless.report.recorded_trace import record_trace
from verl_rlhfless.report.timeline import StepTime, Timeline, build_timeline
from verl_rlhfless.sim.workload import StepData, load_steps
from verl_rlhfless.trace import read_header
from verl_rlhfless.types import BusySpan

ARMS = ("stock", "elastic")
_PHASES = ("old_log_prob", "update_actor")
_BESIDE = ("adv", "update_weights")


@dataclass(frozen=True, slots=True)
class Stay:
    """One replica of a step: its lease, and the start of the first and the end of the last of its iterations.

    Seconds from the step's begin. ``is_cold``: its engine was started, not woken.
    """

    granted_s: float
    released_s: float
    first_s: float
    last_s: float
    is_cold: bool


@dataclass(frozen=True, slots=True)
class LiveStep:
    """What a step of one arm took, in seconds and GPU-seconds; moments count from its begin.

    Attributes:
        step_s: The step.
        gen_s: verl's timer of the rollout.
        gpu_s: Leased GPU-seconds.
        phases_s: Old log-prob and update.
        beside_s: Advantages and weights.
        first_s: Start of the first iteration of any engine.
        last_s: End of the last one.
        host_cpu_percent: Mean load of all cores during the rollout; ``None`` = not known.
        stays: Replicas with a lease of their own.
        left_s: When the trainer gave its lease back; ``None`` = it did not.
        back_s: When it had one again.
    """

    step_s: float
    gen_s: float
    gpu_s: float
    phases_s: float
    beside_s: float
    first_s: float
    last_s: float
    host_cpu_percent: float | None = None
    stays: tuple[Stay, ...] = ()
    left_s: float | None = None
    back_s: float | None = None

    @property
    def is_cold(self) -> bool:
        """Whether an engine was started, not woken."""
        return any(stay.is_cold for stay in self.stays)


@dataclass(frozen=True)
class LiveRun:
    """The folder of a comparison, and the device that its engines were paced to."""

    folder: Path
    pace: PaceModel

    @cached_property
    def data(self) -> tuple[StepData, ...]:
        """Prompts and lengths by step.

        Raises:
            DataError: The run recorded no samples.
        """
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.jsonl"
            record_trace(self.folder / "elastic", trace)
            return load_steps(trace)

    @cached_property
    def settings(self) -> RoutingSettings:
        """What the live router was told."""
        return settings_of(self.folder / "elastic", self.pace)

    @cached_property
    def trace(self) -> str | None:
        """Name of the trace whose lengths were replayed; its file's where the file is gone, ``None`` without one."""
        path = trace_of(self.folder / "elastic")
        return None if path is None else read_header(path).source if path.exists() else path.name

    @property
    def code(self) -> Code:
        """The code that ran it."""
        path = self.folder / RECORD_FILE
        record = json.loads(path.read_text()) if path.exists() else {}
        return {key: record.get(key) for key in UNKNOWN}

    @cached_property
    def arms(self) -> Mapping[str, Mapping[int, LiveStep]]:
        """What each step of each arm took.

        Raises:
            DataError: A record of an arm is missing or malformed.
        """
        return {arm: read_steps(self.folder / arm) for arm in ARMS}

    @property
    def cold(self) -> tuple[int, ...]:
        """Steps after the warm-up in which an engine was started: they don't count."""
        return tuple(n for n, step in self.arms["elastic"].items() if n > WARM_UP and step.is_cold)

    @property
    def counted(self) -> tuple[int, ...]:
        """Steps that count, in order."""
        both = set.intersection(*(set(steps) for steps in self.arms.values()))
        return tuple(sorted(n for n in both if n > WARM_UP and n not in self.cold))

    @property
    def is_void(self) -> bool:
        """Whether the host was too busy in a counted step to keep what was declared, by the demo's limit."""
        loads = [step.host_cpu_percent for arm in ARMS for step in self.steps(arm)]
        return any(load is None or load > MAX_HOST_CPU for load in loads)

    def steps(self, arm: str) -> list[LiveStep]:
        """Return the counted steps of an arm."""
        return [self.arms[arm][number] for number in self.counted]


def read_steps(folder: Path) -> dict[int, LiveStep]:
    """Return what each step of the arm in ``folder`` took, by verl's number of the step.

    Raises:
        DataError: A record of the arm is missing or malformed.
    """
    observed = read_observed(folder)
    timeline = build_timeline(observed)
    figures = {record.step: record.figures for record in build_arm(folder).steps}
    found = {}
    for time in timeline.steps:
        work = [b for b in timeline.generation if time.timer.start_s <= b.start_s < time.timer.end_s]
        if work:
            found[time.step] = _step((observed, timeline), time, work, figures[time.step])
    return found


def _step(watched: tuple[Observed, Timeline], time: StepTime, work: Sequence[BusySpan], figures: Figures) -> LiveStep:
    observed, timeline = watched
    assert figures.gpu is not None and figures.requests is not None, "both are known of a step in which engines worked"
    begin_s, timers = time.timer.start_s, observed.metrics[time.step]
    held = [lease for lease in timeline.leases if time.window.start_s <= lease.granted_s < time.window.end_s]
    woken = {event["lease"] for event in observed.events if event["event"] == "replica_woken"}
    stays = []
    for lease in held:
        own = [span for span in work if span.lease_id == lease.lease_id]
        if lease.role == "replica" and own and lease.released_s is not None:
            first_s, last_s = _bounds(own)
            is_cold = lease.lease_id not in woken
            lease_s = lease.granted_s - begin_s, lease.released_s - begin_s
            stays.append(Stay(*lease_s, first_s - begin_s, last_s - begin_s, is_cold))
    trainer = [lease for lease in timeline.leases if lease.role == "trainer"]
    back = [lease.granted_s for lease in trainer if lease in held]
    left = [at for lease in trainer if (at := lease.released_s) is not None and begin_s <= at < time.window.end_s]
    first_s, last_s = _bounds(work)
    return LiveStep(
        step_s=timers["timing_s/step"],
        gen_s=timers["timing_s/gen"],
        gpu_s=figures.gpu.allocated,
        phases_s=sum(timers[f"timing_s/{name}"] for name in _PHASES),
        beside_s=sum(timers[f"timing_s/{name}"] for name in _BESIDE),
        first_s=first_s - begin_s,
        last_s=last_s - begin_s,
        host_cpu_percent=figures.requests.host_cpu_percent,
        stays=tuple(stays),
        left_s=min(left) - begin_s if left and back else None,
        back_s=min(back) - begin_s if back else None,
    )


def _bounds(spans: Sequence[BusySpan]) -> tuple[float, float]:
    return min(span.start_s for span in spans), max(span.end_s for span in spans)
