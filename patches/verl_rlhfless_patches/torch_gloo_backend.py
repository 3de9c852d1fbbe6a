"""Accept verl's backend string ``cpu:gloo,cpu:gloo``.

Why: verl builds ``cpu:gloo,<device>:<backend>`` (``verl/utils/distributed.py``,
    ``initialize_global_process_group*``); with the CPU platform both halves are equal and torch refuses a repeated
    device. Remove when: verl builds one half for a CPU device.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch.distributed

from verl_rlhfless.errors import UnsupportedError

_REPEATED, _PLAIN = "cpu:gloo,cpu:gloo", "cpu:gloo"


def apply() -> None:
    """Wrap ``torch.distributed.init_process_group`` once.

    Raises:
        UnsupportedError: torch changed the function's signature.
    """
    original = torch.distributed.init_process_group
    if getattr(original, "_rlhfless", False):
        return
    if next(iter(inspect.signature(original).parameters)) != "backend":
        raise UnsupportedError(
            f"torch {torch.__version__}: init_process_group has no first `backend`. Update {__name__} or pin torch."
        )

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        return original(_PLAIN if backend == _REPEATED else backend, *args, **kwargs)

    init_process_group._rlhfless = True  # type: ignore[attr-defined]
    torch.distributed.init_process_group = init_process_group
