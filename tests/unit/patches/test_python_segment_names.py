"""With the patch shared memory has names that begin as asked; a Python that names it in another way is refused."""

from __future__ import annotations

from multiprocessing import shared_memory
from typing import Any

import pytest

from verl_rlhfless.errors import UnsupportedError
from verl_rlhfless_patches import python_segment_names

MODULE: Any = shared_memory


@pytest.fixture(autouse=True)
def unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "_make_filename", MODULE._make_filename)


def test_segments_have_the_latest_prefix_and_are_told_apart() -> None:
    python_segment_names.apply("psm_first-")
    python_segment_names.apply("psm_test-")
    made = [shared_memory.SharedMemory(create=True, size=16) for _ in range(2)]
    names = {memory.name for memory in made}
    for memory in made:
        memory.close()
        memory.unlink()
    assert len(names) == 2 and all(name.startswith("psm_test-") for name in names)


def test_an_unknown_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "_make_filename", lambda prefix: prefix)
    with pytest.raises(UnsupportedError, match="Python changed"):
        python_segment_names.apply("psm_test-")
