"""A trace as the simulator runs it: what an arm may see, and what only the world knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np

from verl_rlhfless.policy.snapshot import Batch, FloatArray, IntArray, SharedPrefix
from verl_rlhfless.trace import TraceGroup, TraceStep, read_header, read_trace


@dataclass(frozen=True, slots=True)
class StepData:
    """One step: what the arm may see (``batch``) and what only the world knows.

    Attributes:
        lengths: [B] int64 response tokens, at least 1.
        turn_ends: Of each sample with several turns: its tokens at the end of every turn, increasing.
        score_s: [B] seconds that the reward of a sample takes from its last token on.
        min_start_s: [B] earliest start, in seconds from the beginning of the step.
    """

    batch: Batch
    lengths: IntArray
    turn_ends: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    score_s: FloatArray | None = None
    min_start_s: FloatArray | None = None


def load_steps(path: str | Path) -> tuple[StepData, ...]:
    """Return the steps of a trace.

    Raises:
        DataError: The trace breaks a rule of its format.
    """
    cap = max(read_header(path).max_response_tokens, 1)
    return tuple(_step(step, cap) for step in read_trace(path))


def _step(step: TraceStep, cap: int) -> StepData:
    """Return a step whose longest possible response has ``cap`` tokens; its samples are numbered group by group."""
    groups = step.groups
    sizes = [len(group.response_tokens) for group in groups]
    lengths = np.array([tokens for group in groups for tokens in group.response_tokens])
    batch = Batch(
        step=step.step,
        prompt_ids=tuple(group.prompt_id for group in groups),
        group_of=np.repeat(np.arange(len(sizes)), sizes),
        prompt_tokens=np.repeat([group.prompt_tokens for group in groups], sizes),
        max_response_tokens=cap,
        prefixes=tuple(map(_prefix, groups)) if any(map(_prefix, groups)) else (),
    )
    scores = [score for group in groups for score in group.score_s or (0.0,) * len(group.response_tokens)]
    return StepData(
        batch=batch,
        lengths=np.maximum(lengths, 1),
        turn_ends=_turn_ends(groups),
        score_s=np.array(scores) if any(scores) else None,
        min_start_s=np.repeat([group.min_start_s for group in groups], sizes)
        if any(group.min_start_s for group in groups)
        else None,
    )


def _prefix(group: TraceGroup) -> SharedPrefix | None:
    if group.prefix_id is None or not group.prefix_tokens:
        return None
    return SharedPrefix(group.prefix_id, group.prefix_tokens)


def _turn_ends(groups: tuple[TraceGroup, ...]) -> dict[int, tuple[int, ...]]:
    """Return the ends of turns that hold tokens, of every sample with more than one such turn."""
    ends, sample = {}, 0
    for group in groups:
        for turns in group.turns or [()] * len(group.response_tokens):
            filled = tuple(accumulate(tokens for tokens in turns if tokens))
            if len(filled) > 1:
                ends[sample] = filled
            sample += 1
    return ends
