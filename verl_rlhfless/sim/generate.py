"""Synthetic length traces from a few published statistics: mean, tail, intra-class correlation, drift, epochs."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from verl_rlhfless.errors import ConfigError
from verl_rlhfless.trace import FORMAT, read_trace

_MOST_TOKENS = 10**9
"""Of a mean or a cap, so that every count drawn from it stays one that the format allows."""
_MOST_SAMPLES = 10**7
"""Of a trace, which is built in memory."""


@dataclass(frozen=True, slots=True)
class TraceSpec:
    """What to generate.

    Attributes:
        steps_per_epoch: Steps of an epoch.
        epochs: Visits of each prompt.
        groups: Prompts of a step.
        n: Responses per prompt.
        mean: Mean response tokens of the first step, before the cap.
        tail: Standard deviation of the log length (0.7 = hard maths, 1.2 = long chains of thought).
        icc: Share of the log variance that lies between prompts.
        drift: Factor by which the mean grows from step to step.
        memory: Correlation of a prompt's effect between epochs.
        max_response_tokens: Cap of a response.
        prompt_tokens: Mean tokens of a prompt.
        seed: The same one gives the same bytes.
    """

    steps_per_epoch: int = 4
    epochs: int = 2
    groups: int = 128
    n: int = 8
    mean: float = 1500.0
    tail: float = 1.0
    icc: float = 0.3
    drift: float = 1.0
    memory: float = 0.9
    max_response_tokens: int = 32768
    prompt_tokens: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        rules = (
            ("steps_per_epoch", self.steps_per_epoch >= 1, "must be >= 1"),
            ("epochs", self.epochs >= 1, "must be >= 1"),
            ("groups", self.groups >= 1, "must be >= 1"),
            ("n", 1 <= self.n <= 4096, "must be from 1 to 4096"),
            ("mean", 1 <= self.mean <= _MOST_TOKENS, f"must be from 1 to {_MOST_TOKENS}"),
            ("tail", 0 < self.tail <= 3, "must be above 0 and at most 3"),
            ("icc", 0 <= self.icc <= 1, "must be from 0 to 1"),
            ("drift", 0.1 <= self.drift <= 10, "must be from 0.1 to 10"),
            ("memory", 0 <= self.memory <= 1, "must be from 0 to 1"),
            ("max-response-tokens", 1 <= self.max_response_tokens <= _MOST_TOKENS, f"must be from 1 to {_MOST_TOKENS}"),
            ("prompt-tokens", 1 <= self.prompt_tokens <= _MOST_TOKENS, f"must be from 1 to {_MOST_TOKENS}"),
            ("seed", self.seed >= 0, "must be >= 0"),
        )
        for key, is_right, rule in rules:
            if not is_right:
                raise ConfigError(
                    f"--{key.replace('_', '-')}", getattr(self, key.replace("-", "_")), rule, "Correct it."
                )
        if self.num_samples > _MOST_SAMPLES:
            key, rule = "--epochs x --steps-per-epoch x --groups x --n", f"must be at most {_MOST_SAMPLES} responses"
            raise ConfigError(key, self.num_samples, rule, "Lower one of them.")

    @property
    def num_steps(self) -> int:
        """Steps over all epochs."""
        return self.steps_per_epoch * self.epochs

    @property
    def num_samples(self) -> int:
        """Responses over all steps."""
        return self.num_steps * self.groups * self.n


def write_trace(spec: TraceSpec, path: Path) -> float:
    """Write a trace to ``path`` (gzipped when it ends in ``.gz``) and return its mean response tokens.

    The same seed gives the same bytes.
    """
    rng = np.random.default_rng(spec.seed)
    prompts = spec.groups * spec.steps_per_epoch
    effect = rng.standard_normal(prompts)
    prompt_tokens = np.maximum(
        1, np.rint(spec.prompt_tokens * np.exp(0.4 * rng.standard_normal(prompts) - 0.08))
    ).astype(int)
    lines = [json.dumps(_header(spec, path))]
    tokens = 0
    for epoch in range(spec.epochs):
        order = rng.permutation(prompts)
        for k in range(spec.steps_per_epoch):
            index = epoch * spec.steps_per_epoch + k
            level = math.log(spec.mean) - spec.tail**2 / 2 + index * math.log(spec.drift)
            groups: list[dict[str, Any]] = [
                {
                    "prompt_id": f"s{p}",
                    "prompt_tokens": int(prompt_tokens[p]),
                    "response_tokens": _lengths(spec, rng, level, float(effect[p])),
                }
                for p in order[k * spec.groups : (k + 1) * spec.groups].tolist()
            ]
            tokens += sum(sum(group["response_tokens"]) for group in groups)
            lines.append(json.dumps({"step": index + 1, "epoch": epoch + 1, "groups": groups}))
        effect = spec.memory * effect + math.sqrt(1 - spec.memory**2) * rng.standard_normal(prompts)
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return tokens / spec.num_samples


def _lengths(spec: TraceSpec, rng: np.random.Generator, level: float, effect: float) -> list[int]:
    """Return the lengths of one prompt's responses: log-normal around ``level``, correlated by the prompt's effect."""
    noise = math.sqrt(spec.icc) * effect + math.sqrt(1 - spec.icc) * rng.standard_normal(spec.n)
    lengths = np.clip(np.rint(np.exp(level + spec.tail * noise)), 1, spec.max_response_tokens)
    return [int(v) for v in lengths]


def _header(spec: TraceSpec, path: Path) -> dict[str, object]:
    return {
        "format": FORMAT,
        "name": path.name.split(".")[0],
        "unit": "tokens",
        "max_response_tokens": spec.max_response_tokens,
        "n": spec.n,
        "kind": "composed",
        "source": "verl_rlhfless trace generate",
        "licence": "Apache-2.0",
        "note": f"log-normal, mean {spec.mean:g}, tail {spec.tail:g}, ICC {spec.icc:g}, drift {spec.drift:g}, "
        f"memory {spec.memory:g}, seed {spec.seed}",
    }


def trace_stats(path: Path) -> list[dict[str, float]]:
    """Return groups, samples, mean, p50, p90, p99, max, within-group CV and intra-class correlation of each step.

    The correlation is that of the logarithms of the lengths, where a response of 0 tokens counts as 1.

    Raises:
        DataError: The trace breaks a rule of its format.
    """
    rows = []
    for step in read_trace(path):
        lengths = np.array([tokens for group in step.groups for tokens in group.response_tokens])
        size = np.array([len(group.response_tokens) for group in step.groups])
        group_of = np.repeat(np.arange(len(size)), size)
        log = np.log(np.maximum(lengths, 1))
        mean_log = np.bincount(group_of, weights=log) / size
        within = float(np.mean((log - mean_log[group_of]) ** 2 * (size / np.maximum(size - 1, 1))[group_of]))
        between = max(0.0, float(np.var(mean_log)) - within * float(np.mean(1 / size)))
        mean = np.bincount(group_of, weights=lengths) / size
        spread = np.sqrt(np.bincount(group_of, weights=(lengths - mean[group_of]) ** 2) / size)
        quantiles = np.quantile(lengths, (0.5, 0.9, 0.99))
        rows.append(
            {
                "step": step.step,
                "groups": len(size),
                "samples": len(lengths),
                "mean": float(lengths.mean()),
                "p50": float(quantiles[0]),
                "p90": float(quantiles[1]),
                "p99": float(quantiles[2]),
                "max": float(lengths.max()),
                "cv_within": float(np.mean(spread / np.maximum(mean, 1e-9))),
                "icc": between / (between + within) if between + within > 0 else 0.0,
            }
        )
    return rows
