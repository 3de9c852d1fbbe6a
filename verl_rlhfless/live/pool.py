"""verl resource pools on leases: a pool that can give its GPUs back and lease them again.

Invariant: an elastic pool has no placement group for workers to run in; at most one lease at a time, and at most one
worker group.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, NoReturn

from verl.single_controller.ray.base import RayResourcePool, ResourcePoolManager

from verl_rlhfless.errors import RlhflessError, UnsupportedError
from verl_rlhfless.live.accelerator import Accelerator
from verl_rlhfless.live.lease import RELEASE_TIMEOUT_S, Lease, LeaseRequest

TRAINER_POOL = "global_pool"
"""verl's name for the pool of actor, reference and critic (``PPOTrainer._init_resource_pool_mgr``)."""

_GRANT_TIMEOUT_S = 300.0


class ElasticResourcePool(RayResourcePool):
    """A trainer's GPUs, held by a lease instead of by the placement groups that workers run in.

    Attributes:
        lease: The current lease, or ``None``.
        grant_timeout_s: How long a worker group that is built on this pool waits for its first lease [s].
        tenant: Name prefix of the worker group that runs on this pool, or ``None``.
    """

    def __init__(self, *stock_args: Any, grant_timeout_s: float = _GRANT_TIMEOUT_S, **stock_kwargs: Any) -> None:
        """Take verl's own arguments of a pool.

        Raises:
            UnsupportedError: Nodes with different numbers of GPUs, no GPUs, a detached pool, or a wanted accelerator
                type.
        """
        super().__init__(*stock_args, **stock_kwargs)
        self.accelerator = Accelerator.of_platform()
        self.grant_timeout_s = grant_timeout_s
        self.lease: Lease | None = None
        self.tenant: str | None = None
        refused = {
            "detached=True": self.detached,
            "use_gpu=False": not self.use_gpu,
            f"accelerator_type={self.accelerator_type}": self.accelerator_type is not None,
            f"process_on_nodes={self.store}: unequal nodes": len(set(self.store)) != 1,
        }
        for what in (what for what, is_set in refused.items() if is_set):
            raise UnsupportedError(
                f"elastic pool {self.name_prefix}: {what} is not supported. Use rlhfless.pool.name=off for this recipe."
            )

    def acquire(self, timeout_s: float, node_ips: tuple[str, ...] | None = None) -> Lease:
        """Lease the pool's GPUs and return the lease.

        Args:
            timeout_s: How long to wait for the GPUs [s].
            node_ips: Addresses of the nodes to lease on; ``None`` for any.

        Raises:
            LeaseTimeoutError: Not granted in time.
        """
        if self.lease is not None:
            raise RlhflessError(
                f"elastic pool {self.name_prefix} already holds lease {self.lease.name}. Release it first."
            )
        name = f"{self.name_prefix}-{secrets.token_hex(4)}"
        self.lease = Lease.acquire(
            LeaseRequest(name, "trainer", tuple(self.store), self.accelerator.resource, node_ips), timeout_s
        )
        return self.lease

    def release(self, timeout_s: float = RELEASE_TIMEOUT_S) -> Lease | None:
        """Give the GPUs back and return the ended lease, ``None`` if there was none. Processes are not touched.

        Raises:
            LeaseReleaseError: Not confirmed within ``timeout_s``; the pool still holds the lease.
        """
        lease = self.lease
        if lease is not None:
            lease.release(timeout_s)
            self.lease = None
        return lease

    def admit(self, tenant: str) -> None:
        """Note the worker group that runs on this pool.

        Raises:
            UnsupportedError: There is one already.
        """
        if self.tenant is not None:
            raise UnsupportedError(
                f"elastic pool {self.name_prefix} already runs worker group {self.tenant}; all roles on it must be one "
                "group to be suspended together. Colocate them (create_colocated_worker_cls), or use another pool."
            )
        self.tenant = tenant

    def get_placement_groups(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: whatever runs inside a lease's placement group dies when the lease is given back.

        Raises:
            UnsupportedError: Always. verl's ``split_resource_pool`` and ``merge_resource_pool`` end here too.
        """
        raise UnsupportedError(
            f"elastic pool {self.name_prefix} has no placement groups: it can't be split, merged, or hold workers "
            "beside its worker group (such as a colocated reward model). Give those a pool of their own, or use "
            "rlhfless.pool.name=off."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ElasticResourcePool:
        return self  # fused worker groups deep-copy their parent, and a lease has one owner


@dataclass
class ElasticResourcePoolManager(ResourcePoolManager):
    """verl's manager, with the trainer's pool on leases; pools of reward and teacher models stay verl's own.

    Differs from verl: the trainer's GPUs may be busy when the run starts; its first lease waits for them.
    """

    grant_timeout_s: float = _GRANT_TIMEOUT_S

    @property
    def is_leased(self) -> bool:
        """Whether the trainer holds its GPUs now."""
        return self.resource_pool_dict[TRAINER_POOL].lease is not None

    def create_resource_pool(self) -> None:
        """Build every pool of the specification, without leasing anything yet.

        Raises:
            UnsupportedError: The trainer's pool is not in the specification, or can't be elastic.
            ValueError: verl's own: too few GPUs for the pools that are not elastic.
        """
        others = dict(self.resource_pool_spec)
        trainer_spec = others.pop(TRAINER_POOL, None)
        if trainer_spec is None:
            raise UnsupportedError(f"verl's pools {sorted(others)} have none named {TRAINER_POOL}, the trainer's.")
        stock = ResourcePoolManager(others, self.mapping, self.max_colocate_count)
        stock.create_resource_pool()
        self.resource_pool_dict[TRAINER_POOL] = ElasticResourcePool(
            process_on_nodes=trainer_spec,
            max_colocate_count=self.max_colocate_count,
            name_prefix=TRAINER_POOL,
            grant_timeout_s=self.grant_timeout_s,
        )
        self.resource_pool_dict |= stock.resource_pool_dict
