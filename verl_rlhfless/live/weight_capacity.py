"""Whether the host has room for the weights that the store is to hold: refused by name, before a spill shows it."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import ray

from verl_rlhfless.errors import WeightStoreError

SPILL_THRESHOLD = 0.8
"""Share of its object store that Ray fills before it writes objects to disk (Ray's ``object_spilling_threshold``)."""

IN_FLIGHT = 2
"""Buckets that the publisher has given to Ray and the store has not copied yet."""

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Host memory of the publisher's node before the first version is stored.

    Attributes:
        node_id: Ray's name of the node.
        object_store_bytes: Capacity of Ray's object store on the node.
        available_bytes: Memory that processes can still get without swapping. The object store's own pages count
            as available until something is stored in them.
    """

    node_id: str
    object_store_bytes: int
    available_bytes: int


def measure_host_memory() -> HostMemory:
    """Return the memory of this node; call it in the publisher's process."""
    node_id = ray.get_runtime_context().get_node_id()
    (node,) = [node for node in ray.nodes() if node["NodeID"] == node_id]
    return HostMemory(node_id, int(node["Resources"]["object_store_memory"]), psutil.virtual_memory().available)


def required_bytes(model_bytes: int, max_versions: int, bucket_bytes: int) -> int:
    """Return the host memory that the store needs: every version it may hold, and what is on its way into it.

    That is the publisher's staging buffer, and the buckets in flight.
    """
    return max_versions * model_bytes + (1 + IN_FLIGHT) * bucket_bytes


def check_capacity(model_bytes: int, max_versions: int, bucket_bytes: int, memory: HostMemory) -> None:
    """Refuse a model that does not fit.

    Raises:
        WeightStoreError: The message names what is needed, what there is, the shortage, and what to do.
    """
    need = required_bytes(model_bytes, max_versions, bucket_bytes)
    usable = int(memory.object_store_bytes * SPILL_THRESHOLD)
    what = (
        f"the weight store needs {_gib(need)} of host memory for rlhfless.weights.max_versions={max_versions} versions "
        f"of {_gib(model_bytes)} and {1 + IN_FLIGHT} buckets of {_gib(bucket_bytes)} on their way"
    )
    if need > usable:
        raise WeightStoreError(
            f"{what}, but Ray's object store on this node keeps {_gib(usable)} in memory (80 % of "
            f"{_gib(memory.object_store_bytes)}): {_gib(need - usable)} short. Start Ray with an object store of at "
            f"least {int(need / SPILL_THRESHOLD) + 1} bytes (--object-store-memory), or lower "
            "rlhfless.weights.max_versions."
        )
    if need > memory.available_bytes:
        raise WeightStoreError(
            f"{what}, but only {_gib(memory.available_bytes)} is free: {_gib(need - memory.available_bytes)} short. "
            "Free host memory on the trainer's node, or lower rlhfless.weights.max_versions."
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
