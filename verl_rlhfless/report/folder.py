"""``report.md`` and its pictures, from the folder of a comparison or of one observed run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from verl_rlhfless.errors import DataError
from verl_rlhfless.ledger import account
from verl_rlhfless.live.observer import LEASES_FILE
from verl_rlhfless.report.ab import FORMAT, build_arm
from verl_rlhfless.report.figure import draw_timelines
from verl_rlhfless.report.markdown import markdown
from verl_rlhfless.report.observed import read_observed
from verl_rlhfless.report.predictions import Prediction, predictions
from verl_rlhfless.report.record import ArmRecord, Figures
from verl_rlhfless.report.timeline import Timeline, build_timeline

RECORD_FILE = "ab.json"
REPORT_FILE = "report.md"
WHOLE_FILE = "timeline.png"
STEPS_FILE = "timeline-steps.png"


def write_report(folder: Path) -> Path:
    """Write ``report.md`` and the pictures that it shows into ``folder`` and return the path of the report.

    Args:
        folder: What ``rlhfless ab`` or ``rlhfless demo`` wrote, or one observed run.

    Raises:
        DataError: It holds neither, or a record is malformed.
    """
    record, runs = _read(folder)
    timelines: dict[str, Timeline] = {}
    planned: dict[str, list[Prediction]] = {}
    for name, run in runs.items():
        observed = read_observed(run)
        timelines[name] = build_timeline(observed)
        planned[name] = predictions(observed, _without_validation(build_arm(run), timelines[name]))
    report = folder / REPORT_FILE
    figures = _draw(timelines, folder)
    try:
        text = markdown(record, planned, figures)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise DataError(f"{folder / RECORD_FILE}: has another form ({what}). Run the comparison again.") from error
    report.write_text(text, encoding="utf-8")
    return report


def _without_validation(arm: ArmRecord, timeline: Timeline) -> dict[int, Figures]:
    """Return the figures of each step with the GPU-seconds of what is planned: validation after it is not."""
    timers = {time.step: time.timer for time in timeline.steps}
    return {
        one.step: replace(one.figures, gpu=account(timeline.leases, timeline.busy, timers[one.step]))
        if one.step in timers
        else one.figures
        for one in arm.steps
    }


def _draw(timelines: Mapping[str, Timeline], folder: Path) -> dict[str, str]:
    """Draw what there is and return the pictures' names by title."""
    leased = {name: timeline for name, timeline in timelines.items() if timeline.leases}
    trained = {name: timeline for name, timeline in leased.items() if timeline.steps}
    figures = {}
    if leased:
        draw_timelines(leased, folder / WHOLE_FILE)
        figures["Every lease of the whole run"] = WHOLE_FILE
    if trained:
        draw_timelines(trained, folder / STEPS_FILE, steps_only=True)
        figures["Every lease of the training steps"] = STEPS_FILE
    return figures


def _read(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Path]]:
    """Return the record, and the folder of each arm that can be read."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder. Give the --out of `rlhfless ab`.")
    path = folder / RECORD_FILE
    if path.exists():
        record = _parse(path)
        return record, {name: folder / name for name in record["arms"]}
    if (folder / LEASES_FILE).exists():
        name = folder.resolve().name
        return {"format": FORMAT, "arms": {name: build_arm(folder).as_json()}, "guards": []}, {name: folder}
    raise DataError(f"{folder}: holds neither {RECORD_FILE} nor {LEASES_FILE}. {_what_to_give(folder)}")


def _what_to_give(folder: Path) -> str:
    if columns := sorted(folder.glob(f"*/{RECORD_FILE}")):
        return f"Give one of the demo's columns: {columns[0].parent}."
    if arms := sorted(folder.glob(f"*/{LEASES_FILE}")):
        return f"An unfinished comparison? Give one of its arms: {arms[0].parent}."
    return "Give the --out of `rlhfless ab`, or an arm's folder."


def _parse(path: Path) -> Mapping[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: is not JSON: {error}. Run the comparison again.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise DataError(f"{path}: is not a record in the format {FORMAT}. Give the --out of `rlhfless ab`.")
    for key, kind in (("arms", dict), ("guards", list)):
        if not isinstance(record.get(key), kind):
            raise DataError(f"{path}: `{key}` is missing or of another form. Run the comparison again.")
    return record
