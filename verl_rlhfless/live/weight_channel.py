"""verl's shared-memory sender with an end: stock, it waits for ever for a worker that died."""

from __future__ import annotations

import threading
import time
import uuid
from typing import Any

import torch
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender, create_shared_memory
from zmq.constants import PollEvent, SocketOption

from verl_rlhfless.errors import WeightStoreError

_POLL_MS = 100


class _BoundedSocket:
    """The part of a zmq socket that verl's sender uses; its waits end at a deadline, or when the other side failed."""

    def __init__(self, socket: Any, deadline: float, stop: threading.Event) -> None:
        self._socket, self._deadline, self._stop = socket, deadline, stop
        socket.setsockopt(SocketOption.LINGER, 0)

    def send_pyobj(self, message: Any) -> None:
        self._wait(PollEvent.POLLOUT)
        self._socket.send_pyobj(message)

    def recv(self) -> bytes:
        self._wait(PollEvent.POLLIN)
        return bytes(self._socket.recv())

    def close(self) -> None:
        self._socket.close()

    def _wait(self, event: int) -> None:
        while not self._socket.poll(_POLL_MS, event):
            if self._stop.is_set():
                raise WeightStoreError("broken off, because the engine or another worker of it failed")
            if time.monotonic() > self._deadline:
                raise WeightStoreError("a worker of the engine did not take its weights in time")


class BoundedSender(BucketedWeightSender):
    """Sends tensors to one engine worker through shared memory."""

    def __init__(self, zmq_handle: str, bucket_size_mb: int, deadline: float, stop: threading.Event) -> None:
        """Open the socket for the worker at ``zmq_handle``; its waits end at ``deadline`` [s, monotonic] or ``stop``.

        Open it before the worker connects: zmq tries again only after 0.1 s.
        """
        super().__init__(zmq_handle, bucket_size_mb, use_shm=True)
        super()._init_socket()
        self.socket: Any = _BoundedSocket(self.socket, deadline, stop)

    def _init_socket(self) -> None:
        """Do nothing: it is open."""

    def _init_buffer(self) -> None:
        # Differs from verl, which leaks the segment if the worker never answers: clean-up must know it before the wait.
        self.shm = create_shared_memory(self.bucket_size, f"verl_weights_{uuid.uuid4().hex}")
        self.buffer = torch.frombuffer(self.shm.buf, dtype=torch.uint8)
        self.socket.send_pyobj({"name": self.shm.name, "size": self.bucket_size})
        self.socket.recv()
