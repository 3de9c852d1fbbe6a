"""Let a process outside a placement group tell which devices its lease gave it.

Why: leased workers ask Ray for no GPU, so ``RuntimeContext.get_accelerator_ids()`` and ``ray.get_gpu_ids()`` are
empty there. verl indexes the list without looking: hybrid replicas fail
(``verl/workers/rollout/vllm_rollout/vllm_async_server.py``, ``vLLMReplica.launch_servers``) and NUMA affinity is
lost with no more than a printed warning (``verl/utils/distributed.py``, ``set_numa_affinity``).
What: both answer from the environment variable ``RLHFLESS_LEASED_DEVICES`` (``<resource>:<id>,<id>``) when Ray's own
list is empty.
Upstream: ``ray/_private/worker.py``, ``Worker.get_accelerator_ids_for_accelerator_resource``, which both functions
call.
Remove when: verl passes devices to its workers instead of asking Ray, or Ray lets an actor use a bundle's devices
from outside the group.

Applied only where the variable is set: leased workers name this module in ``VERL_USE_EXTERNAL_MODULES``, and verl
imports it before any worker is built. Errors of that import are not swallowed.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Any

import ray
from ray._private.worker import Worker
from ray.runtime_context import RuntimeContext

from verl_rlhfless.errors import UnsupportedError

LEASED_DEVICES = "RLHFLESS_LEASED_DEVICES"
_METHOD = "get_accelerator_ids_for_accelerator_resource"


def leased_devices_env(resource: str, device_ids: Sequence[str]) -> dict[str, str]:
    """Return the environment of a worker that owns these devices: the variable, and verl's order to import this module.

    Args:
        resource: Ray's name of the accelerator, e.g. ``GPU``.
        device_ids: Ray's device ids.
    """
    modules = [module for module in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(",") if module]
    if __name__ not in modules:
        modules.append(__name__)
    return {LEASED_DEVICES: f"{resource}:{','.join(device_ids)}", "VERL_USE_EXTERNAL_MODULES": ",".join(modules)}


def apply() -> None:
    """Patch Ray's worker in this process, once.

    Raises:
        UnsupportedError: Ray changed the method, or the two public functions no longer call it.
    """
    original = getattr(Worker, _METHOD, None)
    if getattr(original, "_rlhfless", False):
        return
    _check(original)
    leased_resource, _, ids = os.environ[LEASED_DEVICES].partition(":")
    leased_ids = ids.split(",")

    def with_leased_devices(self: Worker, resource_name: str, resource_regex: str) -> list[Any]:
        assigned: list[Any] = original(self, resource_name, resource_regex)  # type: ignore[misc]
        return assigned or (list(leased_ids) if resource_name == leased_resource else assigned)

    with_leased_devices._rlhfless = True  # type: ignore[attr-defined]
    setattr(Worker, _METHOD, with_leased_devices)


def _check(original: Any) -> None:
    callers = (RuntimeContext.get_accelerator_ids, inspect.unwrap(ray.get_gpu_ids))
    if (
        original is None
        or list(inspect.signature(original).parameters) != ["self", "resource_name", "resource_regex"]
        or any(_METHOD not in caller.__code__.co_names for caller in callers)
    ):
        raise UnsupportedError(
            f"Ray {ray.__version__} changed Worker.{_METHOD} or its callers. Update {__name__} or pin ray."
        )


if LEASED_DEVICES in os.environ:
    apply()
