"""Who holds which GPU of the simulated cluster, from grant to release, and which engines are parked where.

Invariants: a GPU is in at most one lease; a lease of a replica lies on one node; every grant ends in a release or at
the run's end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import simpy

from verl_rlhfless.errors import LeaseImpossibleError
from verl_rlhfless.sim.billing import NodeBill
from verl_rlhfless.sim.cluster import Cluster
from verl_rlhfless.types import BusySpan, LeaseSpan, Window

Gpu = tuple[int, int]
"""Node and index on the node."""


@dataclass(slots=True)
class Lease:
    """A hold on GPUs; times as in ``types.LeaseSpan``."""

    lease_id: str
    role: str
    gpus: tuple[Gpu, ...]
    granted_s: float
    usable_s: float | None = None
    released_s: float | None = None

    def span(self) -> LeaseSpan:
        """Return the frozen record for the ledger."""
        return LeaseSpan(self.lease_id, self.role, len(self.gpus), self.granted_s, self.usable_s, self.released_s)


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """A request for GPUs; ``attempt`` grants it and returns ``True``, if it can."""

    num_gpus: int
    attempt: Callable[[], bool]


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
        self._bills = [NodeBill(self.cluster.min_billing_s) for _ in range(self.cluster.num_nodes)]
        self._queue: deque[Ask] = deque()
        self._asked: set[Ask] = set()  # not granted and not withdrawn, those that are not in the queue yet too
        self._parked: set[tuple[int, int, int]] = set()  # (node, first GPU, tensor-parallel size) of sleeping engines
        self._free_since: dict[Gpu, float] = {}  # GPUs that were leased before
        self._parked_gpu_s = 0.0  # since the last settle_parked
        self._held: list[Lease] = []  # at the last settle
        self._num_settled = (0, 0)  # leases and busy spans at the last settle
        self._is_serving = False  # a grant may release, and a release serves

    @property
    def num_free(self) -> int:
        """GPUs on nodes that are up and that nobody leases."""
        return sum(len(free) for free, up in zip(self._free, self._up, strict=True) if up)

    @property
    def num_fusible(self) -> int:
        """GPUs outside preemptible nodes that nobody leases, less those that were asked for and not granted yet."""
        return max(0, len(self._stable_free()) - sum(ask.num_gpus for ask in self._asked))

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

    def request(self, role: str, tp: int, granted: Callable[[Lease, bool], None], delay_s: float) -> Ask:
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

        return self._ask(tp, attempt, delay_s)

    def request_gpus(self, role: str, count: int, granted: Callable[[Lease], None], delay_s: float) -> Ask:
        """Ask for ``count`` GPUs anywhere outside preemptible nodes (the trainer, fused inference).

        Raises:
            LeaseImpossibleError: There are fewer.
        """
        if count > self.cluster.trainer_gpus:
            raise LeaseImpossibleError(
                f"{role} asks for {count} GPUs outside preemptible nodes, {self.cluster.name} has"
                f" {self.cluster.trainer_gpus}. Ask for fewer."
            )

        def attempt() -> bool:
            free = self._stable_free()
            if len(free) < count:
                return False
            granted(self._grant(role, tuple(free[:count])))
            return True

        return self._ask(count, attempt, delay_s)

    def withdraw(self, ask: Ask) -> None:
        """Drop a request that was not granted yet, so that others need not wait for it."""
        self._asked.discard(ask)
        self._serve()

    def release(self, lease: Lease, parked_tp: int | None = None) -> None:
        """End a lease now; with ``parked_tp`` its engine stays behind, asleep, unless its node is gone."""
        if lease.released_s is not None:
            return
        lease.released_s = self.env.now
        if lease.usable_s is None:
            lease.usable_s = self.env.now
        if parked_tp is not None and self._up[lease.gpus[0][0]]:
            self.park(lease.gpus[0], parked_tp)
        for node, gpu in lease.gpus:
            self._free[node].add(gpu)
            self._free_since[(node, gpu)] = self.env.now
            self._bills[node].free(self.env.now)
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

    def node_seconds(self, window: Window | None = None) -> float:
        """Return the billed node-seconds of a window that has passed, or of the whole run.

        A node is billed while any of its GPUs is leased, at least its minimum time. The whole run's bill holds what
        that minimum adds after its end.
        """
        return sum(bill.total_s(self.env.now) if window is None else bill.seconds(window) for bill in self._bills)

    def settle(self) -> tuple[list[LeaseSpan], list[BusySpan]]:
        """Return the leases that were held, and the work that ended, since the last call."""
        num_leases, num_busy = self._num_settled
        touched = [*self._held, *self.leases[num_leases:]]
        self._held = [lease for lease in touched if lease.released_s is None]
        self._num_settled = (len(self.leases), len(self.busy))
        return [lease.span() for lease in touched], self.busy[num_busy:]

    def settle_parked(self) -> float:
        """Return the GPU-seconds that parked engines sat on GPUs which nobody leased, and begin a new count."""
        for gpu in self._free_since:
            self._count_parked(gpu)
            self._free_since[gpu] = self.env.now
        total, self._parked_gpu_s = self._parked_gpu_s, 0.0
        return total

    def _count_parked(self, gpu: Gpu) -> None:
        """Count the time since a GPU became free if an engine sleeps on it."""
        if any(node == gpu[0] and first <= gpu[1] < first + tp for node, first, tp in self._parked):
            self._parked_gpu_s += self.env.now - self._free_since[gpu]

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Call ``action`` in ``delay_s`` seconds."""
        callbacks = self.env.timeout(delay_s).callbacks
        assert callbacks is not None
        callbacks.append(lambda _event: action())

    def _ask(self, num_gpus: int, attempt: Callable[[], bool], delay_s: float) -> Ask:
        ask = Ask(num_gpus, attempt)
        self._asked.add(ask)
        self.after(delay_s, lambda: self._enqueue(ask))
        return ask

    def _enqueue(self, ask: Ask) -> None:
        self._queue.append(ask)
        self._serve()

    def _serve(self) -> None:
        """Grant what is queued, in order, until a request has to wait."""
        if self._is_serving:
            return
        self._is_serving = True
        while self._queue and (self._queue[0] not in self._asked or self._queue[0].attempt()):
            self._asked.discard(self._queue.popleft())
        self._is_serving = False

    def _grant(self, role: str, gpus: tuple[Gpu, ...]) -> Lease:
        """Return a new lease on free GPUs, from now on."""
        for node, gpu in gpus:
            self._free[node].remove(gpu)
            self._bills[node].hold(self.env.now)
            if (node, gpu) in self._free_since:
                self._count_parked((node, gpu))
                del self._free_since[(node, gpu)]
        lease = Lease(f"{role}-{len(self.leases)}", role, gpus, self.env.now)
        self.leases.append(lease)
        return lease

    def _stable_free(self) -> list[Gpu]:
        """Return the free GPUs outside preemptible nodes, by node and index."""
        stable = self.cluster.trainer_gpus // self.cluster.gpus_per_node
        return [(node, gpu) for node in range(stable) for gpu in sorted(self._free[node])]

    def _unpark(self, node: int, first: int, tp: int) -> bool:
        """Forget an engine that slept there; return whether one did."""
        is_parked = (node, first, tp) in self._parked
        self._parked.discard((node, first, tp))
        return is_parked

    def _slot(self, tp: int) -> Gpu | None:
        """Return the first of ``tp`` neighbouring free GPUs: where an engine sleeps, else on the fullest node."""
        best: tuple[tuple[bool, int, int, int], Gpu] | None = None
        for node, free in enumerate(self._free):
            if not self._up[node] or len(free) < tp:
                continue
            for first in range(0, self.cluster.gpus_per_node - tp + 1, tp):
                if all(first + i in free for i in range(tp)):
                    rank = ((node, first, tp) not in self._parked, len(free), node, first)
                    if best is None or rank < best[0]:
                        best = (rank, (node, first))
        return None if best is None else best[1]
