"""What is known about one published version of the weights: its tensors, where their bytes lie, and their checksum.

Invariants: nothing here needs torch or Ray, because the store's own process loads it; the parts of a tensor, joined in
order, are its bytes in row-major order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Part:
    """A run of bytes of one tensor inside one bucket."""

    bucket: int
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a version.

    Attributes:
        name: Name in the Hugging Face checkpoint.
        dtype: torch's name of the element type without its prefix, such as ``bfloat16``.
        shape: The tensor's shape.
        bit_sum: See :func:`verl_rlhfless.live.checksum.bit_sum`.
        parts: Where its bytes lie. More than one only if the tensor is larger than any bucket; none if it is empty.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bit_sum: int
    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor."""
        return sum(part.num_bytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Manifest:
    """One complete version in the store.

    Attributes:
        version: The trainer step whose weights these are.
        tensors: All tensors, in the order in which the trainer gave them.
        checksum: Digest over name, type, shape and bits of every tensor.
        buckets: Ray references to the bytes, one ``uint8`` array each.
        bucket_bytes: Most bytes of a bucket that holds several tensors.
    """

    version: int
    tensors: tuple[StoredTensor, ...]
    checksum: str
    buckets: tuple[Any, ...]
    bucket_bytes: int

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)
