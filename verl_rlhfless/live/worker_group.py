"""A verl worker group on a lease, which can give its GPUs back while its processes live on.

The ranks run outside the lease's placement group, on the devices that the lease names. ``suspend`` moves every
role of the processes to the host and releases the lease; ``resume`` leases again and goes on only on the same devices,
because a live process can't change its device. Spawned role groups share their parent's processes: the parent owns the
lease and does the work, whichever group is asked.

Not yet measured on a GPU (see ``residency.py``). A suspended rank keeps its CUDA context on the device.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.single_controller.ray.base import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

from verl_rlhfless.config import SUSPEND_RESIDUAL_BYTES
from verl_rlhfless.errors import (
    DeviceMemoryError,
    DeviceMismatchError,
    RlhflessError,
    SuspendError,
    UnsupportedError,
)
from verl_rlhfless.live.lease import RELEASE_TIMEOUT_S, Lease
from verl_rlhfless.live.pool import ElasticResourcePool
from verl_rlhfless.live.residency import DeviceResidency, RankMemory, VerlResidency
from verl_rlhfless.live.same_devices import describe_devices, lease_devices
from verl_rlhfless.live.shared_lease import TrainerDevices
from verl_rlhfless.types import DeviceKey

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class SuspendResult:
    """Seconds of each phase of a suspend, and what the ranks still hold.

    Attributes:
        offload_s: All ranks moved their state to the host.
        confirm_s: All ranks gave cached memory back and reported what is left.
        release_s: The lease ended.
        ranks: Memory of each rank, in rank order.
        lease: The ended lease, with its time stamps.
    """

    offload_s: float
    confirm_s: float
    release_s: float
    ranks: tuple[RankMemory, ...]
    lease: Lease


@dataclass(frozen=True, slots=True)
class ResumeResult:
    """Seconds of each phase of a resume.

    Attributes:
        lease_s: Until the right devices were leased, wrong grants included.
        onload_s: All ranks moved their state back.
        lease: The new lease.
        wrong_leases: Ended leases of other devices that were tried before; they cost too.
    """

    lease_s: float
    onload_s: float
    lease: Lease
    wrong_leases: tuple[Lease, ...]


class _OutsideGroup:
    """``RayClassWithInitArgs`` for ``RayWorkerGroup._create_worker``: same class, arguments, options; another place."""

    def __init__(self, stock: RayClassWithInitArgs, node_id: str) -> None:
        self.cls = stock.cls
        self._stock = stock
        self._node_id = node_id
        self._options: dict[str, Any] = dict(stock._options)

    def update_options(self, options: dict[str, Any]) -> None:
        self._options.update(options)

    def __call__(self, **_stock_placement: Any) -> Any:
        placement = {
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=self._node_id, soft=False),
            "num_gpus": 0,
            "num_cpus": 0,
        }
        return self.cls.options(**{**self._options, **placement}).remote(*self._stock.args, **self._stock.kwargs)


def _by_owner(method: Callable[Concatenate[Any, _Args], _Result]) -> Callable[Concatenate[Any, _Args], _Result]:
    """Return a group's method that the owner of the lease runs, whichever group is asked."""

    @functools.wraps(method)
    def call(group: Any, /, *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        return method(group._owner, *args, **kwargs)

    return call


class ElasticWorkerGroup(RayWorkerGroup):
    """verl's worker group. On an :class:`ElasticResourcePool` it can suspend; on any other pool it is verl's own.

    Attributes:
        residency: How a rank leaves its device and comes back.
    """

    residency: DeviceResidency = VerlResidency()
    _parent: ElasticWorkerGroup | None = None
    _bound: DeviceKey = ()
    _node_ips: tuple[str, ...] = ()

    def _init_with_resource_pool(
        self,
        resource_pool: RayResourcePool,
        ray_cls_with_init: RayClassWithInitArgs,
        bin_pack: bool,
        detached: bool,
        worker_env: dict[str, str] | None = None,
    ) -> None:
        """Lease the pool's GPUs and create one worker per device, outside the lease's placement group.

        Raises:
            LeaseTimeoutError: The GPUs were not granted within the pool's ``grant_timeout_s``.
            UnsupportedError: Detached workers, or a second worker group on one elastic pool.
        """
        self.resource_pool = resource_pool
        if not isinstance(resource_pool, ElasticResourcePool):
            super()._init_with_resource_pool(resource_pool, ray_cls_with_init, bin_pack, detached, worker_env)
            return
        if detached:
            raise UnsupportedError(
                f"worker group {self.name_prefix}: detached workers would outlive their lease. Use detached=False."
            )
        resource_pool.admit(self.name_prefix)
        try:
            lease = resource_pool.lease or resource_pool.acquire(resource_pool.grant_timeout_s)
            self._create_workers(lease, resource_pool, ray_cls_with_init, worker_env or {})
        except BaseException:
            self.shutdown()
            raise

    def _create_workers(
        self,
        lease: Lease,
        pool: ElasticResourcePool,
        ray_cls_with_init: RayClassWithInitArgs,
        worker_env: dict[str, str],
    ) -> None:
        self._bound, self._node_ips = lease.device_key(), tuple(node.ip for node in lease.nodes)
        self._world_size = pool.world_size
        port_range = self._ray_master_port_range
        self._master_addr, port = lease.master_address(tuple(port_range) if port_range else None)
        self._master_port = str(port)
        places = [(index, node, local) for index, node in enumerate(lease.nodes) for local in range(pool.store[0])]
        for rank, (pg_idx, node, local_rank) in enumerate(places):
            self._create_worker(
                rank=rank,
                pg_idx=pg_idx,
                pg=None,
                local_rank=local_rank,
                resource_pool=pool,
                ray_cls_with_init=_OutsideGroup(ray_cls_with_init, node.node_id),
                worker_env={**worker_env, **pool.accelerator.worker_env(node.device_ids[local_rank])},
                detached=False,
            )

    def spawn(self, prefix_set: set[str]) -> dict[str, ElasticWorkerGroup]:
        """Return verl's role groups over the same processes; suspend and resume of any of them act on all."""
        groups: dict[str, ElasticWorkerGroup] = super().spawn(prefix_set)
        for group in groups.values():
            group._parent = self
        return groups

    @property
    def bound_devices(self) -> DeviceKey:
        """The devices that the processes are bound to, leased or not."""
        return self._owner._bound

    @property
    def _owner(self) -> ElasticWorkerGroup:
        """The group that has the lease: this one, or the one whose processes it shares."""
        return self if self._parent is None else self._parent._owner

    @_by_owner
    def suspend(self, timeout_s: float, max_reserved_bytes: int = SUSPEND_RESIDUAL_BYTES) -> SuspendResult:
        """Move every role to the host, confirm that the device memory is free, and release the lease.

        Call it between phases. Rollout engines on the same devices must be asleep or absent: their memory is not seen.

        Args:
            timeout_s: Bound of each of the three phases [s].
            max_reserved_bytes: Most device memory that torch's allocator may keep in a suspended rank.

        Raises:
            SuspendError: A rank did not answer in time; the lease is kept.
            DeviceMemoryError: A rank still holds device memory; the state is moved back, and the lease is kept.
            LeaseReleaseError: Ray did not confirm the release; the ranks stay on the host.
        """
        pool = self._elastic_pool()
        if pool.lease is None:
            raise RlhflessError(f"worker group {self.name_prefix} is suspended already. Call resume() first.")
        start_s = time.monotonic()
        self._on_every_rank(self.residency.offload, "offload", timeout_s)
        offloaded_s = time.monotonic()
        ranks = tuple(self._on_every_rank(self.residency.memory, "report its device memory", timeout_s))
        confirmed_s = time.monotonic()
        self._refuse_residue(ranks, max_reserved_bytes, timeout_s)
        lease = pool.lease
        pool.release(timeout_s)
        end_s = time.monotonic()
        return SuspendResult(offloaded_s - start_s, confirmed_s - offloaded_s, end_s - confirmed_s, ranks, lease)

    @_by_owner
    def resume(self, timeout_s: float, same_device_wait_s: float) -> ResumeResult:
        """Lease the same devices again and move every role back onto them.

        Args:
            timeout_s: Bound of the wait for the devices, and of the way back onto them [s].
            same_device_wait_s: How long to go on trying after Ray first granted other devices [s].

        Raises:
            LeaseTimeoutError: No GPUs in time. Nothing is leased; resume may be tried again.
            DeviceMismatchError: Only other devices; the message names both. Nothing is leased; resume may be tried
                again.
            SuspendError: A rank did not come back in time. The lease is kept, because ranks may be on the devices:
                call :meth:`shutdown`.
        """
        pool = self._elastic_pool()
        if pool.lease is not None:
            raise RlhflessError(f"worker group {self.name_prefix} holds lease {pool.lease.name}: it is not suspended.")
        start_s = time.monotonic()
        lease, wrong = self._lease_bound_devices(pool, timeout_s, same_device_wait_s)
        leased_s = time.monotonic()
        self._on_every_rank(self.residency.onload, "onload", timeout_s)
        return ResumeResult(leased_s - start_s, time.monotonic() - leased_s, lease, wrong)

    @_by_owner
    def devices(self) -> TrainerDevices:
        """Return the leased devices, for replicas that run on them beside the trainer."""
        lease = self._elastic_pool().lease
        if lease is None:
            raise RlhflessError(f"worker group {self.name_prefix} is suspended: it has no devices to share.")
        return TrainerDevices(lease.name, lease.nodes)

    @_by_owner
    def free_device_share(self, timeout_s: float) -> float:
        """Return the share of its memory that is free on the fullest device, whoever holds the rest.

        Call it between phases.

        Raises:
            SuspendError: A rank did not answer in time.
        """
        shares = self._on_every_rank(self.residency.free_share, "report its free device memory", timeout_s)
        return float(min(shares))

    @_by_owner
    def stay_on_host(self, timeout_s: float) -> None:
        """Let a suspended group be saved from the host, as its last act.

        Raises:
            UnsupportedError: Its state can't be saved without the devices.
            SuspendError: A rank did not answer in time.
        """
        self._on_every_rank(self.residency.stay, "prepare a checkpoint", timeout_s)

    @_by_owner
    def shutdown(self, timeout_s: float = RELEASE_TIMEOUT_S) -> None:
        """End the processes and release the lease. Safe to call twice.

        Raises:
            LeaseReleaseError: Ray did not confirm the release in time.
        """
        pool = self._elastic_pool()
        for worker in self._workers:
            ray.kill(worker)
        pool.release(timeout_s)
        pool.tenant = None

    def _elastic_pool(self) -> ElasticResourcePool:
        pool = getattr(self, "resource_pool", None)
        if not isinstance(pool, ElasticResourcePool):
            raise UnsupportedError(f"worker group {self.name_prefix} has no lease: its resource pool is not elastic.")
        return pool

    def _lease_bound_devices(
        self, pool: ElasticResourcePool, timeout_s: float, same_device_wait_s: float
    ) -> tuple[Lease, tuple[Lease, ...]]:
        """Return a lease of the bound devices and the wrong ones before it: Ray can't be asked for a device.

        Args:
            pool: The pool to lease for.
            timeout_s: Bound of all trying [s].
            same_device_wait_s: Bound of the trying after the first wrong grant [s].
        """
        search = lease_devices(
            acquire=lambda left_s: pool.acquire(left_s, self._node_ips),
            release=lambda _: pool.release(),
            wanted=lambda: (self._bound,),
            timeout_s=timeout_s,
            wait_s=same_device_wait_s,
        )
        if not search.is_wanted:
            pool.release()
            raise DeviceMismatchError(
                f"worker group {self.name_prefix} is bound to {describe_devices(self._bound)}, but Ray granted "
                f"{describe_devices(search.lease.device_key())} ({len(search.wrong) + 1} grants of other devices). "
                "Raise rlhfless.pool.same_device_wait_s, lease whole nodes, or start the workers again from a "
                "checkpoint."
            )
        return search.lease, search.wrong

    def _on_every_rank(self, call: Callable[[Any], Any], verb: str, timeout_s: float) -> list[Any]:
        """Run ``call(worker)`` inside every rank at once and return the results in rank order."""
        refs = [worker.__ray_call__.remote(call) for worker in self._workers]
        _, pending = ray.wait(refs, num_returns=len(refs), timeout=timeout_s)
        if pending:
            late = [rank for rank, ref in enumerate(refs) if ref in pending]
            raise SuspendError(
                f"worker group {self.name_prefix}: ranks {late} did not {verb} within {timeout_s:g} s. "
                "They may still be in a training phase; call between phases, or raise the time-out."
            )
        results: list[Any] = ray.get(refs)
        return results

    def _refuse_residue(self, ranks: tuple[RankMemory, ...], max_reserved_bytes: int, timeout_s: float) -> None:
        reserved = {rank: memory.device_reserved_bytes for rank, memory in enumerate(ranks)}
        over = {rank: count for rank, count in reserved.items() if count > max_reserved_bytes}
        if over:
            self._on_every_rank(self.residency.onload, "onload", timeout_s)
            raise DeviceMemoryError(
                f"worker group {self.name_prefix}: device bytes still reserved by rank {over}, limit "
                f"{max_reserved_bytes}. The lease is kept and the state is back on the device: something else in these "
                "processes holds device memory. Raise rlhfless.pool.suspend_residual_bytes if replicas start beside so "
                "much, use +rlhfless=resident, or leave the replicas GPUs of their own: lower trainer.n_gpus_per_node "
                "and set rlhfless.pool.suspend_trainer=never."
            )
