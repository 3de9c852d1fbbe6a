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


async def read_tensors(manifest: Manifest, timeout_s: float) -> AsyncIterator[tuple[str, torch.Tensor]]:
    """Yield ``(name, tensor)`` of a version in published order. A tensor that spans buckets is copied together.

    Raises:
        WeightStoreError: A bucket did not arrive in time or is lost.
    """
    deadline = time.monotonic() + timeout_s
    index, bucket = -1, np.empty(0, np.uint8)
    for stored in manifest.tensors:
        pieces = []
        for part in stored.parts:
            if part.bucket != index:
                index, bucket = part.bucket, await _fetch(manifest, part.bucket, deadline)
            pieces.append(bucket[part.offset : part.offset + part.num_bytes])
        yield stored.name, _as_tensor(stored, pieces)


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
    dtype: torch.dtype = getattr(torch, stored.dtype)
    if not pieces:
        return torch.empty(stored.shape, dtype=dtype)
    with warnings.catch_warnings():  # Ray's buffers are read-only, which is right: every reader on the node shares them
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        flat = torch.from_numpy(pieces[0] if len(pieces) == 1 else np.concatenate(pieces))
    return flat.view(dtype).view(stored.shape)
