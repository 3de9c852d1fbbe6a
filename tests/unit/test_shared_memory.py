"""A segment whose name is gone serves its processes on, and leaves nothing behind when they end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from multiprocessing import resource_tracker, shared_memory

import pytest

from verl_rlhfless.shared_memory import mapped_segments, queue_segments, unlink_segments


@pytest.fixture
def segment() -> Iterator[shared_memory.SharedMemory]:
    memory = shared_memory.SharedMemory(name=f"psm_test_{os.getpid()}", create=True, size=4096)
    resource_tracker.unregister(memory._name, "shared_memory")  # type: ignore[attr-defined]
    yield memory
    memory.close()
    unlink_segments([memory.name])


def test_mapped_segment_is_found_by_its_process(segment: shared_memory.SharedMemory) -> None:
    assert segment.name in queue_segments()
    assert segment.name in mapped_segments([os.getpid()])
    assert mapped_segments([]) == set()


def test_process_that_is_gone_maps_nothing() -> None:
    assert mapped_segments([2**22 - 1]) == set()


def test_memory_outlives_its_name(segment: shared_memory.SharedMemory) -> None:
    unlink_segments([segment.name, segment.name])
    assert segment.name not in queue_segments()
    segment.buf[0] = 42
    assert segment.buf[0] == 42
