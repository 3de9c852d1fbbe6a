"""A length trace from a recorded run, of stock verl too: what was generated for training, counted by the workers.

Invariant: a recipe that did not shuffle replays the trace to the same token counts (``live/replay.py`` picks the group
by ``row modulo groups``, the sample by its session).
"""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_rlhfless.errors import DataError
from verl_rlhfless.live.sample_log import PATTERN, SampleBounds, SampleRecord, read_bounds, read_samples
from verl_rlhfless.report.observed import ended_steps
from verl_rlhfless.trace import FORMAT

_Groups = Mapping[str, Mapping[int, SampleRecord]]


@dataclass(frozen=True, slots=True)
class RecordedTrace:
    """What was written; a step that did not end is left out, since of its samples only the short ones had ended."""

    num_steps: int
    num_groups: int
    num_samples: int
    response_tokens: int
    num_left_out: int = 0


def record_trace(folder: Path, out: Path) -> RecordedTrace:
    """Write the trace of the run in ``folder`` to ``out``, compressed when its name ends in ``.gz``.

    Raises:
        DataError: The run finished no step, or ``folder`` is a comparison of several.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder. Give the folder of an arm.")
    arms = sorted({path.parent.name for path in folder.glob(f"*/{PATTERN}")})
    if arms and not any(folder.glob(PATTERN)):
        raise DataError(f"{folder}: holds several runs. Give one of them: {folder / arms[0]} (of {', '.join(arms)}).")
    bounds = read_bounds(folder)
    ended = ended_steps(folder)
    steps: defaultdict[int, defaultdict[str, dict[int, SampleRecord]]] = defaultdict(lambda: defaultdict(dict))
    for sample in read_samples(folder):
        steps[sample.step][sample.uid][sample.session] = sample  # a group that was asked for again counts once
    unfinished = steps.keys() - ended
    for step in unfinished:
        del steps[step]
    if not steps:
        raise DataError(f"{folder}: no step was finished. Let the run complete one.")
    lines = [_header(folder, bounds), *_steps(steps)]
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    out.write_bytes(gzip.compress(text, mtime=0) if out.suffix == ".gz" else text)
    samples = [sample for groups in steps.values() for group in groups.values() for sample in group.values()]
    return RecordedTrace(
        num_steps=len(steps),
        num_groups=sum(map(len, steps.values())),
        num_samples=len(samples),
        response_tokens=sum(sample.response_tokens for sample in samples),
        num_left_out=len(unfinished),
    )


def _header(folder: Path, bounds: SampleBounds) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": folder.resolve().name,
        "unit": "tokens",
        "max_response_tokens": bounds.max_response_tokens,
        "n": bounds.n,
        "kind": "composed" if bounds.is_replayed else "recorded",
        "source": "rlhfless trace record",
        "licence": "that of the run's model and data",
        "note": "lengths were forced by a replayed trace" if bounds.is_replayed else "",
    }


def _steps(steps: Mapping[int, _Groups]) -> Iterator[dict[str, Any]]:
    visits: Counter[str] = Counter()
    for step, groups in sorted(steps.items()):
        rows = [_group(uid, group, len(groups)) for uid, group in groups.items()]
        rows.sort(key=lambda row: row[0])
        names: Counter[str] = Counter()
        written = []
        for _, group in rows:
            prompt = group["prompt_id"]
            names[prompt] += 1
            written.append(group if names[prompt] == 1 else {**group, "prompt_id": f"{prompt}#{names[prompt]}"})
        visits.update(names.keys())
        yield {"step": step, "epoch": max(visits[prompt] for prompt in names), "groups": written}


def _group(uid: str, group: Mapping[int, SampleRecord], num_groups: int) -> tuple[Any, dict[str, Any]]:
    """Return the group with its place in the step: replay finds it by ``row modulo groups``."""
    samples = [group[session] for session in sorted(group)]
    first = samples[0]
    written: dict[str, Any] = {
        "prompt_id": first.prompt,
        "prompt_tokens": first.prompt_tokens,
        "response_tokens": [sample.response_tokens for sample in samples],
    }
    if any(len(sample.turns) > 1 for sample in samples):
        written["turns"] = [list(sample.turns) for sample in samples]
    place = (first.row is None, 0 if first.row is None else first.row % num_groups, first.row or 0, uid)
    return place, written
