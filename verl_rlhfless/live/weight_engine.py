"""verl's side of the weight store: a checkpoint engine named ``rlhfless_store``.

verl imports this module by ``rollout.checkpoint_engine.custom_backend_module`` in the trainer's workers, and constructs
the engine with the keys below ``rollout.checkpoint_engine.engine_kwargs.rlhfless_store``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import ray
import torch
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry
from verl.workers.rollout.utils import ensure_async_iterator

from verl_rlhfless.errors import WeightStoreError
from verl_rlhfless.live.checksum import as_unsigned, bit_sum, dtype_name, stream_digest
from verl_rlhfless.live.host_memory import measure_host_memory
from verl_rlhfless.live.weight_manifest import Part, StoredTensor
from verl_rlhfless.live.weight_reader import read_checked_tensors
from verl_rlhfless.live.weight_store import ANSWER_GRACE_S, answered, connect
from verl_rlhfless.policy.host_memory import IN_FLIGHT

BACKEND = "rlhfless_store"
"""verl's name of this engine."""

_ALIGNMENT = 64  # of a tensor in its bucket: any element type, and a cache line
_LARGEST_BUCKET_BYTES = 2**30  # a tensor above it is split; one above the configured size has a bucket of its own
_WIDEST_ROUTER = 512  # experts; vLLM keeps some models' routers in fp32


def narrowed(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return a large matrix in the engine's element type, on its own device, if that takes fewer bytes.

    It is rounded as by an engine that loads it. All else stays as it is, because an engine may hold it in fp32: routers
    of experts, convolutions, norms, biases. None of them has more than 512 times the elements of its longest side.

    Args:
        tensor: A weight.
        dtype: What the engine computes in; None if that is not known.
    """
    is_large = tensor.numel() > _WIDEST_ROUTER * max(tensor.shape, default=1)
    if dtype is None or not tensor.is_floating_point() or not is_large or tensor.element_size() <= dtype.itemsize:
        return tensor
    return tensor.to(dtype)


@dataclass(frozen=True, slots=True)
class _Staged:
    """A tensor whose bytes are on their way into the store; its sum is on the tensor's device, where nothing waits."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    total: torch.Tensor
    parts: tuple[Part, ...]

    def stored(self) -> StoredTensor:
        """Return the entry of the manifest, when the sum is there."""
        return StoredTensor(self.name, self.dtype, self.shape, as_unsigned(self.total), self.parts)


class Publication:
    """One version on its way into the store: tensors fill a staging buffer, which is given away when it is full."""

    def __init__(self, store: Any, version: int, staging: torch.Tensor, timeout_s: float) -> None:
        self._store, self._version, self._timeout_s = store, version, timeout_s
        self._staging = staging
        self._used = 0
        self._num_buckets = 0
        self._staged: list[_Staged] = []
        self._in_flight: deque[tuple[Any, Any]] = deque()  # a bucket's reference, and the store's answer

    async def begin(self) -> None:
        """Announce the version, and wait until the store has room for it."""
        await self._ask(self._store.begin.remote(self._version, measure_host_memory()))

    async def add(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor (on any device) into the staging buffer; a larger one gets a bucket of its own."""
        data = tensor.detach().contiguous().view(-1)
        total = bit_sum(data)
        parts = await (self._add_large(data) if data.nbytes > self._staging.numel() else self._add_small(data))
        self._staged.append(_Staged(name, dtype_name(tensor.dtype), tuple(tensor.shape), total, parts))

    async def _add_small(self, data: torch.Tensor) -> tuple[Part, ...]:
        if self._used + data.nbytes > self._staging.numel():
            await self._flush()
        if data.nbytes == 0:
            return ()
        self._staging[self._used : self._used + data.nbytes].view(data.dtype).copy_(data)  # returns when it is done
        part = Part(self._num_buckets, self._used, data.nbytes)
        self._used = min(-(-(self._used + data.nbytes) // _ALIGNMENT) * _ALIGNMENT, self._staging.numel())
        return (part,)

    async def _add_large(self, data: torch.Tensor) -> tuple[Part, ...]:
        await self._flush()
        parts = []
        for piece in data.split(_LARGEST_BUCKET_BYTES // data.element_size()):
            on_host = piece.cpu()
            parts.append(Part(self._num_buckets, 0, on_host.nbytes))
            await self._give(on_host.view(torch.uint8))
        return tuple(parts)

    async def commit(self) -> str:
        """Hand over the rest, make the version visible, and return its checksum."""
        await self._flush()
        while self._in_flight:
            await self._oldest_copied()
        tensors = tuple(staged.stored() for staged in self._staged)
        checksum = stream_digest(tensors)
        await self._ask(self._store.commit.remote(self._version, tensors, checksum))
        return checksum

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors so far."""
        return sum(part.num_bytes for staged in self._staged for part in staged.parts)

    async def _flush(self) -> None:
        if self._used:
            await self._give(self._staging[: self._used])
            self._used = 0

    async def _give(self, bucket: torch.Tensor) -> None:
        """Give a bucket to Ray; return when its memory may be reused and few enough are still to be copied."""
        if len(self._in_flight) == IN_FLIGHT:
            await self._oldest_copied()
        reference = ray.put(bucket.numpy())
        index = self._num_buckets
        taken = self._store.take.remote(self._version, index, [reference], bucket.nbytes, self._timeout_s)
        self._in_flight.append((reference, taken))
        self._num_buckets += 1

    async def _oldest_copied(self) -> None:
        _, taken = self._in_flight[0]
        await self._ask(taken)
        self._in_flight.popleft()  # frees our copy

    async def _ask(self, reference: Any) -> Any:
        return await answered(reference, self._timeout_s + ANSWER_GRACE_S, f"publishing weight version {self._version}")


@CheckpointEngineRegistry.register(BACKEND)
class StoreCheckpointEngine(CheckpointEngine):
    """Publishes into and pulls from the run's weight store. There is no process group, so replicas come and go."""

    def __init__(
        self,
        bucket_size: int,
        is_master: bool = False,
        *,
        store_name: str,
        bucket_mib: int,
        timeout_s: float = 300.0,
        rollout_dtype: str = "auto",
    ) -> None:
        """Find the store.

        Args:
            bucket_size: verl's bucket for the way from a worker into an engine [bytes]; not the store's.
            is_master: Whether this is trainer rank 0, which publishes.
            store_name: Ray name of the run's store.
            bucket_mib: Size of a bucket in the store [MiB].
            timeout_s: How long a bucket, or a reader that has to let an old version go, may take [s].
            rollout_dtype: verl's ``rollout.dtype``, in which large matrices travel; ``auto``: in the trainer's.

        Raises:
            WeightStoreError: There is no such store.
        """
        self._is_master = is_master
        self._store = connect(store_name)
        self._timeout_s = timeout_s
        self._dtype: torch.dtype | None = None if rollout_dtype == "auto" else getattr(torch, rollout_dtype)
        # Kept between versions, because the page faults of a fresh one can cost more than all copies. Pinned memory
        # is taken at once, so only the publisher does that.
        is_pinned = is_master and torch.accelerator.is_available()
        self._staging = torch.empty(bucket_mib << 20, dtype=torch.uint8, pin_memory=is_pinned)

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
        """Do nothing: nothing is held for one transfer."""

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
        publication = Publication(self._store, _required(global_steps), self._staging, self._timeout_s)
        await publication.begin()
        async for name, tensor in ensure_async_iterator(weights):
            await publication.add(name, narrowed(tensor, self._dtype))
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
