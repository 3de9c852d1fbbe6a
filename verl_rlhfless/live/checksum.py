"""Checksums that travel with the weights, so that a replica that serves other weights than the trainer's is found out.

Two links, each compared where it can be:

* the *stream digest* of everything that was published is compared with that of everything an engine worker received;
* the *bit sum* of everything a worker received is compared with that of its live parameters. A sum doesn't depend on
  the order of the elements, so it survives vLLM's concatenations (``qkv_proj``, ``gate_up_proj``) and zero padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from verl_rlhfless.errors import WeightStoreError
from verl_rlhfless.live.weight_manifest import Manifest

_MODULUS = 2**64
_PIECE_ELEMENTS = 2**24  # summed at a time: torch makes an int64 copy of what it sums
_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Summed(Protocol):
    """A tensor's identity and content, as far as a digest needs it."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def bit_sum(self) -> int: ...


@dataclass(frozen=True, slots=True)
class TensorSum:
    """One tensor that an engine worker received."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bit_sum: int


@dataclass(frozen=True, slots=True)
class EngineChecksum:
    """What one engine worker says about the weights that it loaded last. Sums and digests are hexadecimal.

    Attributes:
        rank: The worker's rank in its engine.
        received: Stream digest of the tensors that arrived.
        expected_sum: Bit sum of those tensors in the engine's element type.
        loaded_sum: Bit sum of the live parameters.
        incomparable: Why ``loaded_sum`` says nothing about ``expected_sum`` (a shard, quantised weights); empty if they
            must agree.
    """

    rank: int
    received: str
    expected_sum: str
    loaded_sum: str
    incomparable: str


def bit_sum(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return the sum of the elements' bits, read as signed integers, modulo 2**64.

    Args:
        tensor: What to sum.
        dtype: Element type that the elements are converted to first; their own by default.

    Returns:
        A 0-d ``int64`` tensor on the same device; on a GPU nothing waits for it. On a CPU numpy sums, because torch
        takes seven times as long.
    """
    bits_type = _INTEGER_OF_SIZE[(dtype or tensor.dtype).itemsize]
    sum_bits = _sum_by_numpy if tensor.device.type == "cpu" else _sum_by_torch
    pieces = tensor.detach().flatten().split(_PIECE_ELEMENTS)
    return torch.stack([sum_bits(piece.to(dtype or tensor.dtype).view(bits_type)) for piece in pieces]).sum()


def _sum_by_numpy(bits: torch.Tensor) -> torch.Tensor:
    return torch.tensor(bits.numpy().sum(dtype=np.int64))


def _sum_by_torch(bits: torch.Tensor) -> torch.Tensor:
    return bits.sum(dtype=torch.int64)


def as_unsigned(total: torch.Tensor | int) -> int:
    """Return a sum as a number in ``0 .. 2**64 - 1``."""
    return int(total) % _MODULUS


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def stream_digest(tensors: Iterable[Summed]) -> str:
    """Return a digest [16 hexadecimal digits] of a set of tensors, whatever their order."""
    lines = sorted(f"{item.name} {item.dtype} {list(item.shape)} {item.bit_sum:016x}" for item in tensors)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def verify(manifest: Manifest, replies: Sequence[EngineChecksum]) -> str:
    """Return what was compared: ``loaded`` (live parameters) or ``received`` (only what arrived, and why).

    Raises:
        WeightStoreError: A worker received or holds other weights than the published ones; the message has both values.
    """
    if not replies:
        raise WeightStoreError(
            f"no engine worker answered which weights it holds; version {manifest.version} is unconfirmed"
        )
    for reply in replies:
        if reply.received != manifest.checksum:
            raise WeightStoreError(
                f"worker {reply.rank} received weights with checksum {reply.received}, but version {manifest.version} "
                f"was published with {manifest.checksum}"
            )
        if not reply.incomparable and reply.loaded_sum != reply.expected_sum:
            raise WeightStoreError(
                f"worker {reply.rank} holds parameters with bit sum {reply.loaded_sum}, but version {manifest.version} "
                f"was published with {reply.expected_sum}: the engine did not load all that it received"
            )
    reasons = sorted({reply.incomparable for reply in replies if reply.incomparable})
    return f"received ({', '.join(reasons)})" if reasons else "loaded"
