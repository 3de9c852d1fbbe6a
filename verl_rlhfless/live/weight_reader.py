"""Tensors of a version as read-only views of the object store: nothing is copied until a consumer copies it."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import torch
from ray.exceptions import RayError

from verl_rlhfless.errors import WeightStoreError
from verl_rlhfless.live.checksum import as_unsigned, bit_sum
from verl_rlhfless.live.weight_manifest import Manifest, StoredTensor
from verl_rlhfless.live.weight_slices import Slice


async def read_tensors(manifest: Manifest, timeout_s: float) -> AsyncIterator[tuple[str, torch.Tensor]]:
    """Yield ``(name, tensor)`` of a version in published order. A tensor that spans buckets is copied together.

    Raises:
        WeightStoreError: A bucket did not arrive in time or is lost.
    """
    async for stored, pieces in _read(manifest, timeout_s):
        yield stored.name, _as_tensor(stored, pieces)


async def read_slices(
    manifest: Manifest, num_bytes: int, timeout_s: float
) -> AsyncIterator[tuple[str | Slice, torch.Tensor]]:
    """Like :func:`read_tensors`, but a tensor larger than ``num_bytes`` comes in slices of at most so much, uncopied.

    Raises:
        WeightStoreError: A bucket did not arrive in time or is lost.
    """
    async for stored, pieces in _read(manifest, timeout_s):
        if stored.num_bytes <= num_bytes:
            yield stored.name, _as_tensor(stored, pieces)
            continue
        begin = 0
        for piece in pieces:
            flat = _view(piece, stored.dtype)
            for part in flat.split(num_bytes // flat.element_size()):
                yield Slice(stored.name, stored.shape, begin), part
                begin += part.numel()


async def _read(manifest: Manifest, timeout_s: float) -> AsyncIterator[tuple[StoredTensor, list[Any]]]:
    """Yield every tensor with the pieces of its bytes."""
    deadline = time.monotonic() + timeout_s
    index, bucket = -1, np.empty(0, np.uint8)
    for stored in manifest.tensors:
        pieces = []
        for part in stored.parts:
            if part.bucket != index:
                index, bucket = part.bucket, await _fetch(manifest, part.bucket, deadline)
            pieces.append(bucket[part.offset : part.offset + part.num_bytes])
        yield stored, pieces


async def read_checked_tensors(manifest: Manifest, timeout_s: float) -> AsyncIterator[tuple[str, torch.Tensor]]:
    """Like :func:`read_tensors`, with every tensor checked: for a consumer that can't checksum what it loaded.

    Raises:
        WeightStoreError: The bits of a tensor are not those that were published.
    """
    expected = {stored.name: stored for stored in manifest.tensors}
    async for name, tensor in read_tensors(manifest, timeout_s):
        found, published = as_unsigned(bit_sum(tensor)), expected[name].bit_sum
        if found != published:
            raise WeightStoreError(
                f"{name} of weight version {manifest.version} has bit sum {found:016x}, but {published:016x} was "
                "published: its bucket is corrupt"
            )
        yield name, tensor


async def _fetch(manifest: Manifest, index: int, deadline: float) -> Any:
    try:
        return await asyncio.wait_for(manifest.buckets[index], max(0.0, deadline - time.monotonic()))
    except asyncio.TimeoutError:
        reason = "did not arrive in time"
    except RayError as error:
        reason = f"is lost ({error})"
    raise WeightStoreError(f"bucket {index} of weight version {manifest.version} {reason}")


def _as_tensor(stored: StoredTensor, pieces: list[Any]) -> torch.Tensor:
    if not pieces:
        return torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
    return _view(pieces[0] if len(pieces) == 1 else np.concatenate(pieces), stored.dtype).view(stored.shape)


def _view(piece: Any, dtype: str) -> torch.Tensor:
    """Return bytes as a flat tensor of a type."""
    with warnings.catch_warnings():  # Ray's buffers are read-only, which is right: every reader on the node shares them
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        flat: torch.Tensor = torch.from_numpy(piece).view(getattr(torch, dtype))
    return flat
