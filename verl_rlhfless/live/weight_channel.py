"""The sending side of verl's weight transfer through shared memory: every wait ends, and no device is touched.

Differs from verl's ``BucketedWeightSender``, which runs in a rank of the trainer: it waits for ever for a worker that
died, synchronises a device after each bucket (in a server actor that would open a context on a GPU that nobody leased),
and writes past the end of a full ``/dev/shm``, for which the kernel kills the process.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import AsyncIterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import torch
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import TensorMetadata
from zmq.constants import PollEvent, SocketOption, SocketType
from zmq.sugar.context import Context

from verl_rlhfless.errors import WeightStoreError
from verl_rlhfless.live.weight_slices import Slice

_POLL_MS = 100
_SHM = Path("/dev/shm")


class BoundedSender:
    """Sends tensors of the host to one engine worker, in buckets, with the protocol of verl's receiver."""

    def __init__(self, zmq_handle: str, bucket_bytes: int, deadline: float, stop: threading.Event) -> None:
        """Open the socket for the worker at ``zmq_handle``; waits end at ``deadline`` [s, monotonic] or ``stop``.

        Open it before the worker connects: zmq tries again only after 0.1 s.
        """
        self._bucket_bytes, self._deadline, self._stop = bucket_bytes, deadline, stop
        self._path = Path(zmq_handle.removeprefix("ipc://"))
        self._path.unlink(missing_ok=True)  # of a sender that was killed
        self._socket = Context.instance().socket(SocketType.REQ)
        self._socket.setsockopt(SocketOption.LINGER, 0)
        self._socket.bind(zmq_handle)

    async def send(self, tensors: AsyncIterator[tuple[str | Slice, torch.Tensor]]) -> None:
        """Send tensors and slices, none larger than a bucket; return when the worker has them all. Once only.

        Raises:
            WeightStoreError: No shared memory is left, the worker did not take them in time, or ``stop`` was set.
        """
        try:
            memory = allocate(self._bucket_bytes)
            try:
                self._buffer = torch.frombuffer(memory.buf, dtype=torch.uint8)
                self._exchange({"name": memory.name, "size": self._bucket_bytes})
                await self._send_buckets(tensors)
            finally:
                self._buffer = torch.empty(0)  # the memory can't be closed while a tensor shows it
                memory.close()
                memory.unlink()
        finally:
            self._socket.close()
            self._path.unlink(missing_ok=True)

    async def _send_buckets(self, tensors: AsyncIterator[tuple[str | Slice, torch.Tensor]]) -> None:
        bucket: dict[str | Slice, TensorMetadata] = {}
        end = 0
        async for label, tensor in tensors:
            begin = -(-end // tensor.element_size()) * tensor.element_size()  # the receiver views it as its type
            end = begin + tensor.nbytes
            if end > self._bucket_bytes:
                self._exchange({"bucket_meta": bucket, "is_last": False})
                bucket, begin, end = {}, 0, tensor.nbytes
            self._buffer[begin:end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            name = label if isinstance(label, str) else label.name
            bucket[label] = TensorMetadata(name=name, shape=tensor.shape, dtype=tensor.dtype, offset=begin, handle=None)
        self._exchange({"bucket_meta": bucket, "is_last": True})

    def _exchange(self, message: Any) -> None:
        """Send a message and return when the worker has answered it."""
        self._wait(PollEvent.POLLOUT)
        self._socket.send_pyobj(message)
        self._wait(PollEvent.POLLIN)
        self._socket.recv()

    def _wait(self, event: int) -> None:
        while not self._socket.poll(_POLL_MS, event):
            if self._stop.is_set():
                raise WeightStoreError("broken off, because the engine or another worker of it failed")
            if time.monotonic() > self._deadline:
                raise WeightStoreError("a worker of the engine did not take its weights in time")


def allocate(num_bytes: int) -> SharedMemory:
    """Return new shared memory whose pages are all there: other engines of the node load at the same time.

    Raises:
        WeightStoreError: There is not enough left.
    """
    memory = SharedMemory(f"verl_weights_{uuid.uuid4().hex}", create=True, size=num_bytes)
    segment = os.open(_SHM / memory.name, os.O_RDWR)
    try:
        os.posix_fallocate(segment, 0, num_bytes)
    except OSError as error:
        memory.close()
        memory.unlink()
        raise WeightStoreError(
            f"no {num_bytes >> 20} MiB left in {_SHM} ({error.strerror}). Enlarge it (docker run --shm-size, or a "
            "larger memory-backed volume), or lower rlhfless.weights.bucket_mib."
        ) from error
    finally:
        os.close(segment)
    return memory
