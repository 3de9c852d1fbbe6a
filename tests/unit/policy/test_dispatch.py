"""Placements where the answer is known."""

from __future__ import annotations

import numpy as np

from verl_rlhfless.policy.dispatch import equal_length_blocks
from verl_rlhfless.policy.snapshot import Batch


def test_rlhfless_blocks_hold_equally_many_samples_however_long_they_are() -> None:
    batch = Batch(1, tuple("abcd"), np.arange(4), np.full(4, 10), 1000)
    assert equal_length_blocks(batch, np.array([1000.0, 1.0, 3.0, 2.0]), 2).tolist() == [1, 0, 1, 0]
