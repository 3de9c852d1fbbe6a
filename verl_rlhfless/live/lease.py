"""Leases: the only thing that costs. A lease is a placement group that holds GPUs, and nothing runs inside it.

Invariants: removing a placement group kills every actor inside it, therefore all work runs outside, on the devices
that a short task in each bundle has named. A lease ends when Ray says so, not when we asked. An error or an interrupt
during a grant, or the end of the rollout that waits for it, leaves no group behind. Names are
``rlhfless/<role>/<name>`` and are never used twice: an observer outside the run reads them.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from verl_rlhfless.errors import LeaseReleaseError, LeaseTimeoutError, RlhflessError
from verl_rlhfless.live.leased_node import free_port, leased_node
from verl_rlhfless.types import DeviceKey, LeasedNode

RELEASE_TIMEOUT_S = 30.0
"""How long a release that nobody gave a time-out for may take."""

_ANSWER_S = 60.0  # the first task on a node waits for a worker process
_NODE_PIN = 0.001  # share of the resource that every Ray node has under its own name
_RELEASE_POLL_S = 0.002
_FREED_S, _FREED_POLL_S = 0.25, 0.005  # Ray's scheduler learns within 0.1 s of what a removed group has freed

_leased_node = ray.remote(num_cpus=0, max_calls=0)(leased_node)  # Ray would end a worker after each task with a GPU
_free_port = ray.remote(num_cpus=0)(free_port)
_used_names: set[str] = set()


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """What to lease.

    Attributes:
        name: Unique in the run, never reused.
        role: Who pays: the trainer's worker group or a rollout replica.
        gpus_per_node: GPUs of each bundle; a bundle lies on one node.
        resource: Ray's name of the accelerator.
        node_ips: Pins bundle ``i`` to the node with this address; ``None`` lets Ray choose.
    """

    name: str
    role: Literal["trainer", "replica"]
    gpus_per_node: tuple[int, ...]
    resource: str = "GPU"
    node_ips: tuple[str, ...] | None = None

    @property
    def group_name(self) -> str:
        """Name of the placement group."""
        return f"rlhfless/{self.role}/{self.name}"

    @property
    def num_gpus(self) -> int:
        """GPUs of all bundles."""
        return sum(self.gpus_per_node)

    def bundles(self) -> list[dict[str, float]]:
        """Return the placement group's bundles."""
        bundles = [{self.resource: float(count)} for count in self.gpus_per_node]
        if self.node_ips is not None:
            for bundle, ip in zip(bundles, self.node_ips, strict=True):
                bundle[f"node:{ip}"] = _NODE_PIN
        return bundles

    def __str__(self) -> str:
        where = f" on {', '.join(self.node_ips)}" if self.node_ips else ""
        return f"lease {self.group_name} of {' + '.join(map(str, self.gpus_per_node))} {self.resource}{where}"


class Lease:
    """A hold on GPUs from grant to release. Make one with :meth:`acquire`; as a context manager it releases at the end.

    Attributes:
        name: Name of the placement group.
        nodes: The leased devices, sorted by address as verl sorts placement groups, so that ranks keep their node
            over restarts.
        granted_s: When the GPUs were granted [s since the epoch].
        released_s: When Ray confirmed the release [s since the epoch]; ``None`` while held.
    """

    def __init__(
        self, request: LeaseRequest, group: PlacementGroup, granted_s: float, nodes: Sequence[LeasedNode]
    ) -> None:
        self.name = request.group_name
        self.nodes = tuple(sorted(nodes, key=lambda node: node.ip))
        self.granted_s = granted_s
        self.released_s: float | None = None
        self._group = group

    @classmethod
    def acquire(
        cls,
        request: LeaseRequest,
        timeout_s: float,
        *,
        over: threading.Event | None = None,
    ) -> Lease:
        """Return a granted lease.

        Args:
            request: What to lease.
            timeout_s: How long to wait for the GPUs [s]; rounded up to whole seconds, which is Ray's resolution.
            over: Set once the rollout that wants the lease is over: the wait ends within a second.

        Raises:
            LeaseTimeoutError: Not granted in time, or not before ``over``. The message names lease, GPUs wanted
                and available, and who holds them.
        """
        if request.group_name in _used_names:
            raise RlhflessError(f"{request} reuses a name of this run. Give every lease a name of its own.")
        _used_names.add(request.group_name)
        _await_freed(request)
        group = placement_group(request.bundles(), strategy="PACK", name=request.group_name)
        try:
            _wait_granted(request, group, timeout_s, over)
            granted_s = time.time()
            return cls(request, group, granted_s, _ask_nodes(request, group))
        except BaseException:  # an interrupt too must leave no group behind
            _remove(request.group_name, group, RELEASE_TIMEOUT_S)
            raise

    @property
    def gpu_s(self) -> float:
        """GPU-seconds from grant to release, or until now."""
        until_s = time.time() if self.released_s is None else self.released_s
        return sum(len(node.device_ids) for node in self.nodes) * (until_s - self.granted_s)

    def device_key(self) -> DeviceKey:
        """Return the leased devices as sets per node, to compare leases with."""
        per_node: dict[str, set[str]] = {}
        for node in self.nodes:
            per_node.setdefault(node.node_id, set()).update(node.device_ids)
        return tuple((node_id, frozenset(ids)) for node_id, ids in sorted(per_node.items()))

    def master_address(self, port_range: tuple[int, int] | None = None) -> tuple[str, int]:
        """Return address and a free port of the first node, for a process group's rendezvous."""
        first = self.nodes[0]
        strategy = NodeAffinitySchedulingStrategy(node_id=first.node_id, soft=False)
        port: int = ray.get(_free_port.options(scheduling_strategy=strategy).remote(port_range), timeout=_ANSWER_S)
        return first.ip.strip("[]"), port

    def release(self, timeout_s: float = RELEASE_TIMEOUT_S) -> None:
        """Give the GPUs back and wait until Ray confirms it. Safe to call twice.

        Raises:
            LeaseReleaseError: Not confirmed within ``timeout_s``; the lease still counts as held.
        """
        if self.released_s is None:
            _remove(self.name, self._group, timeout_s)
            self.released_s = time.time()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def share_devices(one: DeviceKey, other: DeviceKey) -> bool:
    """Return whether two leases, of any time, name a common device."""
    devices = dict(other)
    return any(ids & devices.get(node_id, frozenset()) for node_id, ids in one)


def _await_freed(request: LeaseRequest) -> None:
    """Wait for what a lease that has just ended gave back; go on soon all the same, because others may hold it.

    Ray's scheduler tries a group at once, and then again after up to a second: a group that is asked for before the
    scheduler knows of the free GPUs waits for its second try.
    """
    deadline = time.monotonic() + _FREED_S
    while ray.available_resources().get(request.resource, 0.0) < request.num_gpus and time.monotonic() < deadline:
        time.sleep(_FREED_POLL_S)


def _wait_granted(request: LeaseRequest, group: PlacementGroup, timeout_s: float, over: threading.Event | None) -> None:
    for _ in range(max(1, math.ceil(timeout_s))):
        is_granted = group.wait(1)  # whole seconds only: Ray truncates a fraction to 0; slices keep Ctrl-C alive
        if over is not None and over.is_set():
            raise LeaseTimeoutError(f"{request}: given up, because the rollout is over. {_who_holds(request.resource)}")
        if is_granted:
            return
    raise LeaseTimeoutError(f"{request}: not granted within {timeout_s:g} s. {_who_holds(request.resource)}")


def _ask_nodes(request: LeaseRequest, group: PlacementGroup) -> list[LeasedNode]:
    """Return what each bundle got, in bundle order."""
    answers = []
    for index, count in enumerate(request.gpus_per_node):
        devices: dict[str, Any] = (
            {"num_gpus": count} if request.resource == "GPU" else {"resources": {request.resource: count}}
        )
        strategy = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=index)
        answers.append(_leased_node.options(scheduling_strategy=strategy, **devices).remote(request.resource))
    try:
        nodes: list[LeasedNode] = ray.get(answers, timeout=_ANSWER_S)
    except GetTimeoutError:
        raise LeaseTimeoutError(
            f"{request}: granted, but no worker process answered on its nodes within {_ANSWER_S:g} s. "
            "Look at their load and memory."
        ) from None
    except RayError as error:
        raise LeaseTimeoutError(f"{request}: granted, but its nodes failed ({error!r}). Look at them.") from error
    return nodes


def _remove(name: str, group: PlacementGroup, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    remove_placement_group(group)
    while (state := placement_group_table(group)["state"]) != "REMOVED":
        if time.monotonic() > deadline:
            raise LeaseReleaseError(
                f"lease {name}: still {state} {timeout_s:g} s after its release. Look at Ray's head node and its log."
            )
        time.sleep(_RELEASE_POLL_S)


def _who_holds(resource: str) -> str:
    total, available = (view().get(resource, 0.0) for view in (ray.cluster_resources, ray.available_resources))
    held: dict[str, float] = {}
    for group in placement_group_table().values():
        if group["state"] == "CREATED":
            count = sum(bundle.get(resource, 0.0) for bundle in group["bundles"].values())
            held[group["name"] or group["placement_group_id"]] = count
    elsewhere = total - available - sum(held.values())
    holders = [f"{name} ({count:g})" for name, count in sorted(held.items()) if count]
    if elsewhere > 0:
        holders.append(f"actors and tasks outside placement groups ({elsewhere:g})")
    return (
        f"{available:g} of {total:g} {resource} are available; held by: {', '.join(holders) or 'nobody'}. "
        "Wait for them to end, lower the number of GPUs, or raise the grant time-out (rlhfless.pool.grant_timeout_s)."
    )
