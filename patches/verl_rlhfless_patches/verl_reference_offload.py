"""Leave a reference model where it is on a CPU run: verl offloads it to pinned host memory, which needs a device.

Why: FSDP2 pins every shard of a forward-only model (``verl/workers/engine/fsdp/transformer_impl.py``,
``CPUOffloadPolicy(pin_memory=True)`` in ``_build_fsdp_module``), and torch refuses to pin without an accelerator. On a
CPU run host and device are the same memory, so there is nothing to offload. Remove when: verl asks the platform.
"""

from __future__ import annotations

from types import ModuleType

import wrapt

from verl_rlhfless.errors import UnsupportedError

_MODULE, _POLICY = "verl.workers.engine.fsdp.transformer_impl", "CPUOffloadPolicy"


def _no_policy(*, pin_memory: bool) -> None:
    """Return FSDP2's value for "no offload"."""


def _patch(module: ModuleType) -> None:
    if not hasattr(module, _POLICY):
        raise UnsupportedError(f"verl changed {_MODULE}: {_POLICY} is gone. Update {__name__} or pin verl to 0.9.1.")
    setattr(module, _POLICY, _no_policy)


def apply() -> None:
    """Patch verl's module now if it is loaded, else right after its first import.

    Raises:
        UnsupportedError: verl changed the module (raised when it is imported).
    """
    wrapt.register_post_import_hook(_patch, _MODULE)
