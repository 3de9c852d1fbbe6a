"""One measured figure, and how a figure is measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from verl_rlhfless.policy.calibrate import IterationSample


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    Attributes:
        what: What took the time: ``decode``, ``prefill``, ``start``, ``load``, ``wake`` and so on.
        seconds: Median.
        low_s: Least.
        high_s: Most.
        decodes: Requests that decode one token each (an iteration).
        context_tokens: Their summed context.
        prefill_tokens: Prompt tokens of one request, computed from its first.
        num_bytes: Bytes that were moved, or that the device held at the end.
    """

    what: str
    seconds: float
    low_s: float
    high_s: float
    decodes: int = 0
    context_tokens: int = 0
    prefill_tokens: int = 0
    num_bytes: int = 0

    @classmethod
    def of(cls, what: str, seconds: Sequence[float], **counts: int) -> Row:
        """Return the row of repeated measurements."""
        return cls(what, statistics.median(seconds), min(seconds), max(seconds), **counts)

    @property
    def sample(self) -> IterationSample | None:
        """The engine iteration that this row measured, for the calibration."""
        if self.what not in ("decode", "prefill"):
            return None
        return IterationSample(self.decodes, self.context_tokens, self.prefill_tokens, self.seconds)

    def as_json(self) -> dict[str, Any]:
        """Return a JSON object without the counts that do not apply."""
        return {key: value for key, value in asdict(self).items() if value or not isinstance(value, int)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Row:
        """Return the row that ``as_json`` wrote."""
        return cls(**values)


class Subject(Protocol):
    """An engine that holds one model. Its start belongs to the figures, so it starts with the first part that runs."""

    @property
    def parts(self) -> dict[str, Callable[[], list[Row]]]:
        """What it can measure, by name, in the order of importance."""

    def close(self) -> None:
        """End the engine and free the device."""


def timed(action: Callable[[], object], repeats: int, wait: Callable[[], object] = lambda: None) -> list[float]:
    """Return the seconds of each repetition; ``wait`` returns when the device has done what it was told."""
    seconds = []
    for _ in range(repeats):
        wait()
        started = time.perf_counter()
        action()
        wait()
        seconds.append(time.perf_counter() - started)
    return seconds
