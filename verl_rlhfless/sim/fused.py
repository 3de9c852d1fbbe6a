"""Forward-only phases that run on freed GPUs while the tail of a rollout still decodes.

Invariant: every finished sample is taken at most once, in the order in which samples finished.
"""

from __future__ import annotations

from dataclasses import dataclass

from verl_rlhfless.policy.fuse import CHUNK_TOKENS
from verl_rlhfless.policy.transitions import TrainerPerf
from verl_rlhfless.sim.leases import Ask, Lease, LeaseBook
from verl_rlhfless.types import BusySpan


@dataclass(slots=True)
class _Crew:
    """Freed GPUs that work together, on a lease of their own or on the trainer's.

    Attributes:
        num_gpus: How many they are.
        ask: The request for a lease of their own.
        lease: That lease, once it is granted.
        is_running: Whether they have not ended yet.
        is_waiting: Whether they wait for the next finished sample, on the trainer's lease.
    """

    num_gpus: int
    ask: Ask | None = None
    lease: Lease | None = None
    is_running: bool = True
    is_waiting: bool = False


class FusedInference:
    """Implements ``ports.InferenceWorkers``. ``resident_lease`` names the trainer's lease where that is held anyway.

    Attributes:
        pending_tokens: Tokens of finished samples that nothing has taken yet.
        done_tokens: Tokens that went through all forward-only phases.
    """

    def __init__(self, book: LeaseBook, trainer: TrainerPerf, resident_lease: str | None) -> None:
        self._book, self._trainer, self._resident_lease = book, trainer, resident_lease
        self._crews: list[_Crew] = []
        self._finished: list[int] = []
        self._next = 0
        self.pending_tokens = 0
        self.done_tokens = 0

    @property
    def num_gpus(self) -> int:
        """GPUs that run inference, or that start to."""
        return sum(crew.num_gpus for crew in self._crews if crew.is_running)

    @property
    def num_pending(self) -> int:
        """Finished samples that nothing has taken yet; ``pending_tokens`` are theirs."""
        return len(self._finished) - self._next

    def add(self, tokens: int) -> None:
        """A sample of ``tokens`` (prompt and response) has finished."""
        self._finished.append(tokens)
        self.pending_tokens += tokens
        for crew in self._crews:
            if crew.is_waiting:
                self._chunk(crew)
                return

    def fuse(self, num_gpus: int) -> None:
        """Begin inference with freed GPUs until the rollout ends; leased ones go when nothing is left to do."""
        crew = _Crew(num_gpus)
        self._crews.append(crew)
        times = self._trainer.times
        if self._resident_lease is not None:
            self._book.after(times.hybrid_sleep_s + self._trainer.fuse_load_s, lambda: self._chunk(crew))
            return

        def granted(lease: Lease) -> None:
            crew.lease = lease
            self._book.after(times.wake_s + self._trainer.fuse_load_s, lambda: self._usable(crew))

        crew.ask = self._book.request_gpus("fuse", num_gpus, granted, times.grant_s)

    def end(self) -> None:
        """The rollout is over: the trainer takes what is left."""
        for crew in self._crews:
            self._end(crew)

    def _usable(self, crew: _Crew) -> None:
        if crew.lease is not None and crew.lease.usable_s is None:
            crew.lease.usable_s = self._book.env.now
        self._chunk(crew)

    def _chunk(self, crew: _Crew) -> None:
        """Give a crew the next finished samples, ``CHUNK_TOKENS`` a GPU; without any it waits or ends its lease."""
        if not crew.is_running:
            return
        limit, first, tokens = crew.num_gpus * CHUNK_TOKENS, self._next, 0
        while self._next < len(self._finished) and tokens < limit:
            tokens += self._finished[self._next]
            self._next += 1
        crew.is_waiting = not tokens and crew.lease is None
        if not tokens:
            if crew.lease is not None:
                self._end(crew)
            return
        self.pending_tokens -= tokens
        began_s = self._book.env.now

        def done() -> None:
            if crew.is_running:
                self.done_tokens += tokens
                lease_id = self._resident_lease if crew.lease is None else crew.lease.lease_id
                assert lease_id is not None
                self._book.busy.append(BusySpan(lease_id, crew.num_gpus, began_s, self._book.env.now))
                self._chunk(crew)

        rate = self._trainer.fuse_tokens_per_s(tokens / (self._next - first)) * crew.num_gpus
        self._book.after(tokens / rate, done)

    def _end(self, crew: _Crew) -> None:
        if crew.is_running:
            crew.is_running = False
            if crew.lease is not None:
                self._book.release(crew.lease)
            elif crew.ask is not None:
                self._book.withdraw(crew.ask)
