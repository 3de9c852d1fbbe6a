"""The actor that sits inside a lease's placement group and tells which devices the lease got.

Its process start is part of every grant, so this module imports nothing but the standard library and Ray: with verl
or torch a grant takes about 9 s instead of 1 s. The holder holds nothing by itself: the placement group does, with or
without it.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

import ray


@dataclass(frozen=True, slots=True)
class HolderReport:
    """Where a lease's bundle landed. ``device_ids`` are Ray's: indices, or names from the raylet's visible devices."""

    node_id: str
    ip: str
    device_ids: tuple[str, ...]


class Holder:
    """One per node of a lease; runs as a Ray actor that takes all accelerators of its bundle."""

    def report(self, resource: str) -> HolderReport:
        """Return the node and the devices of this bundle, sorted: Ray answers from a set, in any order.

        Args:
            resource: Ray's name of the accelerator, e.g. ``GPU``.
        """
        context = ray.get_runtime_context()
        return HolderReport(
            node_id=context.get_node_id(),
            ip=ray.util.get_node_ip_address(),
            device_ids=tuple(sorted(context.get_accelerator_ids()[resource], key=lambda device: (len(device), device))),
        )

    def free_port(self, port_range: tuple[int, int] | None = None) -> int:
        """Return a port that is free on this node now, inside ``[low, high)`` if a range is given.

        Raises:
            OSError: Every port of the range is in use.
        """
        for port in range(*port_range) if port_range else (0,):
            with socket.socket() as probe:
                try:
                    probe.bind(("", port))
                except OSError:
                    continue
                return int(probe.getsockname()[1])
        raise OSError(f"no free port in {port_range}")
