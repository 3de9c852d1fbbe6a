"""Let verl's v1 trainer build its worker groups from another class.

Why: there is no config key for it; ``PPOTrainer._setup`` reads the module global ``RayWorkerGroup``.
What: rebinds that global, only around a call.
Upstream: ``verl/trainer/ppo/v1/trainer_base.py``, ``PPOTrainer._setup`` ("create worker group for actor rollout and
critic").
Remove when: verl's trainer takes the worker-group class from a config key or a class attribute.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from types import ModuleType

from verl.single_controller.ray.base import RayWorkerGroup

from verl_rlhfless.errors import UnsupportedError

_GLOBAL = "RayWorkerGroup"
# What a subclass may rely on: it overrides the first and calls the second.
_EXPECTED = {
    "_init_with_resource_pool": ("self", "resource_pool", "ray_cls_with_init", "bin_pack", "detached", "worker_env"),
    "_create_worker": (
        "self", "rank", "pg_idx", "pg", "local_rank", "resource_pool", "ray_cls_with_init", "worker_env", "detached",
    ),
}  # fmt: skip


@contextlib.contextmanager
def use(worker_group_class: type[RayWorkerGroup]) -> Iterator[None]:
    """Make verl's v1 trainer build ``worker_group_class`` inside the block.

    Raises:
        UnsupportedError: verl changed the trainer's global or the methods that a subclass overrides.
    """
    from verl.trainer.ppo.v1 import trainer_base

    check(trainer_base)
    original = getattr(trainer_base, _GLOBAL)
    setattr(trainer_base, _GLOBAL, worker_group_class)
    try:
        yield
    finally:
        setattr(trainer_base, _GLOBAL, original)


def check(trainer_base: ModuleType) -> None:
    """Refuse a verl whose worker group or trainer no longer has the shape that this patch was written for.

    Args:
        trainer_base: verl's module ``verl.trainer.ppo.v1.trainer_base``.

    Raises:
        UnsupportedError: Names what changed.
    """
    if getattr(trainer_base, _GLOBAL, None) is not RayWorkerGroup:
        raise UnsupportedError(
            f"verl's v1 trainer has no module global {_GLOBAL} any more. Update {__name__} or pin verl."
        )
    if _GLOBAL not in trainer_base.PPOTrainer._setup.__code__.co_names:
        raise UnsupportedError(f"verl's PPOTrainer._setup builds no {_GLOBAL} any more. Update {__name__} or pin verl.")
    for name, expected in _EXPECTED.items():
        found = tuple(inspect.signature(getattr(RayWorkerGroup, name)).parameters)
        if found != expected:
            raise UnsupportedError(
                f"verl's RayWorkerGroup.{name} takes {found}, not {expected}. Update {__name__} or pin verl."
            )
