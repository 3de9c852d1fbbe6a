"""The weight store: the trainer publishes a version once, any replica pulls it when it starts, and nobody else pauses.

Invariants: a version is visible only when it is complete; versions strictly increase; at most ``max_versions`` are
held, the one that is being published included; a version that a replica reads is never evicted. The store owns the
data although no byte passes through its process: a bucket is what a call of the *store* to a courier on the publisher's
node returned, and in Ray the caller owns what a call returns. So a publisher that is suspended or dies takes no weights
with it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl_rlhfless.config import WeightsConfig
from verl_rlhfless.errors import WeightStoreError
from verl_rlhfless.live.host_memory import check_store
from verl_rlhfless.live.weight_manifest import Manifest, StoredTensor
from verl_rlhfless.policy.host_memory import HostMemory, StoreMemory

ANSWER_GRACE_S = 10.0
"""How much longer a caller waits for the store than the store waits, so that the store's reason is what is seen."""


@dataclass(slots=True)
class Draft:
    """One attempt to publish a version."""

    version: int
    memory: HostMemory
    num_bytes: int = 0
    largest_bytes: int = 0
    buckets: dict[int, Any] = field(default_factory=dict)


class WeightStore:
    """Which versions exist and who reads them. A plain class: buckets are opaque references here."""

    def __init__(self, config: WeightsConfig) -> None:
        self._max_versions = config.max_versions
        self._bucket_bytes = config.bucket_mib << 20
        self._held: dict[int, Manifest] = {}
        self._newest: int | None = None
        self._draft: Draft | None = None
        self._pins: dict[int, dict[str, float]] = {}  # version -> reader -> monotonic time at which the pin ends
        self._changed = asyncio.Condition()

    # ---- publishing

    async def begin(self, version: int, memory: HostMemory) -> None:
        """Start a version: drop an unfinished one and evict the oldest, as soon as nobody reads it.

        Raises:
            WeightStoreError: The version is not newer than the newest one.
        """
        if self._newest is not None and version <= self._newest:
            raise WeightStoreError(
                f"weight version {version} is not newer than version {self._newest}, and versions strictly increase. "
                "Publish each trainer step once."
            )
        self._draft = None  # its publisher failed, else it would have committed
        while len(self._held) >= self._max_versions:
            await self._evict(min(self._held))
        self._draft = Draft(version, memory)

    def reserve(self, version: int, num_bytes: int) -> Draft:
        """Admit the next bucket of a version, and return the attempt that it belongs to.

        Raises:
            WeightStoreError: The versions that the store is to hold don't fit into host memory.
        """
        draft = self._drafted(version)
        draft.num_bytes += num_bytes
        draft.largest_bytes = max(draft.largest_bytes, num_bytes, self._bucket_bytes)
        if self._newest is None:  # later versions take the room that the first ones were admitted with
            check_store(StoreMemory(draft.num_bytes, self._max_versions, draft.largest_bytes), draft.memory)
        return draft

    def add(self, draft: Draft, index: int, bucket: Any) -> None:
        """Take the reference to a bucket that was reserved; buckets may come in any order.

        Raises:
            WeightStoreError: Its publisher failed, and the version was begun anew.
        """
        if draft is not self._draft:
            raise WeightStoreError(f"weight version {draft.version}: a bucket of an attempt that was given up")
        draft.buckets[index] = bucket

    async def commit(self, version: int, tensors: tuple[StoredTensor, ...], checksum: str) -> None:
        """Make a complete version visible.

        Raises:
            WeightStoreError: Nothing of this version was begun, or buckets are missing.
        """
        buckets = self._drafted(version).buckets
        used = {part.bucket for tensor in tensors for part in tensor.parts}
        if used != buckets.keys() or used != set(range(len(used))):
            raise WeightStoreError(
                f"weight version {version} has {len(buckets)} buckets, but its tensors use {len(used)}"
            )
        in_order = tuple(buckets[index] for index in sorted(buckets))
        async with self._changed:
            self._held[version] = Manifest(version, tensors, checksum, in_order, self._bucket_bytes)
            self._newest, self._draft = version, None
            self._changed.notify_all()

    def _drafted(self, version: int) -> Draft:
        if self._draft is None or self._draft.version != version:
            raise WeightStoreError(f"weight version {version} is not being published; begin it first")
        return self._draft

    # ---- reading

    async def manifest(self, version: int, timeout_s: float) -> Manifest:
        """Return a version, waiting for it at most ``timeout_s`` if it is still to come.

        Raises:
            WeightStoreError: It was evicted, or was not published in time; the message names the versions held.
        """
        if not self._is_decided(version):
            await self._wait_for(version, timeout_s)
        if version not in self._held:
            raise WeightStoreError(f"weight version {version} was evicted or never published; held: {self.versions()}")
        return self._held[version]

    async def _wait_for(self, version: int, timeout_s: float) -> None:
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._is_decided(version)), timeout_s)
            except asyncio.TimeoutError:
                raise WeightStoreError(
                    f"weight version {version} was not published within {timeout_s:g} s; held: {self.versions()}. Look "
                    "for the trainer's error, or raise rlhfless.weights.pull_timeout_s."
                ) from None

    def _is_decided(self, version: int) -> bool:
        return self._newest is not None and version <= self._newest

    async def pin(self, version: int, reader: str, timeout_s: float) -> Manifest:
        """Return a version and keep it until :meth:`unpin`, or for ``timeout_s`` if the reader is never heard of again.

        Raises:
            WeightStoreError: See :meth:`manifest`.
        """
        found = await self.manifest(version, timeout_s)
        self._pins.setdefault(version, {})[reader] = time.monotonic() + timeout_s
        return found

    async def unpin(self, version: int, reader: str) -> None:
        """Let a version go. A reader that is unknown, or whose pin ended, is fine."""
        async with self._changed:
            self._pins.get(version, {}).pop(reader, None)
            self._changed.notify_all()

    def versions(self) -> tuple[int, ...]:
        """Return the complete versions, oldest first."""
        return tuple(sorted(self._held))

    async def _evict(self, version: int) -> None:
        async with self._changed:
            while (wait_s := self._pinned_for_s(version)) > 0:
                try:
                    await asyncio.wait_for(self._changed.wait(), wait_s)
                except asyncio.TimeoutError:
                    break  # a pin outlives its pull only if the reader died
            del self._held[version]
            self._pins.pop(version, None)

    def _pinned_for_s(self, version: int) -> float:
        return max(self._pins.get(version, {}).values(), default=0.0) - time.monotonic()


class Courier:
    """Copies buckets on the publisher's node. What its calls return belongs to their caller: the store."""

    def copy(self, bucket: Any) -> tuple[Any, bool]:
        """Return the bucket, which Ray stores anew, and a receipt."""
        return bucket, True


class StoreActor(WeightStore):
    """The store as a Ray actor. Asynchronous: a pull that waits blocks nobody."""

    def __init__(self, config: WeightsConfig) -> None:
        super().__init__(config)
        self._couriers: dict[str, Any] = {}  # by node

    async def take(self, version: int, index: int, bucket: list[Any], num_bytes: int, timeout_s: float) -> None:
        """Copy a bucket of the publisher's; return when the publisher may forget it.

        Args:
            version: The version that it belongs to.
            index: Its place in the version.
            bucket: One reference, in a list, so that Ray doesn't bring its content here.
            num_bytes: Its size.
            timeout_s: How long the copy may take [s].

        Raises:
            WeightStoreError: No room for it, or it was not copied in time.
        """
        draft = self.reserve(version, num_bytes)
        copy = self._courier(draft.memory.node_id).copy.options(num_returns=2)
        copied, receipt = copy.remote(bucket[0])  # the receipt tells the end without fetching the content
        await answered(receipt, timeout_s, f"weight version {version}, copying a bucket")
        self.add(draft, index, copied)

    def _courier(self, node_id: str) -> Any:
        if node_id not in self._couriers:
            affinity = NodeAffinitySchedulingStrategy(node_id, soft=False)
            self._couriers[node_id] = ray.remote(Courier).options(num_cpus=0, scheduling_strategy=affinity).remote()
        return self._couriers[node_id]


def create_store(name: str, config: WeightsConfig) -> Any:
    """Start a run's store under ``name`` and return its handle; it ends with the last handle.

    It runs on the caller's node, so that it never sits on a node that the run gives back.
    """
    affinity = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(StoreActor).options(name=name, num_cpus=0, scheduling_strategy=affinity).remote(config)


def connect(name: str) -> Any:
    """Return the handle of the run's store.

    Raises:
        WeightStoreError: No store of this name lives in this Ray job.
    """
    try:
        return ray.get_actor(name)
    except ValueError:
        raise WeightStoreError(
            f"this Ray job has no weight store named {name!r}; create it before the workers"
        ) from None


async def answered(reference: Awaitable[Any], timeout_s: float, what: str) -> Any:
    """Return the answer to a Ray call, with errors as the store raised them.

    Raises:
        WeightStoreError: From the store, or because it is gone or did not answer in time.
    """
    try:
        return await asyncio.wait_for(reference, timeout_s)
    except asyncio.TimeoutError:
        raise WeightStoreError(f"{what}: no answer within {timeout_s:g} s") from None
    except RayTaskError as error:
        if isinstance(error.cause, WeightStoreError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise WeightStoreError(f"{what}: its process is gone ({error})") from None
