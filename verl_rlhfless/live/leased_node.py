"""Questions that only a process on a leased node can answer; each is a Ray task, in a worker process that Ray reuses.

The first task of a node starts that process, which is part of a grant: this module imports nothing but the standard
library, Ray and plain values. With verl or torch a grant takes about 9 s instead of 1 s.
"""

from __future__ import annotations

import socket

import ray

from verl_rlhfless.types import LeasedNode


def leased_node(resource: str) -> LeasedNode:
    """Return the node and the devices of the bundle that this task takes as a whole.

    The devices are Ray's: indices, or names from the raylet's visible devices. They are sorted, because Ray answers
    from a set, and they stay the bundle's own as long as its placement group lives.

    Args:
        resource: Ray's name of the accelerator, e.g. ``GPU``.
    """
    context = ray.get_runtime_context()
    return LeasedNode(
        node_id=context.get_node_id(),
        ip=ray.util.get_node_ip_address(),
        device_ids=tuple(sorted(context.get_accelerator_ids()[resource], key=lambda device: (len(device), device))),
    )


def free_port(port_range: tuple[int, int] | None = None) -> int:
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
