"""Who holds which GPU of the simulated cluster, from grant to release, and which engines are parked where.

Invariants: a GPU is in at most one lease; a lease of a replica lies on one node; every grant ends in a release or at
the run's end.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import simpy

from verl_rlhfless.sim.cluster import Cluster
from verl_rlhfless.types import BusySpan, LeaseSpan

Gpu = tuple[int, int]
"""Node and index on the node."""


@dataclass(slots=True)
class Lease:
    """A hold on GPUs."""

    lease_id: str
    role: str
    gpus: tuple[Gpu, ...]
    granted_s: float
    usable_s: float | None = None
    released_s: float | None = None

    def span(self) -> LeaseSpan:
        """Return the frozen record for the ledger."""
        return LeaseSpan(self.lease_id, self.role, len(self.gpus), self.granted_s, self.usable_s, self.released_s)


@dataclass
class LeaseBook:
    """Grants in the order of requests; a request that does not fit waits until GPUs come back."""

    env: simpy.Environment
    cluster: Cluster
    leases: list[Lease] = field(default_factory=list)
    busy: list[BusySpan] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._free = [set(range(self.cluster.gpus_per_node)) for _ in range(self.cluster.num_nodes)]
        self._up = [True] * self.cluster.num_nodes
        self._queue: deque[Callable[[], bool]] = deque()
        self._parked: set[tuple[int, int, int]] = set()
        self._free_since: dict[Gpu, float] = {}
        self._parked_gpu_s = 0.0
        self._is_serving = False

    @property
    def num_free(self) -> int:
        """GPUs on nodes that are up and that nobody leases."""
        return sum(len(free) for free, up in zip(self._free, self._up, strict=True) if up)

    @property
    def num_up(self) -> int:
        """GPUs of nodes that are up, leased or not."""
        return sum(self._up) * self.cluster.gpus_per_node

    def warm_gpus(self, within: Lease | None = None) -> dict[int, int]:
        """Return, by tensor-parallel size, the GPUs whose engine only has to wake: all, or those of a lease."""
        warm: dict[int, int] = {}
        for node, first, tp in self._parked:
            if within is None or {(node, first + i) for i in range(tp)} <= set(within.gpus):
                warm[tp] = warm.get(tp, 0) + tp
        return warm

    def request(self, role: str, tp: int, granted: Callable[[Lease, bool], None], delay_s: float) -> None:
        """Ask for one replica's GPUs.

        ``granted(lease, is_warm)`` is called at the grant, ``delay_s`` from now or later.
        """

        def attempt() -> bool:
            slot = self._slot(tp)
            if slot is None:
                return False
            node, first = slot
            lease = self._grant(role, tuple((node, first + i) for i in range(tp)))  # counts what was parked until now
            granted(lease, self._unpark(node, first, tp))
            return True

        self.after(delay_s, lambda: self._enqueue(attempt))

    def request_gpus(self, role: str, count: int, granted: Callable[[Lease], None], delay_s: float) -> None:
        """Ask for ``count`` GPUs anywhere outside preemptible nodes (the trainer, fused inference)."""

        def attempt() -> bool:
            stable = self.cluster.trainer_gpus // self.cluster.gpus_per_node
            free = [(node, gpu) for node in range(stable) for gpu in sorted(self._free[node])]
            if len(free) < count:
                return False
            granted(self._grant(role, tuple(free[:count])))
            return True

        self.after(delay_s, lambda: self._enqueue(attempt))

    def release(self, lease: Lease, parked_tp: int | None = None) -> None:
        """End a lease now; with ``parked_tp`` its engine stays behind, asleep."""
        if lease.released_s is not None:
            return
        lease.released_s = self.env.now
        if lease.usable_s is None:
            lease.usable_s = self.env.now
        if parked_tp is not None:
            self.park(lease.gpus[0], parked_tp)
        for node, gpu in lease.gpus:
            self._free[node].add(gpu)
            self._free_since[(node, gpu)] = self.env.now
        self._serve()

    def park(self, first: Gpu, tp: int) -> None:
        """Note that an engine sleeps on the GPUs from ``first`` on."""
        self._parked.add((*first, tp))

    def set_node(self, node: int, is_up: bool) -> None:
        """A preemptible node appears or vanishes, with its parked engines."""
        self._up[node] = is_up
        if is_up:
            self._serve()
        else:
            for key in [key for key in self._parked if key[0] == node]:
                self._unpark(*key)

    def node_seconds(self, start_s: float, end_s: float) -> float:
        """Return billed node-seconds of a window.

        A node is billed while any of its GPUs is leased, at least its minimum time.
        """
        total = 0.0
        for node in range(self.cluster.num_nodes):
            holds = sorted(
                (max(lease.granted_s, start_s), min(math.inf if lease.released_s is None else lease.released_s, end_s))
                for lease in self.leases
                if any(n == node for n, _ in lease.gpus)
            )
            covered = start_s
            for begin, end in holds:
                if end <= max(begin, covered):
                    continue
                fresh = begin > covered  # a gap came before, so that a new billing period begins
                billed = (
                    max(end - begin, min(self.cluster.min_billing_s, end_s - begin))
                    if fresh
                    else end - max(begin, covered)
                )
                total += billed
                covered = max(covered, begin + billed if fresh else end)
        return total

    def settle_parked(self) -> float:
        """Return the GPU-seconds that parked engines sat on GPUs which nobody leased, and begin a new count."""
        for gpu in self._free_since:
            self._count_parked(gpu)
            self._free_since[gpu] = self.env.now
        total, self._parked_gpu_s = self._parked_gpu_s, 0.0
        return total

    def _count_parked(self, gpu: Gpu) -> None:
        if any(node == gpu[0] and first <= gpu[1] < first + tp for node, first, tp in self._parked):
            self._parked_gpu_s += self.env.now - self._free_since[gpu]

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Call ``action`` in ``delay_s`` seconds."""
        callbacks = self.env.timeout(delay_s).callbacks
        assert callbacks is not None
        callbacks.append(lambda _event: action())

    def _enqueue(self, attempt: Callable[[], bool]) -> None:
        self._queue.append(attempt)
        self._serve()

    def _serve(self) -> None:
        if self._is_serving:
            return
        self._is_serving = True
        while self._queue and self._queue[0]():
            self._queue.popleft()
        self._is_serving = False

    def _grant(self, role: str, gpus: tuple[Gpu, ...]) -> Lease:
        for node, gpu in gpus:
            self._free[node].remove(gpu)
            if (node, gpu) in self._free_since:
                self._count_parked((node, gpu))
                del self._free_since[(node, gpu)]
        lease = Lease(f"{role}-{len(self.leases)}", role, gpus, self.env.now)
        self.leases.append(lease)
        return lease

    def _unpark(self, node: int, first: int, tp: int) -> bool:
        is_parked = (node, first, tp) in self._parked
        self._parked.discard((node, first, tp))
        return is_parked

    def _slot(self, tp: int) -> tuple[int, int] | None:
        best: tuple[tuple[bool, int, int, int], tuple[int, int]] | None = None
        for node, free in enumerate(self._free):
            if not self._up[node] or len(free) < tp:
                continue
            for first in range(0, self.cluster.gpus_per_node - tp + 1, tp):
                if all(first + i in free for i in range(tp)):
                    rank = ((node, first, tp) not in self._parked, len(free), node, first)
                    if best is None or rank < best[0]:
                        best = (rank, (node, first))
        return None if best is None else best[1]
