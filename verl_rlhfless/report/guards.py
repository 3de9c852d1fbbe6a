"""Guards: what must hold before a comparison may be believed. One that has nothing to judge by has failed.

Every guard is named ``<what>/<arm>``; its value is ``None`` where a figure that it needs is not known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verl_rlhfless.report.record import ArmRecord, Spread

MAX_PROBS_DIFF = 1e-6
"""In fp32 on a CPU, engine and trainer differ by about 1e-8 with the same weights, and by 1e-3 with older ones."""

MAX_MEAN_PROBS_DIFF = 2.0
"""Times the reference's mean difference. Rounding is the same in all arms; weights one version old show far above."""
MAX_SHIFT = 4.0
"""Standard errors: one of 10,000 sound comparisons is farther apart."""

_LEDGER_ERROR = 1e-9  # relative; the ledger's sums round, nothing else may differ


@dataclass(frozen=True, slots=True)
class GuardLimits:
    """What the arms are held to.

    Attributes:
        num_steps: Training steps that each arm was asked for.
        num_samples: Prompts x n: samples of a step.
        max_gpus: The budget.
        pulling_arms: Arms whose replicas pull their weights from the store.
        probs_diff: Upper bound of ``rollout_probs_diff_max``; ``None`` where engine and trainer round differently, so
            that only the mean can be held against the reference's.
        asynchronous_arms: Arms that train on older samples by design: their learning is not judged.
        reference: The arm that the others' learning is compared with; ``None`` = none ran.
    """

    num_steps: int
    num_samples: int
    max_gpus: int
    pulling_arms: tuple[str, ...] = ()
    probs_diff: float | None = MAX_PROBS_DIFF
    asynchronous_arms: tuple[str, ...] = ()
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class Guard:
    """A verdict: whether ``value`` keeps ``limit``; never with an unknown value."""

    name: str
    ok: bool
    value: float | None
    limit: float


def judge(
    arms: Mapping[str, ArmRecord], limits: GuardLimits, left_behind: Mapping[str, Sequence[Any] | None]
) -> list[Guard]:
    """Return the verdicts on all arms.

    Args:
        arms: The records by arm.
        limits: What they are held to.
        left_behind: What was found after an arm (processes, shared memory); ``None`` = not known. An arm that is not
            named is not judged by it: stock verl never ends its engines itself.
    """
    guards = []
    for name, arm in arms.items():
        guards.append(_num_steps(name, arm, limits))
        if name not in limits.asynchronous_arms:
            guards += _learning(name, arm, limits, arms)
        guards += [_num_samples(name, arm, limits), _max_gpus(name, arm, limits), _ledger_adds_up(name, arm)]
        if name in left_behind:
            guards.append(_left_behind(name, arm, left_behind[name]))
        if name in limits.pulling_arms:
            guards += [_weight_version(name, arm), _weight_checksum(name, arm)]
    return guards


def _num_steps(name: str, arm: ArmRecord, limits: GuardLimits) -> Guard:
    done = len(arm.steps)
    return Guard(f"num_steps/{name}", done == limits.num_steps, done, limits.num_steps)


def _learning(name: str, arm: ArmRecord, limits: GuardLimits, arms: Mapping[str, ArmRecord]) -> list[Guard]:
    """Return whether the arm trains on what its engines generated, and learns from the same as the reference."""
    reference = arms.get(limits.reference) if limits.reference not in (None, name) else None
    guards = [_probs_diff(name, arm, limits.probs_diff)] if limits.probs_diff is not None else []
    if reference is None:
        return guards
    if limits.probs_diff is None:
        guards.append(_mean_probs_diff(name, arm, reference))
    return [
        *guards,
        _shift(f"reward_shift/{name}", arm.reward, reference.reward),
        _shift(f"length_shift/{name}", arm.response_tokens, reference.response_tokens),
    ]


def _probs_diff(name: str, arm: ArmRecord, limit: float) -> Guard:
    worst = _worst([record.figures.rollout_probs_diff_max for record in arm.steps], 0.0)
    return Guard(f"rollout_probs_diff_max/{name}", worst is not None and worst < limit, worst, limit)


def _mean_probs_diff(name: str, arm: ArmRecord, reference: ArmRecord) -> Guard:
    """Hold the mean difference of the worst step against the reference's, whose engine has the trainer's weights."""
    worst, usual = (_worst([r.figures.rollout_probs_diff_mean for r in one.steps], 0.0) for one in (arm, reference))
    limit = 0.0 if usual is None else MAX_MEAN_PROBS_DIFF * usual
    return Guard(f"rollout_probs_diff_mean/{name}", worst is not None and worst <= limit, worst, limit)


def _shift(name: str, arm: Spread | None, reference: Spread | None) -> Guard:
    """Count the standard errors between two means: far more than chance explains is another training."""
    shift = None
    if arm is not None and reference is not None:
        difference = abs(arm.mean - reference.mean)
        error = math.hypot(arm.std_error, reference.std_error)
        shift = 0.0 if difference == 0 else difference / error if error > 0 else None
    return Guard(name, shift is not None and shift <= MAX_SHIFT, shift, MAX_SHIFT)


def _num_samples(name: str, arm: ArmRecord, limits: GuardLimits) -> Guard:
    worst = _worst([record.figures.num_samples for record in arm.steps], limits.num_samples)
    return Guard(f"num_samples/{name}", worst == limits.num_samples, worst, limits.num_samples)


def _max_gpus(name: str, arm: ArmRecord, limits: GuardLimits) -> Guard:
    most = arm.total.gpu.max_gpus if arm.total.gpu and arm.leases else None
    return Guard(f"max_gpus/{name}", most is not None and most <= limits.max_gpus, most, limits.max_gpus)


def _ledger_adds_up(name: str, arm: ArmRecord) -> Guard:
    """Compare the states with what was allocated, and the total with the leases themselves."""
    known = [figures.gpu for figures in (arm.total, *(record.figures for record in arm.steps))]
    errors: list[float | None] = [
        None if gpu is None else _relative(gpu.busy + gpu.idle + gpu.startup, gpu.allocated) for gpu in known
    ]
    if arm.total.gpu is not None and all(lease.released_s is not None for lease in arm.leases):
        leased = sum((lease.released_s or 0.0) - lease.granted_s for lease in arm.leases for _ in range(lease.num_gpus))
        errors.append(_relative(leased, arm.total.gpu.allocated))
    worst = _worst(errors, 0.0) if arm.leases else None
    return Guard(f"ledger_adds_up/{name}", worst is not None and worst <= _LEDGER_ERROR, worst, _LEDGER_ERROR)


def _left_behind(name: str, arm: ArmRecord, found: Sequence[Any] | None) -> Guard:
    """Count what was found after the arm, and the leases that it had not returned when the watch ended."""
    held = sum(lease.released_s is None for lease in arm.leases)
    count = None if found is None else len(found) + held
    return Guard(f"left_behind/{name}", count == 0, count, 0)


def _weight_version(name: str, arm: ArmRecord) -> Guard:
    """Count the pulls of another version than the step's."""
    known = [pull.version is not None and pull.expected_version is not None for pull in arm.pulls]
    wrong = sum(pull.version != pull.expected_version for pull in arm.pulls) if known and all(known) else None
    return Guard(f"weight_version/{name}", wrong == 0, wrong, 0)


def _weight_checksum(name: str, arm: ArmRecord) -> Guard:
    """Count the pulls whose weights are not those that were published for the step."""
    known = [pull.checksum is not None and pull.published_checksum is not None for pull in arm.pulls]
    wrong = sum(pull.checksum != pull.published_checksum for pull in arm.pulls) if known and all(known) else None
    return Guard(f"weight_checksum/{name}", wrong == 0, wrong, 0)


def _worst(values: Sequence[float | None], wanted: float) -> float | None:
    """Return the value farthest from ``wanted``, or ``None`` if there is none or one of them is not known."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known or len(known) < len(values):
        return None
    return max(known, key=lambda value: abs(value - wanted))


def _relative(value: float, reference: float) -> float:
    return abs(value - reference) / max(abs(reference), 1.0)
