"""The sender speaks with verl's own receiver, stays off every device, and ends whatever happens."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from verl.workers.rollout.vllm_rollout import bucketed_weight_transfer
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver

from verl_rlhfless.errors import WeightStoreError
from verl_rlhfless.live import weight_channel
from verl_rlhfless.live.weight_channel import BoundedSender, allocate

TENSORS = {
    "bytes": torch.arange(3, dtype=torch.uint8),  # the next one has to be aligned
    "wide": torch.arange(40, dtype=torch.float64).reshape(8, 5),
    "scalar": torch.tensor(7.0),
    "half": torch.arange(60, dtype=torch.bfloat16),
    "none": torch.empty(0, 4),
}
BUCKET_BYTES = 400
WAIT_S = 20.0


async def published() -> AsyncIterator[tuple[str, torch.Tensor]]:
    for name, tensor in TENSORS.items():
        yield name, tensor


def sender(tmp_path: Path, seconds: float = WAIT_S, stop: threading.Event | None = None) -> BoundedSender:
    return BoundedSender(handle(tmp_path), BUCKET_BYTES, time.monotonic() + seconds, stop or threading.Event())


def handle(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/weights.sock"


def segments() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("verl_weights_")}


def test_verls_receiver_gets_every_tensor_and_no_device_is_asked_by_the_sender(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: dict[str, torch.Tensor] = {}
    device, askers = bucketed_weight_transfer.get_torch_device, set()

    def asked() -> Any:
        askers.add(threading.current_thread().name)
        return device()

    def on_bucket(weights: list[tuple[str, torch.Tensor]], is_last: bool) -> None:
        received.update({name: tensor.clone() for name, tensor in weights})

    monkeypatch.setattr(bucketed_weight_transfer, "get_torch_device", asked)
    sending, before = sender(tmp_path), segments()
    receiver = BucketedWeightReceiver(handle(tmp_path), torch.device("cpu"), use_shm=True)
    worker = threading.Thread(target=receiver.receive_weights, args=(on_bucket,), name="worker", daemon=True)
    worker.start()
    asyncio.run(sending.send(published()))
    worker.join(WAIT_S)
    assert list(received) == list(TENSORS)
    assert all(torch.equal(received[name], tensor) for name, tensor in TENSORS.items())
    assert askers == {"worker"}
    assert segments() == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("seconds", "is_stopped", "message"), [(0.0, False, "in time"), (WAIT_S, True, "broken off")])
def test_a_worker_that_never_answers_ends_it(tmp_path: Path, seconds: float, is_stopped: bool, message: str) -> None:
    stop, before = threading.Event(), segments()
    if is_stopped:
        stop.set()
    with pytest.raises(WeightStoreError, match=message):
        asyncio.run(sender(tmp_path, seconds, stop).send(published()))
    assert segments() == before
    assert list(tmp_path.iterdir()) == []


def test_a_full_shared_memory_is_an_error_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weight_channel.os, "posix_fallocate", full)
    before = segments()
    with pytest.raises(WeightStoreError, match=r"no 3 MiB left in /dev/shm .*bucket_mib"):
        allocate(3 << 20)
    assert segments() == before


def test_shared_memory_is_taken_and_not_only_promised() -> None:
    memory = allocate(2 << 20)
    try:
        assert os.stat(f"/dev/shm/{memory.name}").st_blocks * 512 >= 2 << 20
    finally:
        memory.close()
        memory.unlink()
