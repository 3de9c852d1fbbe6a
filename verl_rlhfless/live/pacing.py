"""Pacing: a declared least time of every engine iteration, so that a few CPU cores can stand for several GPUs honestly.

A real vLLM worker computes each iteration and then waits until the declared device would have finished it.

Invariant: while requests keep running, an iteration ends its declared time after the declared end of the one before, so
that scheduler gaps and sleep jitter do not add up. An iteration that misses this end is an overrun and is counted, with
the time lost: overruns void a run.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_rlhfless.errors import ConfigError
from verl_rlhfless.live.iteration import Iteration

PACE_KEY = "rlhfless.instrument.pace"

_MAX_NUMBER = 1e9  # milliseconds: eleven days, longer than any iteration


@dataclass(frozen=True, slots=True)
class PaceModel:
    """What an iteration takes on the declared device.

    Attributes:
        base_ms: Every iteration [ms]; at least four times the real iteration, so that the CPU keeps up.
        per_request_ms: Each request of the batch [ms].
        per_prefill_token_ms: Each prompt token [ms].
        per_context_token_us: Each token that attention reads [us].
        per_inference_token_us: Each token of a rank's share in old-log-prob, reference or value inference [us].
        per_update_token_us: Each token of a rank's share in an actor or critic update [us].
        tp_speedup: Factor by tensor-parallel size; size 1 is 1.0 when it is not given.
    """

    base_ms: float
    per_request_ms: float = 0.0
    per_prefill_token_ms: float = 0.0
    per_context_token_us: float = 0.0
    per_inference_token_us: float = 0.0
    per_update_token_us: float = 0.0
    tp_speedup: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, value: str) -> PaceModel:
        """Return the model given as JSON text, or as the path of a file with JSON text.

        Raises:
            ConfigError: The file is unreadable, the text is no JSON object, a key is unknown or a value out of range.
        """
        record = _load(value)
        known = [f.name for f in dataclasses.fields(cls)]
        for name in record:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                action = f"Did you mean {close[0]}?" if close else f"Known keys: {', '.join(known)}."
                raise ConfigError(f"{PACE_KEY}.{name}", record[name], "is not a known key", action)
        if "base_ms" not in record:
            raise ConfigError(f"{PACE_KEY}.base_ms", None, "is required", 'Write e.g. {"base_ms": 40}.')
        numbers = {name: _number(name, record[name]) for name in record if name != "tp_speedup"}
        if not numbers["base_ms"] > 0:
            raise ConfigError(f"{PACE_KEY}.base_ms", record["base_ms"], "must be > 0", "Give milliseconds, e.g. 40.")
        return cls(**numbers, tp_speedup=_speedups(record.get("tp_speedup", {})))

    def to_json(self) -> str:
        """Return JSON text that ``parse`` turns into an equal model."""
        return json.dumps(dataclasses.asdict(self))

    def check_tp(self, tp: int) -> None:
        """Refuse a tensor-parallel size whose speed was not declared.

        Raises:
            ConfigError: ``tp_speedup`` has no entry for ``tp``.
        """
        if tp != 1 and tp not in self.tp_speedup:
            known = sorted({1, *self.tp_speedup})
            action = f'Add e.g. {{"{tp}": {tp / 1.25:g}}}, the speed relative to one GPU.'
            raise ConfigError(f"{PACE_KEY}.tp_speedup", known, f"has no entry for tensor-parallel size {tp}", action)

    def iteration_s(self, tp: int, batch: int, context: int, prefill: int) -> float:
        """Return the declared time of one iteration [s].

        Args:
            tp: Tensor-parallel size, one that ``check_tp`` accepts.
            batch: Requests computed.
            context: Tokens that attention reads, summed over the requests.
            prefill: Prompt tokens computed.
        """
        tokens_ms = self.per_prefill_token_ms * prefill + self.per_context_token_us * context / 1e3
        return (self.base_ms + self.per_request_ms * batch + tokens_ms) / 1e3 / self.tp_speedup.get(tp, 1.0)

    def inference_s(self, num_tokens: int) -> float:
        """Return the declared time of a rank's inference over ``num_tokens`` [s]."""
        return self.per_inference_token_us * num_tokens / 1e6

    def update_s(self, num_tokens: int) -> float:
        """Return the declared time of a rank's update on ``num_tokens`` [s]."""
        return self.per_update_token_us * num_tokens / 1e6


@dataclass(frozen=True, slots=True)
class PacedTime:
    """How one iteration kept its declared time.

    Attributes:
        declared_s: What it should take.
        overrun_s: How long after its declared end it was ready; 0 when it was in time.
    """

    declared_s: float
    overrun_s: float


NOT_PACED = PacedTime(0.0, 0.0)


class Pacer:
    """The deadline clock of one worker process."""

    def __init__(
        self,
        model: PaceModel,
        tp: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        model.check_tp(tp)
        self._model, self._tp, self._clock, self._sleep = model, tp, clock, sleep
        self._declared_s = 0.0
        self._deadline_s = 0.0  # declared end of the current iteration, or of the last one

    def begin(self, iteration: Iteration) -> None:
        """Start the clock of ``iteration``.

        It starts at the declared end of the last iteration when requests of that one go on: the gap in between, and a
        sleep that ended late, are then part of the declared time.
        """
        self._declared_s = self._model.iteration_s(
            self._tp, iteration.num_requests, iteration.context_tokens, iteration.prefill_tokens
        )
        self._deadline_s = (self._deadline_s if iteration.num_continued else self._clock()) + self._declared_s

    def wait(self) -> PacedTime:
        """Sleep until the declared end of the iteration that ``begin`` started; return how it kept its time."""
        overrun_s = self._clock() - self._deadline_s
        if overrun_s > 0:
            self._deadline_s += overrun_s  # lost time is not caught up: busy time is declared time plus overruns
            return PacedTime(self._declared_s, overrun_s)
        self._sleep(-overrun_s)
        return PacedTime(self._declared_s, 0.0)


def _load(value: str) -> Mapping[str, Any]:
    text = value
    if not value.lstrip().startswith("{"):
        try:
            text = Path(value).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            action = 'Give JSON such as {"base_ms": 40}, or the path of a file that holds it.'
            raise ConfigError(PACE_KEY, value, f"is neither JSON nor a readable file ({error})", action) from error
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(PACE_KEY, value, f"is not valid JSON ({error})", "Correct the JSON text.") from error
    if not isinstance(record, dict):
        raise ConfigError(PACE_KEY, value, "must be a JSON object", 'Write e.g. {"base_ms": 40}.')
    return record


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _MAX_NUMBER:
        rule = f"must be a number between 0 and {_MAX_NUMBER:g}"
        raise ConfigError(f"{PACE_KEY}.{name}", value, rule, "Correct the value.")
    return float(value)


def _speedups(value: object) -> dict[int, float]:
    key = f"{PACE_KEY}.tp_speedup"
    action = 'Write e.g. {"2": 1.6}: the speed relative to one GPU, by tensor-parallel size.'
    if not isinstance(value, dict):
        raise ConfigError(key, value, "must be an object", action)
    for size, factor in value.items():
        if not re.fullmatch("[1-9][0-9]{0,3}", size):
            raise ConfigError(key, size, "every key must be a tensor-parallel size >= 1", action)
        if not _number(f"tp_speedup.{size}", factor) > 0:
            raise ConfigError(f"{key}.{size}", factor, "must be > 0", action)
    return {int(size): float(factor) for size, factor in value.items()}
