"""verl's side of the weight store: a checkpoint engine named ``rlhfless_store``.

verl imports this module by ``rollout.checkpoint_engine.custom_backend_module`` in the trainer's workers, and constructs
the engine with the keys below ``rollout.checkpoint_engine.engine_kwargs.rlhfless_store``.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import ray
import torch
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry
from verl.workers.rollout.utils import ensure_async_iterator

from verl_rlhfless.errors import WeightStoreError
from verl_rlhfless.live.checksum import as_unsigned, bit_sum, dtype_name, stream_digest
from verl_rlhfless.live.weight_capacity import measure_host_memory
from verl_rlhfless.live.weight_manifest import Part, StoredTensor
from verl_rlhfless.live.weight_reader import read_checked_tensors
from verl_rlhfless.live.weight_store import ANSWER_GRACE_S, answered, connect, set_out, take_back

BACKEND = "rlhfless_store"
"""verl's name of this engine."""

_ALIGNMENT = 64  # of a tensor in its bucket: any element type, and a cache line


class Publication:
    """One version on its way into the store: tensors fill a staging buffer, which the store empties when it is full."""

    def __init__(self, store: Any, version: int, bucket_bytes: int, timeout_s: float) -> None:
        self._store, self._version, self._timeout_s = store, version, timeout_s
        self._staging = torch.empty(bucket_bytes, dtype=torch.uint8)
        self._used = 0
        self._num_buckets = 0
        self._tensors: list[StoredTensor] = []

    async def begin(self) -> None:
        """Announce the version, and wait until the store has room for it."""
        await self._ask(self._store.begin.remote(self._version, measure_host_memory()))

    async def add(self, name: str, tensor: torch.Tensor) -> None:
        """Copy a tensor (on any device) into the stream. One larger than a bucket goes on in the next."""
        data = tensor.detach().contiguous().view(-1)
        flat = data.view(torch.uint8)
        if self._used + flat.numel() > self._staging.numel() >= flat.numel():
            await self._flush()
        total, start, parts = 0, 0, []
        while start < flat.numel():
            if self._used == self._staging.numel():
                await self._flush()
            size = min(flat.numel() - start, self._staging.numel() - self._used)
            staged = self._staging[self._used : self._used + size]
            staged.copy_(flat[start : start + size])
            total += int(bit_sum(staged.view(data.dtype)))
            parts.append(Part(self._num_buckets, self._used, size))
            start += size
            self._used = min(-(-(self._used + size) // _ALIGNMENT) * _ALIGNMENT, self._staging.numel())
        stored = StoredTensor(name, dtype_name(tensor.dtype), tuple(tensor.shape), as_unsigned(total), tuple(parts))
        self._tensors.append(stored)

    async def commit(self) -> str:
        """Hand over the rest, make the version visible, and return its checksum."""
        await self._flush()
        checksum = stream_digest(self._tensors)
        await self._ask(self._store.commit.remote(self._version, tuple(self._tensors), checksum))
        return checksum

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors so far."""
        return sum(stored.num_bytes for stored in self._tensors)

    async def _flush(self) -> None:
        if self._used == 0:
            return
        bucket: np.ndarray[Any, Any] = self._staging[: self._used].numpy()
        publisher = ray.get_runtime_context().current_actor
        token = set_out(bucket)
        try:
            # While this waits, the store's call for the bucket runs in this very process.
            await self._ask(self._store.take.remote(self._version, publisher, token, bucket.nbytes, self._timeout_s))
        finally:
            take_back(token)
        self._num_buckets, self._used = self._num_buckets + 1, 0

    async def _ask(self, reference: Any) -> Any:
        return await answered(reference, self._timeout_s + ANSWER_GRACE_S, f"publishing weight version {self._version}")


@CheckpointEngineRegistry.register(BACKEND)
class StoreCheckpointEngine(CheckpointEngine):
    """Publishes into and pulls from the run's weight store. There is no process group, so replicas come and go."""

    def __init__(
        self, bucket_size: int, is_master: bool = False, *, store_name: str, bucket_mib: int, timeout_s: float = 300.0
    ) -> None:
        """Find the store.

        Args:
            bucket_size: verl's bucket for the way from a worker into an engine [bytes]; not the store's.
            is_master: Whether this is trainer rank 0, which publishes.
            store_name: Ray name of the run's store.
            bucket_mib: Size of a bucket in the store [MiB].
            timeout_s: How long a bucket, or a reader that has to let an old version go, may take [s].

        Raises:
            WeightStoreError: There is no such store.
        """
        self._is_master = is_master
        self._store = connect(store_name)
        self._bucket_bytes = bucket_mib << 20
        self._timeout_s = timeout_s

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Return no arguments for :meth:`init_process_group`."""
        return {}, {}

    def prepare(self) -> dict[str, Any]:
        """Return nothing: the store needs no preparation."""
        return {}

    def init_process_group(self, **kwargs: Any) -> None:
        """Do nothing: there is no process group."""

    def finalize(self) -> None:
        """Do nothing: the staging buffer ends with its publication."""

    @torch.no_grad()
    async def send_weights(self, weights: Any, global_steps: int | None = None) -> dict[str, Any]:
        """Publish the weights as version ``global_steps``.

        Every rank walks ``weights``, because each item may be a collective; rank 0 publishes.

        Args:
            weights: ``(name, full tensor)`` pairs, as verl's ``get_per_tensor_param`` gives them.
            global_steps: The trainer step.

        Returns:
            ``{"num_bytes", "seconds", "checksum"}`` on rank 0, else nothing.

        Raises:
            WeightStoreError: The version is not new, doesn't fit, or the store did not answer in time.
        """
        if not self._is_master:
            async for _ in ensure_async_iterator(weights):
                pass
            return {}
        started = time.monotonic()
        publication = Publication(self._store, _required(global_steps), self._bucket_bytes, self._timeout_s)
        await publication.begin()
        async for name, tensor in ensure_async_iterator(weights):
            await publication.add(name, tensor)
        checksum = await publication.commit()
        return {"num_bytes": publication.num_bytes, "seconds": time.monotonic() - started, "checksum": checksum}

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of version ``global_steps``, checked; for verl's ``CheckpointEngineWorker``.

        Raises:
            WeightStoreError: The version is not held in time, or its bytes are not the published ones.
        """
        version, reader = _required(global_steps), ray.get_runtime_context().get_worker_id()
        what = f"pulling weight version {version}"
        pinned = self._store.pin.remote(version, reader, self._timeout_s)
        manifest = await answered(pinned, self._timeout_s + ANSWER_GRACE_S, what)
        try:
            async for name, tensor in read_checked_tensors(manifest, self._timeout_s):
                yield name, tensor
        finally:
            await answered(self._store.unpin.remote(version, reader), self._timeout_s, what)


def _required(global_steps: int | None) -> int:
    if global_steps is None:
        raise WeightStoreError("verl gave no global_steps, which is the version; call update_weights(global_steps=...)")
    return global_steps
