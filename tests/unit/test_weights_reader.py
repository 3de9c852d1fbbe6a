"""Reading a version back from its buckets, without Ray: a bucket is anything that can be awaited."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from verl_rlhfless.errors import WeightStoreError
from verl_rlhfless.live.checksum import as_unsigned, bit_sum
from verl_rlhfless.live.weight_manifest import Manifest, Part, StoredTensor
from verl_rlhfless.live.weight_reader import read_checked_tensors, read_tensors

WEIGHTS = {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.tensor(2.5, dtype=torch.bfloat16)}


class Bucket:
    """A bucket that arrives when it is awaited, or never."""

    def __init__(self, content: bytes, *, arrives: bool = True) -> None:
        self.content, self.arrives = content, arrives

    def __await__(self) -> Any:
        if not self.arrives:
            yield from asyncio.Event().wait().__await__()
        return np.frombuffer(self.content, np.uint8)  # read-only, as Ray's are


def content(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist())


def stored(name: str, *parts: Part) -> StoredTensor:
    tensor = WEIGHTS[name]
    dtype = str(tensor.dtype).removeprefix("torch.")
    return StoredTensor(name, dtype, tuple(tensor.shape), as_unsigned(bit_sum(tensor)), parts)


def manifest(*buckets: Bucket) -> Manifest:
    """Return a version whose tensor ``a`` spans two buckets, with ``b`` behind it."""
    tensors = (stored("a", Part(0, 0, 16), Part(1, 0, 8)), stored("b", Part(1, 64, 2)))
    return Manifest(3, tensors, "unused", buckets, bucket_bytes=128)


def version(*, flipped_byte: int | None = None) -> Manifest:
    first, second = bytearray(content(WEIGHTS["a"])[:16]), bytearray(content(WEIGHTS["a"])[16:].ljust(64, b"x"))
    second += content(WEIGHTS["b"])
    if flipped_byte is not None:
        second[flipped_byte] ^= 1
    return manifest(Bucket(bytes(first)), Bucket(bytes(second)))


def read(reader: Any) -> dict[str, torch.Tensor]:
    async def collect() -> dict[str, torch.Tensor]:
        return {name: tensor.clone() async for name, tensor in reader}

    return asyncio.run(collect())


@pytest.mark.parametrize("reader", [read_tensors, read_checked_tensors])
def test_what_is_read_is_what_was_stored(reader: Any) -> None:
    tensors = read(reader(version(), timeout_s=5))
    assert list(tensors) == ["a", "b"]
    for name, tensor in tensors.items():
        assert tensor.dtype == WEIGHTS[name].dtype
        assert torch.equal(tensor, WEIGHTS[name])


@pytest.mark.parametrize(("byte", "name"), [(0, "a"), (7, "a"), (64, "b")])
def test_a_corrupt_bucket_is_found_and_its_tensor_named(byte: int, name: str) -> None:
    with pytest.raises(WeightStoreError, match=f"^{name} of weight version 3 has bit sum .* its bucket is corrupt"):
        read(read_checked_tensors(version(flipped_byte=byte), timeout_s=5))


def test_a_byte_between_tensors_belongs_to_nobody() -> None:
    assert torch.equal(read(read_checked_tensors(version(flipped_byte=20), timeout_s=5))["a"], WEIGHTS["a"])


def test_a_bucket_that_does_not_arrive_ends_the_read() -> None:
    late = manifest(Bucket(content(WEIGHTS["a"])[:16]), Bucket(b"", arrives=False))
    with pytest.raises(WeightStoreError, match="bucket 1 of weight version 3 did not arrive in time"):
        read(read_tensors(late, timeout_s=0.01))


def test_an_empty_tensor_has_its_shape() -> None:
    empty = StoredTensor("none", "float16", (0, 4), 0, ())
    assert read(read_tensors(Manifest(1, (empty,), "", (), 128), 1))["none"].shape == (0, 4)
