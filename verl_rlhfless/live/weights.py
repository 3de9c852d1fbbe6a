"""How an elastic replica gets the trainer's weights: its server actor pulls a version from the store into its engine.

There is no collective, no worker process beside the engine's own, and nobody else pauses. Every worker of the engine
gets the whole stream through a shared-memory buffer of its own, which is one bucket whatever the model: with verl's
protocol and verl's receiver, and larger tensors in slices. On a GPU too: verl's other way, CUDA IPC, needs the tensors
in the sender's device memory, and the server actor has none.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import ray

from verl_rlhfless.errors import WeightStoreError
from verl_rlhfless.live.checksum import EngineChecksum, verify
from verl_rlhfless.live.variables import LEASE_VARIABLE
from verl_rlhfless.live.weight_channel import BoundedSender
from verl_rlhfless.live.weight_manifest import Manifest
from verl_rlhfless.live.weight_reader import read_slices
from verl_rlhfless.live.weight_store import ANSWER_GRACE_S, answered, connect


@dataclass(frozen=True, slots=True)
class PullReport:
    """What a replica loaded.

    Attributes:
        version: The trainer step whose weights these are.
        checksum: Digest that every worker of the engine computed over what it received; equals the published one.
        compared: ``loaded`` if the live parameters were compared too, else ``received`` and why no more.
        num_bytes: Bytes of the weights, counted once.
        seconds: From the request for the version to the confirmed checksum.
    """

    version: int
    checksum: str
    compared: str
    num_bytes: int
    seconds: float


async def pull_into_engine(engine: Any, *, version: int, store_name: str, timeout_s: float) -> PullReport:
    """Load a version into a running vLLM engine and confirm its checksum; runs in the server actor, named in errors.

    Args:
        engine: vLLM's ``AsyncLLM``, with the worker extension of :mod:`verl_rlhfless.live.engine_worker`.
        version: The version to load; waited for if it is still being published.
        store_name: Ray name of the run's store.
        timeout_s: How long all of it may take [s].

    Raises:
        WeightStoreError: The version is not held, the pull took too long or broke off, or the engine holds other
            weights. The engine is not usable after that.
    """
    started = time.monotonic()
    deadline = started + timeout_s
    replica = os.environ.get(LEASE_VARIABLE) or ray.get_runtime_context().get_actor_name()
    try:
        async with _pinned(connect(store_name), version, replica, timeout_s) as manifest:
            handles = await _call(engine, "_get_zmq_handle", deadline)
            await _transfer(engine, manifest, handles, deadline)
            replies = [EngineChecksum(**fields) for fields in await _call(engine, "weights_checksum", deadline)]
            compared = verify(manifest, replies)
    except WeightStoreError as error:
        raise WeightStoreError(f"replica {replica}, weight version {version}: {error}") from error
    seconds = time.monotonic() - started
    return PullReport(version, replies[0].received, compared, manifest.num_bytes, seconds)


@asynccontextmanager
async def _pinned(store: Any, version: int, replica: str, timeout_s: float) -> AsyncIterator[Manifest]:
    what = "the weight store"
    pinned = store.pin.remote(version, replica, timeout_s)
    try:
        yield await answered(pinned, timeout_s + ANSWER_GRACE_S, what)
    finally:
        await answered(store.unpin.remote(version, replica), ANSWER_GRACE_S, what)


async def _call(engine: Any, method: str, deadline: float, **kwargs: Any) -> list[Any]:
    """Return the answer of every worker of the engine."""
    left_s = _left_s(deadline)
    try:
        replies: list[Any] = await asyncio.wait_for(
            engine.collective_rpc(method, timeout=left_s, kwargs=kwargs), left_s
        )
    except asyncio.TimeoutError:
        raise WeightStoreError(
            f"the engine did not answer {method} in time; raise rlhfless.weights.pull_timeout_s"
        ) from None
    except Exception as error:  # whatever happened in the engine's processes, its weights are not what they should be
        raise WeightStoreError(f"the engine failed in {method}: {error}") from error
    return replies


async def _transfer(engine: Any, manifest: Manifest, handles: list[str], deadline: float) -> None:
    """Stream the version to every worker, one thread each: a sender blocks."""
    stop = threading.Event()
    senders = [BoundedSender(handle, manifest.bucket_bytes, deadline, stop) for handle in handles]
    receiving = asyncio.ensure_future(_call(engine, "update_weights_from_ipc", deadline, use_shm=True))

    def send(sender: BoundedSender) -> None:
        asyncio.run(sender.send(read_slices(manifest, manifest.bucket_bytes, _left_s(deadline))))

    tasks = [receiving, *(asyncio.ensure_future(asyncio.to_thread(send, sender)) for sender in senders)]
    try:
        await asyncio.gather(*tasks)
    finally:
        stop.set()  # a sender whose worker failed would wait for it,
        receiving.cancel()  # and a worker whose sender failed does
        await asyncio.gather(*tasks, return_exceptions=True)


def _left_s(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())
