"""A replayed long-tail workload scaled to the demo: a trace cut to size, and prompts as long as real ones.

Every prompt of a step begins with the same instructions, and the samples of a group share the whole prompt, so both
kinds of shared prefix are there. Lengths and recurrence of prompts come from the trace.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_rlhfless.demo.assets import Problem, arithmetic_problems
from verl_rlhfless.errors import ConfigError
from verl_rlhfless.trace import FORMAT, TraceGroup, read_header, read_trace

_INSTRUCTIONS = (
    "You are a careful calculator. Work through the question step by step and check every step. Write each "
    "intermediate result on a line of its own, say which rule you used, and end with the number alone."
)
_EXAMPLES = 12  # solved examples in a prompt, its own ones


@dataclass(frozen=True, slots=True)
class Size:
    """What of a trace is replayed.

    Attributes:
        prompts: Prompt groups of a step.
        samples: Responses of a group.
        max_response_tokens: The trace's cap is scaled to this many tokens, and every length with it.
    """

    prompts: int
    samples: int
    max_response_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """A fitted trace, the problems of its prompts in the order of the rows, and by what its lengths were scaled."""

    trace: Path
    problems: tuple[Problem, ...]
    scale: float


def default_trace(path: Path, seed: int) -> Path:
    """Write a trace with the statistics of a 3B model on mathematics, 16 responses to a prompt, and return ``path``."""
    from verl_rlhfless.sim.generate import TraceSpec, write_trace

    write_trace(
        TraceSpec(
            steps_per_epoch=1,
            epochs=8,
            groups=32,
            n=16,
            mean=560,
            tail=0.75,
            icc=0.37,
            max_response_tokens=2048,
            prompt_tokens=86,
            seed=seed,
        ),
        path,
    )
    return path


def fit(source: Path, folder: Path, size: Size, seed: int) -> Workload:
    """Cut and scale the trace ``source`` to ``size``, and write it to ``folder``.

    Prompts that the trace visits several times are replayed in each step; if there are too few, every step has prompts
    of its own.

    Raises:
        ConfigError: The trace is smaller than ``size``.
        DataError: The trace is missing or breaks a rule of its format.
    """
    header = read_header(source)
    scale = size.max_response_tokens / header.max_response_tokens
    steps = list(_visits(source, size) or _first_groups(source, size))
    if not steps:
        raise ConfigError(
            "--trace",
            str(source),
            f"must have steps of at least {size.prompts} groups of {size.samples} responses",
            "Give a larger trace, or leave it out.",
        )
    target = folder / "trace.jsonl"
    target.write_text("\n".join(_lines(header.name, header.licence, steps, (size, scale))) + "\n", encoding="utf-8")
    is_recurring = [group.prompt_id for group in steps[0]] == [group.prompt_id for group in steps[-1]]
    count = size.prompts if is_recurring else size.prompts * len(steps)
    return Workload(target, tuple(_problems(count, seed)), scale)


def _visits(source: Path, size: Size) -> list[list[TraceGroup]]:
    """Return, visit after visit, the first prompts that come at least twice; nothing when there are too few."""
    visits: defaultdict[str, list[TraceGroup]] = defaultdict(list)
    for step in read_trace(source):
        for group in step.groups:
            if len(group.response_tokens) >= size.samples:
                visits[group.prompt_id].append(group)
    chosen = [groups for groups in visits.values() if len(groups) >= 2][: size.prompts]
    if len(chosen) < size.prompts:
        return []
    return [list(groups) for groups in zip(*chosen, strict=False)]


def _first_groups(source: Path, size: Size) -> Iterator[list[TraceGroup]]:
    for step in read_trace(source):
        groups = [group for group in step.groups if len(group.response_tokens) >= size.samples]
        if len(groups) >= size.prompts:
            yield groups[: size.prompts]


def _lines(name: str, licence: str, steps: Sequence[Sequence[TraceGroup]], how: tuple[Size, float]) -> Iterator[str]:
    size, scale = how
    yield json.dumps(
        {
            "format": FORMAT,
            "name": f"{name}-fitted",
            "unit": "tokens",
            "max_response_tokens": size.max_response_tokens,
            "n": size.samples,
            "kind": "composed",
            "source": name,
            "licence": licence,
            "note": f"{size.prompts} groups a step, {size.samples} responses each, lengths times {scale:g}",
        }
    )
    for number, groups in enumerate(steps, start=1):
        yield json.dumps({"step": number, "epoch": number, "groups": [_scaled(group, size, scale) for group in groups]})


def _scaled(group: TraceGroup, size: Size, scale: float) -> dict[str, Any]:
    lengths = [
        min(size.max_response_tokens, max(1, round(tokens * scale))) for tokens in group.response_tokens[: size.samples]
    ]
    return {"prompt_id": group.prompt_id, "prompt_tokens": group.prompt_tokens, "response_tokens": lengths}


def _problems(count: int, seed: int) -> list[Problem]:
    rng = random.Random(seed)
    pool = arithmetic_problems(4096, seed + 1)
    return [
        Problem(
            " ".join(
                [
                    _INSTRUCTIONS,
                    *(f"{p.question} #### {p.answer}" for p in rng.sample(pool, _EXAMPLES)),
                    problem.question,
                ]
            ),
            problem.answer,
        )
        for problem in arithmetic_problems(count, seed)
    ]


def least_prefill(prompts: Sequence[Sequence[int]], samples: int, block: int) -> int:
    """Return the least prompt tokens that engines with a prefix cache compute for a step.

    Each distinct full block of ``block`` tokens is computed once; what follows a prompt's last full block before its
    last token is computed for every sample, because an engine caches full blocks only and always computes one token.

    Args:
        prompts: Token ids of each prompt.
        samples: Responses to each prompt.
        block: Tokens of a block of keys and values.
    """
    cached = [(len(prompt) - 1) // block * block for prompt in prompts]
    heads = [prompt[:end] for prompt, end in zip(prompts, cached, strict=True)]
    blocks = sorted({tuple(head[: end + block]) for head in heads for end in range(0, len(head), block)})
    return block * len(blocks) + samples * sum(len(p) - end for p, end in zip(prompts, cached, strict=True))
