"""Stop vLLM's shared-memory queues from spinning.

Why: a reader spins (``sched_yield``) for one second after each message
(``vllm/distributed/device_communicators/shm_broadcast.py``, ``SpinCondition``), so every engine keeps at least one core
at 100 % while it generates. With several engines and trainer ranks on few cores the measurement is then one of the
spinning. With spinning off a reader waits for a notification, and those can be lost (high-water mark 1, conflated),
which stock vLLM repairs after 5 s: the poll is capped instead, so that a lost one costs 2 ms at most.
Remove when: vLLM makes the spin time and the recheck interval settings.
"""

from __future__ import annotations

import functools
import inspect
from types import ModuleType
from typing import Any

import wrapt

from verl_rlhfless.errors import UnsupportedError

_MODULE = "vllm.distributed.device_communicators.shm_broadcast"
_MAX_POLL_MS = 2
_SIGNATURES = {
    "__init__": ["self", "is_reader", "context", "notify_address", "busy_loop_s"],
    "wait": ["self", "timeout_ms"],
}


def apply() -> None:
    """Patch vLLM's module now if it is loaded, else right after its first import.

    Raises:
        UnsupportedError: vLLM changed the class (raised when its module is imported).
    """
    wrapt.register_post_import_hook(_patch, _MODULE)


def _patch(module: ModuleType) -> None:
    condition: Any = getattr(module, "SpinCondition", None)
    for name, parameters in _SIGNATURES.items():
        method = getattr(condition, name, None)
        if method is None or list(inspect.signature(method).parameters) != parameters:
            raise UnsupportedError(f"vLLM changed {_MODULE}.SpinCondition.{name}. Update {__name__} or pin vLLM.")
    if not hasattr(module, "SPINLOOP_EXT_ENABLED"):
        raise UnsupportedError(f"vLLM removed {_MODULE}.SPINLOOP_EXT_ENABLED. Update {__name__} or pin vLLM.")
    if hasattr(condition.wait, "__wrapped__"):
        return
    init, wait = condition.__init__, condition.wait

    @functools.wraps(init)
    def quiet_init(self: Any, is_reader: bool, context: Any, notify_address: str, busy_loop_s: float = 0.0) -> None:
        init(self, is_reader, context, notify_address, 0.0)

    @functools.wraps(wait)
    def short_wait(self: Any, timeout_ms: int | None = None) -> None:
        wait(self, _MAX_POLL_MS if timeout_ms is None else min(timeout_ms, _MAX_POLL_MS))

    condition.__init__, condition.wait = quiet_init, short_wait
    vars(module)["SPINLOOP_EXT_ENABLED"] = False
