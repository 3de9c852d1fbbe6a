"""Tensors larger than a worker's buffer arrive whole, and the buffer stays as small as it was configured."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from verl_rlhfless.live import weight_channel, weights
from verl_rlhfless.live.engine_worker import ElasticWorkerExtension, ReceivedWeights
from verl_rlhfless.live.weight_manifest import Manifest, Part, StoredTensor
from verl_rlhfless.live.weight_slices import Joiner, Slice

BUCKET_BYTES = 400
WAIT_S = 20.0
EMBEDDING = torch.arange(1000, dtype=torch.float32).reshape(8, 125)  # ten times the buffer, in buckets of 3000 and 1000
NORM = torch.arange(9, dtype=torch.bfloat16)


class Bucket:
    """A reference to bytes in Ray's object store."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._bytes = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors]).numpy()

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        return self._bytes


def manifest() -> Manifest:
    flat = EMBEDDING.reshape(-1)
    tensors = (
        StoredTensor("embed", "float32", (8, 125), 0, (Part(0, 0, 3000), Part(1, 0, 1000))),
        StoredTensor("norm", "bfloat16", (9,), 0, (Part(2, 0, 18),)),
    )
    return Manifest(1, tensors, "", (Bucket(flat[:750]), Bucket(flat[750:]), Bucket(NORM)), BUCKET_BYTES)


class Engine:
    """Workers with verl's receiver, as vLLM's are."""

    def __init__(self, handles: list[str]) -> None:
        self._handles = handles
        self.loaded: list[list[tuple[str, torch.Tensor]]] = [[] for _ in handles]

    async def collective_rpc(self, method: str, **_: Any) -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(self._receive, rank) for rank in range(len(self._handles))))

    def _receive(self, rank: int) -> None:
        joiner = Joiner()

        def on_bucket(received: list[tuple[str | Slice, torch.Tensor]], is_last: bool) -> None:
            self.loaded[rank] += [(name, tensor.clone()) for name, tensor in joiner.join(received)]

        receiver = BucketedWeightReceiver(self._handles[rank], torch.device("cpu"), use_shm=True)
        receiver.receive_weights(on_bucket)


def test_every_worker_gets_a_large_tensor_whole_through_a_buffer_of_one_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate, sizes = weight_channel.allocate, []

    def noted(num_bytes: int) -> Any:
        sizes.append(num_bytes)
        return allocate(num_bytes)

    monkeypatch.setattr(weight_channel, "allocate", noted)
    handles = [f"ipc://{tmp_path}/{rank}.sock" for rank in range(2)]
    engine = Engine(handles)
    asyncio.run(weights._transfer(engine, manifest(), handles, time.monotonic() + WAIT_S))
    assert sizes == [BUCKET_BYTES] * 2
    for loaded in engine.loaded:
        assert [name for name, _ in loaded] == ["embed", "norm"]
        assert all(torch.equal(got, sent) for (_, got), sent in zip(loaded, (EMBEDDING, NORM), strict=True))


def test_the_engine_loads_and_sums_a_large_tensor_once_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[list[str]] = []
    record = lambda self, tensors: loads.append([name for name, _ in tensors])  # noqa: E731
    monkeypatch.setattr(vLLMColocateWorkerExtension, "_update_weights", record)
    worker: Any = ElasticWorkerExtension.__new__(ElasticWorkerExtension)
    worker.rlhfless_received, worker.rlhfless_joiner = ReceivedWeights(torch.float32, is_tied=False), Joiner()
    flat = EMBEDDING.reshape(-1)
    worker._update_weights([(Slice("embed", (8, 125), 0), flat[:600])])
    worker._update_weights([(Slice("embed", (8, 125), 600), flat[600:]), ("norm", NORM)])
    assert loads == [["embed", "norm"]]
    whole = ReceivedWeights(torch.float32, is_tied=False)
    whole.add("embed", EMBEDDING)
    whole.add("norm", NORM)
    assert worker.rlhfless_received.digest() == whole.digest()
