"""Measured decode iterations, from the progress that replicas report anyway.

While the same requests run on a replica, each gets one token an iteration; so the tokens of the longest stretch without
a change, and its seconds, are one sample. Prefill is not measured: a stretch ends when a request joins.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from verl_rlhfless.live.tickets import Delta
from verl_rlhfless.policy.calibrate import IterationSample

_LEAST_ITERATIONS = 12  # a report may come one iteration early or late
_MOST_ITERATIONS = 48
_KEPT = 64


@dataclass(slots=True)
class _Stretch:
    requests: frozenset[str]
    began_s: float
    last_s: float
    iterations: int = 0
    context: float = 0.0


class SpeedMeter:
    """Samples by tensor-parallel size, the newest of them kept."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stretches: dict[str, tuple[int, _Stretch]] = {}
        self._samples: dict[int, deque[IterationSample]] = {}

    @property
    def samples(self) -> Mapping[int, Sequence[IterationSample]]:
        """What was measured, by tensor-parallel size."""
        return {tp: tuple(of) for tp, of in self._samples.items()}

    def note(self, server: str, tp: int, delta: Delta, load: tuple[int, int]) -> None:
        """Take a server's report.

        Args:
            server: Who reports.
            tp: Its tensor-parallel size.
            delta: New tokens of each request.
            load: Requests that run there by now, and the tokens that they hold.
        """
        num_requests, context = load
        requests, now_s = frozenset(part.attempt for part in delta.parts), self._clock()
        found = self._stretches.get(server)
        stretch = found[1] if found else None
        if stretch is None or stretch.requests != requests or len(requests) != num_requests:
            self._close(server)
            if len(requests) == num_requests:
                self._stretches[server] = tp, _Stretch(requests, now_s, now_s)
            return
        iterations = max(len(part.tokens) for part in delta.parts)
        stretch.iterations += iterations
        stretch.context += iterations * context
        stretch.last_s = now_s
        if stretch.iterations >= _MOST_ITERATIONS:
            self._close(server)

    def _close(self, server: str) -> None:
        tp, stretch = self._stretches.pop(server, (0, None))
        if stretch is None or stretch.iterations < _LEAST_ITERATIONS:
            return
        sample = IterationSample(
            decodes=len(stretch.requests),
            context_tokens=round(stretch.context / stretch.iterations),
            prefill_tokens=0,
            seconds=(stretch.last_s - stretch.began_s) / stretch.iterations,
        )
        self._samples.setdefault(tp, deque(maxlen=_KEPT)).append(sample)
