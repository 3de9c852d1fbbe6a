"""What the router and the fleet tell each other: which replicas are on their way, what is leased, what is asked for.

Invariant: GPUs count as leased from the request for them until the fleet has confirmed their return.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verl_rlhfless.live.outbox import Outbox


@dataclass(frozen=True, slots=True)
class StartReplica:
    """Start one more replica of ``tp`` GPUs."""

    tp: int


@dataclass(frozen=True, slots=True)
class EndReplica:
    """Give the lease of the replica at ``server`` back; the router sends nothing there any more."""

    server: str


@dataclass(frozen=True, slots=True)
class ReclaimReplica:
    """Give the lease of the dead replica at ``server`` back."""

    server: str


Order = StartReplica | EndReplica | ReclaimReplica


class FleetDesk:
    """The router's side of an elastic fleet; of a resident one it only knows that nothing is free.

    Attributes:
        expected: Tensor-parallel size of each replica that is on its way.
        orders: Those of this rollout for the fleet; ``None`` = it is over.
        num_started: Replicas that were ordered since the last fleet was announced.
    """

    def __init__(self, tp: int, num_gpus: int) -> None:
        """Take the size of replicas that nobody described, and the GPUs that replicas may lease together."""
        self._tp, self._num_gpus = tp, num_gpus
        self._tp_of: dict[str, int] = {}
        self._num_leased = 0
        self.expected: list[int] = []
        self.orders: Outbox[Order | None] = Outbox()
        self.num_started = 0

    @property
    def free_gpus(self) -> int:
        """GPUs of the budget that no replica leases."""
        return max(0, self._num_gpus - self._num_leased)

    def tp_of(self, server: str) -> int:
        """Return the tensor-parallel size of a server."""
        return self._tp_of.get(server, self._tp)

    def expect(self, tps: Sequence[int]) -> None:
        """Note the fleet that begins to start. What was asked of the one before and came too late is void."""
        self.expected = list(tps)
        self.orders = Outbox()
        self._num_leased, self.num_started = sum(tps), 0

    def start(self, tp: int) -> None:
        """Ask for one more replica."""
        self.num_started += 1
        self.expected.append(tp)
        self._num_leased += tp
        self.orders.put(StartReplica(tp))

    def end(self, server: str) -> None:
        """Ask for the end of a replica."""
        self.orders.put(EndReplica(server))

    def reclaim(self, server: str) -> None:
        """Ask for the lease of a dead replica."""
        self.orders.put(ReclaimReplica(server))

    def stop(self) -> None:
        """Tell the fleet that nothing more is asked of it."""
        self.orders.put(None)

    async def order(self, number: int) -> Order | None:
        """Return an order of this rollout when it is there; an answer that is lost can be asked for again."""
        await self.orders.wait(number)
        return self.orders.since(number)[1][0]

    def arrived(self, tp: int | None, server: str | None = None) -> int:
        """Note that an expected replica is up at ``server`` or will never be, and return its size."""
        size = self._tp if tp is None else tp
        if size in self.expected:
            self.expected.remove(size)
        if server is not None:
            self._tp_of[server] = size
        return size

    def returned(self, tp: int) -> None:
        """Note that the lease of a replica was given back."""
        self._num_leased -= tp
