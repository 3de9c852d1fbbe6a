"""When what ran: steps, trainer phases, leases and engine activity of a watched run on one time axis.

Invariant: both arms are read alike. Trainer phases are verl's own timers (``timing_s/*``), laid at their place in the
step as ``_step_once`` and ``fit`` of verl's ``trainer/ppo/v1/trainer_base.py`` run them: everything after the rollout
follows without a gap up to the end of the step. Not trainer phases: ``adv`` (the driver's CPU, the GPUs wait),
``testing`` (validation is a rollout, so the engines' activity shows it) and ``gen``. A pool of its own for a reward or
teacher model counts as the trainer's; one of verl's own replicas (``separate_async``) works when its engine does.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from verl_rlhfless.errors import DataError
from verl_rlhfless.live.engine_log import EngineLog
from verl_rlhfless.live.shared_lease import payer
from verl_rlhfless.report.observed import Hold, Observed
from verl_rlhfless.types import BusySpan, LeaseSpan, ParkedSpan, Window

_AFTER_ROLLOUT = (
    "reward",
    "old_log_prob",
    "ref",
    "values",
    "adv",
    "update_critic",
    "update_actor",
    "save_checkpoint",
    "update_weights",
)
_NO_GPU_WORK = "adv"
_OWN_POOL = re.compile(r"rollout_pool_(\d+)verl_group_")
"""verl's name for the GPUs of a replica that has some of its own, with its rank (``workers/rollout/replica.py``)."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Where a training step lies on the time axis.

    Attributes:
        step: verl's step number.
        window: From the metrics of the step before to those of this one; such windows leave nothing out.
        timer: The part that verl's ``timing_s/step`` measures: without validation and the writing of metrics.
    """

    step: int
    window: Window
    timer: Window


@dataclass(frozen=True, slots=True)
class Timeline:
    """The run as the ledger needs it.

    Attributes:
        steps: Training steps in order, those whose end the observer saw.
        leases: Every lease, with its first usable moment.
        phases: Trainer phases on those leases.
        generation: Engine activity on them.
        parked: When engines slept without a lease.
        watched_until_s: Last moment that the observer recorded.
    """

    steps: tuple[StepTime, ...]
    leases: tuple[LeaseSpan, ...]
    phases: tuple[BusySpan, ...]
    generation: tuple[BusySpan, ...]
    parked: tuple[ParkedSpan, ...]
    watched_until_s: float

    @property
    def busy(self) -> tuple[BusySpan, ...]:
        """All work, of trainer and engines."""
        return (*self.phases, *self.generation)


def build_timeline(observed: Observed) -> Timeline:
    """Return the run on one time axis."""
    steps = step_times(observed.logged_s, observed.metrics)
    phases = [phase for time in steps for phase in trainer_phases(time.timer, observed.metrics[time.step])]
    fused = [Window(e["t"] - e["seconds"], e["t"]) for e in observed.events if e["event"] == "fused"]
    return Timeline(
        steps=tuple(steps),
        leases=tuple(_lease_spans(observed, steps, phases)),
        phases=tuple(_on_trainer_leases([*phases, *fused], observed.holds)),
        generation=tuple(_engine_spans(observed)),
        parked=tuple(_parked_spans(observed.events)),
        watched_until_s=observed.host[-1].t if observed.host else max(observed.logged_s.values(), default=0.0),
    )


def step_times(logged_s: Mapping[int, float], metrics: Mapping[int, Mapping[str, float]]) -> list[StepTime]:
    """Return the training steps in order.

    A step begins where the metrics of the one before (or of the initial validation) were written. The first one begins
    ``timing_s/step``, its validation and the usual time between two steps before its own metrics were written.
    """
    timed = [step for step in sorted(logged_s) if "timing_s/step" in metrics.get(step, {})]
    between = statistics.median(
        [
            max(0.0, logged_s[step] - logged_s[step - 1] - _timed_s(metrics[step]))
            for step in timed
            if step - 1 in logged_s
        ]
        or [0.0]
    )
    times = []
    for step in timed:
        end_s = logged_s[step]
        start_s = logged_s.get(step - 1, end_s - between - _timed_s(metrics[step]))
        timer = Window(start_s, min(end_s, start_s + metrics[step]["timing_s/step"]))
        times.append(StepTime(step, Window(start_s, end_s), timer))
    return times


def _timed_s(metrics: Mapping[str, float]) -> float:
    return metrics["timing_s/step"] + metrics.get("timing_s/testing", 0.0)


def trainer_phases(timer: Window, metrics: Mapping[str, float]) -> list[Window]:
    """Return when the trainer's GPUs worked in the step whose timer ran over ``timer``."""
    phases = []
    end_s = timer.end_s
    for name in reversed(_AFTER_ROLLOUT):
        start_s = max(timer.start_s, end_s - metrics.get(f"timing_s/{name}", 0.0))
        if name != _NO_GPU_WORK and start_s < end_s:
            phases.append(Window(start_s, end_s))
        end_s = start_s
    return phases[::-1]


def _on_trainer_leases(phases: Iterable[Window], holds: Iterable[Hold]) -> list[BusySpan]:
    """Return the phases on every trainer lease: a phase runs on all of the trainer's GPUs."""
    trainer = {hold.lease_id: hold.num_gpus for hold in holds if hold.role == "trainer" and _rank_of(hold) is None}
    return [
        BusySpan(lease_id, num_gpus, phase.start_s, phase.end_s)
        for lease_id, num_gpus in trainer.items()
        for phase in phases
    ]


def _engine_spans(observed: Observed) -> list[BusySpan]:
    """Return when engines had a running request; an engine without a lease of its own works on the trainer's."""
    spans, granted = [], {hold.lease_id for hold in observed.holds}
    for engine in observed.engines:
        for busy in engine.busy:
            of_engine = engine.lease and payer(engine.lease, granted)
            lease_id = of_engine or _trainer_lease(engine, busy.start_s, observed.holds)
            spans.append(BusySpan(lease_id, engine.tp, busy.start_s, busy.end_s))
    return spans


def _rank_of(hold: Hold) -> int | None:
    """Return the rank of the replica of verl's whose own GPUs these are; ``None`` = they are not one's."""
    own = _OWN_POOL.match(hold.lease_id)
    return int(own[1]) if own else None


def _trainer_lease(engine: EngineLog, at_s: float, holds: Iterable[Hold]) -> str:
    """Return the lease that a replica of verl's works on, its own or the trainer's.

    verl fills the nodes of the trainer's pool in the order of ranks.
    """
    first_gpu = (engine.replica_rank or 0) * engine.tp
    held = [one for one in holds if one.granted_s <= at_s and (one.released_s is None or at_s < one.released_s)]
    own = [one.lease_id for one in held if _rank_of(one) is not None and _rank_of(one) == engine.replica_rank]
    if own:
        return own[0]
    for hold in sorted(held, key=lambda hold: hold.lease_id):
        if hold.role == "trainer" and _rank_of(hold) is None:
            if first_gpu < hold.num_gpus:
                return hold.lease_id
            first_gpu -= hold.num_gpus
    raise DataError(
        f"engine {engine.pid} (replica {engine.replica_rank}) worked at {at_s:.3f}, when no trainer lease had room for "
        "it. Was the observer started before the run, and stopped after it?"
    )


def _lease_spans(observed: Observed, steps: Sequence[StepTime], phases: Sequence[Window]) -> list[LeaseSpan]:
    ready_s, resumed_s = _ready_times(observed), _resumed_times(observed)
    began_s = _training_began_s(observed, steps)
    spans = []
    for hold in observed.holds:
        if hold.role == "trainer":
            moments = [began_s] if began_s is not None else []
            moments += [phase.start_s for phase in phases]
            moments += resumed_s[hold.lease_id]
        else:
            moments = ready_s[hold.lease_id]
        usable_s = min((moment for moment in moments if moment >= hold.granted_s), default=None)
        spans.append(LeaseSpan(hold.lease_id, hold.role, hold.num_gpus, hold.granted_s, usable_s, hold.released_s))
    return spans


def _ready_times(observed: Observed) -> dict[str, list[float]]:
    """Return when each replica lease could serve: as its trainer told, else when its engine had loaded weights."""
    ready_s: dict[str, list[float]] = defaultdict(list)
    for event in observed.events:
        if event["event"] == "replica_ready":
            ready_s[event["lease"]].append(event["t"])
    for engine in observed.engines:
        if engine.lease is not None and engine.lease not in ready_s:
            ready_s[engine.lease] += engine.loaded_s
    return ready_s


def _resumed_times(observed: Observed) -> dict[str, list[float]]:
    """Return when a trainer that had left was back on the devices of each of its leases."""
    resumed_s: dict[str, list[float]] = defaultdict(list)
    for event in observed.events:
        if event["event"] == "trainer_resumed":
            resumed_s[event["lease"]].append(event["t"])
    return resumed_s


def _parked_spans(events: Iterable[Mapping[str, Any]]) -> list[ParkedSpan]:
    asleep: dict[str, ParkedSpan] = {}
    ended = []
    for event in events:
        if event["event"] == "replica_parked":
            memory = event["memory"]
            asleep[event["lease"]] = ParkedSpan(event["num_gpus"], memory["device_bytes"], event["t"])
        elif event["event"] in ("replica_woken", "parked_ended"):
            ended.append(replace(asleep.pop(event["parked_as"]), end_s=event["t"]))
    return [*ended, *asleep.values()]


def _training_began_s(observed: Observed, steps: Sequence[StepTime]) -> float | None:
    """Return when the trainer was first usable: the first step, or the first request of a validation before it."""
    if not steps:
        return None
    began_s = steps[0].window.start_s
    if steps[0].step - 1 not in observed.metrics:
        return began_s
    return min([began_s, *(span.start_s for engine in observed.engines for span in engine.busy)])
