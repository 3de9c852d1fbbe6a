"""The record of a comparison: what every arm cost and did, from what was observed of it, as ``rlhfless-ab/1``.

Units are in the names: ``_s`` seconds, ``gpu_s_*`` GPU-seconds. What is not known is ``null``, never a guess.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from verl_rlhfless.ledger import account, parked, whole_run
from verl_rlhfless.report.environment import code, hardware, versions
from verl_rlhfless.report.guards import GuardLimits, judge
from verl_rlhfless.report.observed import Observed, read_observed
from verl_rlhfless.report.record import ArmRecord, Figures, HostUse, Pull, Spread, StepRecord
from verl_rlhfless.report.requests import request_use
from verl_rlhfless.report.timeline import StepTime, Timeline, build_timeline
from verl_rlhfless.types import LeaseSpan, Window

FORMAT = "rlhfless-ab/1"


def build_ab(
    arms: Mapping[str, Path],
    seed: int | None,
    num_gpus: int,
    limits: GuardLimits,
    left_behind: Mapping[str, Sequence[Any] | None],
) -> dict[str, Any]:
    """Return the comparison of the observed arms as ``rlhfless-ab/1``.

    Args:
        arms: The observed folder of each arm.
        seed: Seed of all arms; ``None`` = they have none.
        num_gpus: GPUs that the cluster declared.
        limits: What the arms are held to.
        left_behind: What was found after each arm; see :func:`~verl_rlhfless.report.guards.judge`.

    Raises:
        DataError: A record of an arm is missing or malformed; the message holds the path.
    """
    records = {name: build_arm(folder) for name, folder in arms.items()}
    rows = {
        name: record.as_json() | {"is_asynchronous": name in limits.asynchronous_arms}
        for name, record in records.items()
    }
    return {
        "format": FORMAT,
        **code(),
        "versions": versions(),
        "hardware": hardware(num_gpus),
        "seed": seed,
        "arms": rows,
        "guards": [asdict(guard) for guard in judge(records, limits, left_behind)],
    }


def build_arm(folder: Path) -> ArmRecord:
    """Return the record of the arm that was observed in ``folder``.

    Raises:
        DataError: A record is missing or malformed, or contradicts another; the message holds the path.
    """
    observed = read_observed(folder)
    timeline = build_timeline(observed)
    times = {time.step: time for time in timeline.steps}
    steps = tuple(
        StepRecord(step, _step_figures(observed, timeline, step, times.get(step)))
        for step, metrics in sorted(observed.metrics.items())
        if "timing_s/step" in metrics
    )
    return ArmRecord(
        steps=steps,
        total=_total_figures([record.figures for record in steps], observed, timeline),
        wall_s=observed.host[-1].t - observed.host[0].t if observed.host else None,
        leases=timeline.leases,
        pulls=tuple(_pulls(observed, timeline)),
        host=_host_use(observed),
        reward=_spread([score for samples in observed.samples.values() for score in samples.scores]),
        response_tokens=_spread(observed.lengths),
    )


def _step_figures(observed: Observed, timeline: Timeline, step: int, time: StepTime | None) -> Figures:
    """Return the figures of a step; ``time`` is ``None`` when the observer did not see its end."""
    metrics = observed.metrics[step]
    samples = observed.samples.get(step)
    mean_tokens = metrics.get("response_length/mean")
    return Figures(
        step_s=metrics["timing_s/step"],
        gen_s=metrics.get("timing_s/gen"),
        gpu=account(timeline.leases, timeline.busy, time.window) if time else None,
        **(_parked(timeline, time.window) if time else {}),
        reward_mean=metrics.get("critic/score/mean"),
        rollout_probs_diff_max=metrics.get("training/rollout_probs_diff_max"),
        rollout_probs_diff_mean=metrics.get("training/rollout_probs_diff_mean"),
        # verl's mean is over the real rows, as a float32: exact up to 2**24 tokens
        response_tokens=None if samples is None or mean_tokens is None else round(mean_tokens * samples.num_rows),
        num_samples=None if samples is None else samples.num_samples,
        num_replicas=_num_replicas(observed, timeline.leases, time) if time else None,
        requests=request_use(observed, step, time.timer) if time else None,
    )


def _total_figures(steps: Sequence[Figures], observed: Observed, timeline: Timeline) -> Figures:
    training_end_s = timeline.steps[-1].window.end_s if timeline.steps else timeline.watched_until_s
    return Figures(
        step_s=_mean([figures.step_s for figures in steps]),
        gen_s=_mean([figures.gen_s for figures in steps]),
        gpu=account(timeline.leases, timeline.busy, whole_run(timeline.leases, timeline.watched_until_s)),
        **_parked(timeline, Window(float("-inf"), training_end_s)),
        reward_mean=_mean([figures.reward_mean for figures in steps]),
        rollout_probs_diff_max=max(_known([figures.rollout_probs_diff_max for figures in steps]), default=None),
        rollout_probs_diff_mean=max(_known([figures.rollout_probs_diff_mean for figures in steps]), default=None),
        response_tokens=_sum([figures.response_tokens for figures in steps]),
        num_samples=_sum([figures.num_samples for figures in steps]),
        num_replicas=_num_replicas(observed, timeline.leases, None),
    )


def _known(values: Sequence[float | None]) -> list[float]:
    """Return the values, or nothing if one of them is not known."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else []


def _mean(values: Sequence[float | None]) -> float | None:
    known = _known(values)
    return statistics.fmean(known) if known else None


def _sum(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _spread(groups: Sequence[float]) -> Spread | None:
    if len(groups) < 2:
        return None
    return Spread(statistics.fmean(groups), statistics.stdev(groups) / math.sqrt(len(groups)), len(groups))


def _parked(timeline: Timeline, window: Window) -> dict[str, Any]:
    """Return what parked engines took while the trainer kept its leases; from then on its own part is not known."""
    has_given_back = any(
        lease.role == "trainer" and lease.released_s is not None and lease.released_s < window.end_s
        for lease in timeline.leases
    )
    if has_given_back:
        return {}
    use = parked(timeline.parked, window)
    return {"gpu_s_parked": use.gpu_s, "parked_device_bytes": use.device_bytes}


def _num_replicas(observed: Observed, leases: Sequence[LeaseSpan], time: StepTime | None) -> int | None:
    """Return the replicas that could serve in a step, or in the whole run.

    Usable replica leases, replicas that shared the trainer's lease, and hybrid engines.
    """
    start_s, end_s = (time.timer.start_s, time.timer.end_s) if time else (float("-inf"), float("inf"))
    elastic = [
        lease
        for lease in leases
        if lease.role == "replica"
        and lease.usable_s is not None
        and lease.usable_s < end_s
        and (lease.released_s is None or lease.released_s > start_s)
    ]
    shared = [event for event in _shared_starts(observed) if start_s <= event["t"] < end_s]
    hybrid = [engine for engine in observed.engines if engine.lease is None and engine.started_s < end_s]
    return len(elastic) + len(shared) + len(hybrid) or None


def _shared_starts(observed: Observed) -> list[Mapping[str, Any]]:
    """Return the moments at which a replica that shares the trainer's lease could serve."""
    granted = {hold.lease_id for hold in observed.holds}
    return [event for event in observed.events if event["event"] == "replica_ready" and event["lease"] not in granted]


def _pulls(observed: Observed, timeline: Timeline) -> list[Pull]:
    """Return the pulls of every replica that could serve; one without a recorded pull is listed all the same."""
    published = {event["version"]: event.get("checksum") for event in observed.events if event["event"] == "published"}
    pulls: dict[str, list[Pull]] = defaultdict(list)
    for event in observed.events:
        if event["event"] == "pulled":
            lease_id, expected = event["lease"], _version_at(event["t"], timeline.steps)
            pulls[lease_id].append(
                Pull(lease_id, expected, event["version"], event.get("checksum"), published.get(expected))
            )
    served = [lease.lease_id for lease in timeline.leases if lease.role == "replica" and lease.usable_s is not None]
    served += [event["lease"] for event in _shared_starts(observed)]
    return [pull for lease_id in served for pull in pulls.get(lease_id, [Pull(lease_id, None, None, None, None)])]


def _version_at(t: float, steps: Sequence[StepTime]) -> int | None:
    """Return the weight version at ``t``: verl names a version after the step that ended with its publication."""
    if not steps:
        return None
    done = [time.step for time in steps if time.timer.end_s <= t]
    return done[-1] if done else steps[0].step - 1


def _host_use(observed: Observed) -> HostUse | None:
    """Return the use of the host; a sample's CPU use holds for the time since the sample before it."""
    samples = observed.host
    wall_s = samples[-1].t - samples[0].t if samples else 0.0
    if wall_s <= 0:
        return None
    cpu_percent_s = [after.cpu_percent * (after.t - before.t) for before, after in itertools.pairwise(samples)]
    return HostUse(
        cpu_percent=sum(cpu_percent_s) / wall_s,
        memory_peak_bytes=samples[-1].memory_peak_bytes,
        observer_cpu_percent=100 * samples[-1].observer_cpu_s / wall_s,
    )
