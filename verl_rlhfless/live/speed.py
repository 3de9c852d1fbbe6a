"""Measured decode iterations, from the progress that replicas report anyway.

Each running request gets one token in every iteration of its engine. So between two reports, if no request joined, the
most new tokens of any request are the number of iterations, and the new tokens of all requests divided by it are the
mean batch. Reports during which requests ended count too. Else only the small batches of a rollout's tail would be
measured, and plans would take large ones to be as fast.

Prefill must not be measured. So a report in which a request has its first tokens is left out, and so is the one before
it, during which the prompt may have been computed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from verl_rlhfless.live.tickets import Delta
from verl_rlhfless.policy.calibrate import IterationSample

_LEAST_ITERATIONS = 12  # a report may come one iteration early or late
_KEPT = 64


@dataclass(frozen=True, slots=True)
class _Stretch:
    """What a server did while no request joined; context is summed over iterations."""

    seconds: float = 0.0
    iterations: int = 0
    tokens: int = 0
    context: int = 0

    def __add__(self, other: _Stretch) -> _Stretch:
        return _Stretch(
            self.seconds + other.seconds,
            self.iterations + other.iterations,
            self.tokens + other.tokens,
            self.context + other.context,
        )

    def sample(self) -> IterationSample:
        return IterationSample(
            decodes=round(self.tokens / self.iterations),
            context_tokens=round(self.context / self.iterations),
            prefill_tokens=0,
            seconds=self.seconds / self.iterations,
        )


@dataclass(slots=True)
class _Server:
    """A server's last report, and what it did before it."""

    reported_s: float
    sure: _Stretch = _Stretch()
    last: _Stretch = _Stretch()


class SpeedMeter:
    """Samples by tensor-parallel size, the newest of them kept."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._servers: dict[str, _Server] = {}
        self._samples: dict[int, deque[IterationSample]] = {}

    @property
    def samples(self) -> Mapping[int, Sequence[IterationSample]]:
        """What was measured, by tensor-parallel size."""
        return {tp: tuple(of) for tp, of in self._samples.items()}

    def note(self, name: str, tp: int, delta: Delta, context: int) -> None:
        """Take a server's report.

        Args:
            name: The server.
            tp: Its tensor-parallel size.
            delta: New tokens of each request that goes on.
            context: Tokens that the requests on it hold by now.
        """
        now_s = self._clock()
        server = self._servers.get(name)
        if server is None or not delta.parts or any(part.start == 0 for part in delta.parts):
            self._servers[name] = _Server(now_s)
            return
        server.sure += server.last
        if server.sure.iterations >= _LEAST_ITERATIONS:
            self._samples.setdefault(tp, deque(maxlen=_KEPT)).append(server.sure.sample())
            server.sure = _Stretch()
        iterations = max(len(part.tokens) for part in delta.parts)
        tokens = sum(len(part.tokens) for part in delta.parts)
        server.last = _Stretch(now_s - server.reported_s, iterations, tokens, iterations * context)
        server.reported_s = now_s
