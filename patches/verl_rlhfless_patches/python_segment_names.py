"""Let the shared memory that a process makes have names that begin with a prefix of ours.

Why: vLLM's queues take the names of their segments from Python, which draws them at random (``psm_...``), and remove
them on an orderly exit only. Nobody could tell whose a segment is that an engine left which was killed during its
start: nothing maps it any more.
Upstream: ``Lib/multiprocessing/shared_memory.py``, ``_make_filename``, which vLLM's ``ShmRingBuffer`` gets there
(``vllm/distributed/device_communicators/shm_broadcast.py``).
Remove when: vLLM removes the names once its processes have the memory open, or lets them be set.
"""

from __future__ import annotations

import inspect
import secrets
from multiprocessing import shared_memory
from typing import Any

from verl_rlhfless.errors import UnsupportedError

_FUNCTION = "_make_filename"
_NUM_RANDOM_BYTES = 8


def apply(prefix: str) -> None:
    """Name what this process makes from now on ``prefix`` and something random.

    Raises:
        UnsupportedError: This Python names segments in another way.
    """
    module: Any = shared_memory
    original = getattr(module, _FUNCTION, None)
    if original is None or inspect.signature(original).parameters:
        raise UnsupportedError(f"Python changed multiprocessing.shared_memory.{_FUNCTION}. Update {__name__}.")
    setattr(module, _FUNCTION, lambda: f"/{prefix}{secrets.token_hex(_NUM_RANDOM_BYTES)}")
