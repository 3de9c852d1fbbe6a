"""Runs arms one after another, whatever becomes of each, and writes what they cost and did to ``ab.json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from verl_rlhfless.ab.arms import STOCK, Arm
from verl_rlhfless.ab.training import ArmOutcome, Say
from verl_rlhfless.errors import DataError, RlhflessError
from verl_rlhfless.report.ab import build_ab
from verl_rlhfless.report.folder import RECORD_FILE
from verl_rlhfless.report.guards import GuardLimits
from verl_rlhfless.report.observed import read_observed
from verl_rlhfless.report.table import render

TrainArm = Callable[[Arm, Say], ArmOutcome]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is compared, and what every arm is held to.

    Attributes:
        out: The folder; each arm has one of its own in it.
        arms: In the order in which they run.
        limits: Steps, samples and budget; which arms they hold for is filled in.
        num_gpus: GPUs that the cluster declares.
        seed: Of all arms; ``None`` = not set.
        recipe: What the arms share, for the record; ``None`` = the demo's own.
        pace: The declared device, for the record; ``None`` = the machine itself.
    """

    out: Path
    arms: tuple[Arm, ...]
    limits: GuardLimits
    num_gpus: int
    seed: int | None
    recipe: Mapping[str, Any] | None = None
    pace: Mapping[str, Any] | None = None


def compare(comparison: Comparison, train_arm: TrainArm, say: Say) -> dict[str, Any]:
    """Run every arm, write ``ab.json``, print the table, and return the record."""
    outcomes = {}
    for number, arm in enumerate(comparison.arms, start=1):
        say(f"{arm.name}: arm {number} of {len(comparison.arms)}")
        outcomes[arm.name] = outcome = _outcome(arm, comparison.out, train_arm, say)
        if outcome.why is not None:
            say(f"{arm.name}: FAILED: {outcome.why}")
    record = build_record(comparison, outcomes)
    comparison.out.mkdir(parents=True, exist_ok=True)
    (comparison.out / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")
    say(render(record))
    return record


def is_sound(record: Mapping[str, Any]) -> bool:
    """Return whether every arm ended well and every guard holds."""
    return not record["failed"] and all(guard["ok"] for guard in record["guards"])


def _outcome(arm: Arm, out: Path, train_arm: TrainArm, say: Say) -> ArmOutcome:
    """Return how the arm ended; what goes wrong around it is its failure, and the next arm runs all the same."""
    try:
        return train_arm(arm, lambda line: say(f"{arm.name}: {line}"))
    except RlhflessError as error:
        return ArmOutcome(out / arm.name, None, (), str(error))


def build_record(comparison: Comparison, outcomes: Mapping[str, ArmOutcome]) -> dict[str, Any]:
    """Return the comparison as ``rlhfless-ab/1``; ``failed`` says why, by arm, whatever is known of its steps."""
    failed = {name: outcome.why for name, outcome in outcomes.items() if outcome.why is not None}
    folders = {}
    for name, outcome in outcomes.items():
        try:
            read_observed(outcome.folder)
        except DataError as error:
            failed.setdefault(name, str(error))
        else:
            folders[name] = outcome.folder
    known = [arm for arm in comparison.arms if arm.name in folders]
    ours = [arm.name for arm in known if arm.is_ours]
    limits = replace(
        comparison.limits,
        pulling_arms=tuple(arm.name for arm in known if arm.pulls_weights),
        asynchronous_arms=tuple(arm.name for arm in known if arm.is_asynchronous),
        reference=STOCK if STOCK in folders and STOCK not in failed else None,
    )
    left_behind = {name: outcomes[name].leftovers for name in ours}
    record = build_ab(folders, comparison.seed, comparison.num_gpus, limits, left_behind)
    return {
        **record,
        "recipe": comparison.recipe,
        "pace": comparison.pace,
        "overrides": {arm.name: list(arm.overrides) for arm in comparison.arms},
        "failed": failed,
    }


def arm_names(arms: Sequence[Arm]) -> str:
    """Return the names for a line of text."""
    return ", ".join(arm.name for arm in arms)
