"""Tensors larger than a buffer travel in slices, which the engine's worker joins before it loads anything.

Invariants: a slice is a run of elements in row-major order; those of one tensor come in order and with nothing between
them. verl's receiver hands a slice's label on as it does a name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Slice:
    """Label of a part of a tensor, in the place of its name.

    Attributes:
        name: The tensor's name.
        shape: Shape of the whole tensor.
        begin: Index of the part's first element.
    """

    name: str
    shape: tuple[int, ...]
    begin: int


class Joiner:
    """Puts slices together on the device that they come to."""

    def __init__(self) -> None:
        self._whole = torch.empty(0)

    def join(self, received: Iterable[tuple[str | Slice, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
        """Return the tensors that are complete, in the order in which they came; a slice is kept for the next call."""
        complete = []
        for label, tensor in received:
            if isinstance(label, str):
                complete.append((label, tensor))
                continue
            if label.begin == 0:
                self._whole = torch.empty(label.shape, dtype=tensor.dtype, device=tensor.device)
            end = label.begin + tensor.numel()
            self._whole.view(-1)[label.begin : end].copy_(tensor)
            if end == self._whole.numel():
                complete.append((label.name, self._whole))
                self._whole = torch.empty(0)
        return complete
