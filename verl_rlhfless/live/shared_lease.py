"""The trainer's lease as what replicas run on beside the trainer: each holds a part of it, and no part costs anything.

Invariants: no device is in two parts at once; a part's name is ``<the trainer's lease>/<replica>-<number>``, so that
whatever worked on it is charged to the lease that pays.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Collection, Iterable, Sequence

from verl_rlhfless.errors import LeaseImpossibleError
from verl_rlhfless.types import DeviceKey, LeasedNode


class SharedLease:
    """A part of the trainer's lease, on one node, from taking it to giving it back. Make one with ``TrainerDevices``.

    Attributes:
        name: The part's.
        nodes: The devices.
        granted_s: When it was taken [s since the epoch].
        released_s: When it was given back [s since the epoch]; ``None`` while held.
    """

    gpu_s = 0.0
    """What it costs beyond the trainer's lease."""

    def __init__(self, name: str, node: LeasedNode, devices: TrainerDevices) -> None:
        self.name, self.nodes = name, (node,)
        self.granted_s = time.time()
        self.released_s: float | None = None
        self._devices = devices

    def device_key(self) -> DeviceKey:
        """Return the devices, to compare leases with."""
        return _key(self.nodes[0])

    def release(self, timeout_s: float = 0.0) -> None:
        """Give the devices back to the other replicas, at once. Safe to call twice."""
        if self.released_s is None:
            self.released_s = time.time()
            self._devices.give_back(self.nodes[0])


class TrainerDevices:
    """The devices of a trainer that stays, handed out to the replicas of one rollout."""

    def __init__(self, lease: str, nodes: Sequence[LeasedNode]) -> None:
        """Take the name of the trainer's lease, and what it holds."""
        self._lease = lease
        self._ip = {node.node_id: node.ip for node in nodes}
        self._order = {node.node_id: node.device_ids for node in nodes}
        self._free = {node.node_id: set(node.device_ids) for node in nodes}
        self._lock = threading.Lock()  # parts are taken on the fleet's loop and given back from threads
        self._numbers = itertools.count(1)

    def take(self, replica: str, num_gpus: int, preferred: Collection[DeviceKey] = ()) -> SharedLease:
        """Return devices of one node for a replica, ``preferred`` ones if they are free.

        Raises:
            LeaseImpossibleError: No node has as many left.
        """
        with self._lock:
            node = next((node for key in preferred if (node := self._wanted(key)) is not None), None)
            node = node or self._any(num_gpus)
            if node is None:
                raise LeaseImpossibleError(
                    f"replica {replica}: the trainer's lease {self._lease} has no node with {num_gpus} devices left. "
                    "Set rlhfless.pool.share_trainer=never."
                )
            self._free[node.node_id] -= set(node.device_ids)
            return SharedLease(f"{self._lease}/{replica}-{next(self._numbers)}", node, self)

    def num_together(self, keys: Iterable[DeviceKey]) -> int:
        """Return how many replicas, each of exactly one of these devices, can run here at once."""
        left = {(node_id, one) for node_id, ids in self._order.items() for one in ids}
        count = 0
        for ((node_id, ids),) in keys:
            wanted = {(node_id, one) for one in ids}
            if wanted <= left:
                left -= wanted
                count += 1
        return count

    def give_back(self, node: LeasedNode) -> None:
        """Take the devices of a part back."""
        with self._lock:
            self._free[node.node_id] |= set(node.device_ids)

    def _wanted(self, key: DeviceKey) -> LeasedNode | None:
        ((node_id, ids),) = key
        is_free = ids <= self._free.get(node_id, set())
        return self._part(node_id, ids) if is_free else None

    def _any(self, num_gpus: int) -> LeasedNode | None:
        for node_id, free in self._free.items():
            if len(free) >= num_gpus:
                return self._part(node_id, [one for one in self._order[node_id] if one in free][:num_gpus])
        return None

    def _part(self, node_id: str, ids: Collection[str]) -> LeasedNode:
        return LeasedNode(node_id, self._ip[node_id], tuple(one for one in self._order[node_id] if one in ids))


def payer(lease: str, granted: Collection[str]) -> str:
    """Return the lease that pays for what worked on ``lease``: itself, or the trainer's that it is a part of."""
    return lease if lease in granted else lease.rpartition("/")[0]


def _key(node: LeasedNode) -> DeviceKey:
    return ((node.node_id, frozenset(node.device_ids)),)
