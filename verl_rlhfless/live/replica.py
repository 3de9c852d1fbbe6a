"""One elastic rollout replica, from the request for GPUs to their confirmed return.

Invariants: an engine runs outside its lease's placement group (removing a group kills everything inside it), so the
    end of a replica is always engine first, lease second; whatever fails on the way up, the lease is returned.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.workers.rollout.replica import RolloutMode
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMReplica

from verl_rlhfless.config import PoolConfig
from verl_rlhfless.errors import ReplicaError
from verl_rlhfless.live.accelerator import Accelerator
from verl_rlhfless.live.engine_files import reap_server
from verl_rlhfless.live.lease import Lease, LeaseRequest
from verl_rlhfless.live.parked_memory import ParkedMemory
from verl_rlhfless.live.replica_life import ParkReport, ReleaseReport, ReplicaState, WeightSource
from verl_rlhfless.live.shared_lease import SharedLease
from verl_rlhfless.live.variables import LEASE_VARIABLE
from verl_rlhfless.live.warm_pool import WarmPool
from verl_rlhfless.live.weight_store import ANSWER_GRACE_S
from verl_rlhfless.live.weights import PullReport
from verl_rlhfless.processes import ProcessKey

FRESH_ENGINE_BYTES = 2**30
"""What the next engine holds on a device before vLLM asks for its share of it: CUDA's context, kernels, NCCL's buffers.

vLLM (``init_device`` of its GPU worker) compares what is free only after these are there. A round upper figure.
"""

_DRAIN_POLL_S = 0.02
_ANSWER_S = 5.0  # beyond what the end of processes may take
_START_KEY, _PULL_KEY = "rlhfless.pool.start_timeout_s", "rlhfless.weights.pull_timeout_s"
_PULL_WAITS = 3  # for the store's answers before and after a pull, and for the caches that are cleared then


class ElasticReplica(vLLMReplica):
    """A vLLM replica on a lease of its own or a part of the trainer's, or parked between two of the same devices.

    Its rank is never reused: verl's actor and socket names contain it.

    Attributes:
        state: Where it is in its life.
        lease: The current lease, or its part of the trainer's; the last one when parked or ended.
        engine_s: How long the last start or wake of the engine took, weights not included [s].
    """

    def __init__(
        self,
        replica_rank: int,
        config: Any,
        model_config: Any,
        pool: PoolConfig,
        warm_servers: WarmPool,
        over: threading.Event | None = None,
    ) -> None:
        """Take verl's arguments and ours; once ``over`` is set, the rollout is over and GPUs are not waited for."""
        super().__init__(replica_rank, config, model_config, gpus_per_node=config.tensor_model_parallel_size)
        self.rollout_mode = RolloutMode.STANDALONE
        self.state = ReplicaState.REQUESTED
        self.lease: Lease | SharedLease | None = None
        self.engine_s = 0.0
        self._pool = pool
        self._warm_servers = warm_servers
        self._over = over
        self._server_process: ProcessKey | None = None
        self._engine_processes: tuple[ProcessKey, ...] = ()

    @property
    def node_id(self) -> str:
        """Ray's id of the node that the lease is on."""
        assert self.lease is not None
        return self.lease.nodes[0].node_id

    @property
    def name(self) -> str:
        """The replica's name in leases, logs and errors."""
        return f"r{self.replica_rank}"

    @property
    def holds_lease(self) -> bool:
        """Whether its GPUs are not given back."""
        return self.lease is not None and self.lease.released_s is None

    def can_serve_for(self, other: ElasticReplica) -> bool:
        """Return whether this replica's engine is the one that ``other`` would start."""
        return bool(self.config == other.config and self.model_config == other.model_config)

    def acquire(self, name: str, timeout_s: float) -> Lease:
        """Return a granted lease for this replica, named ``name``; the caller's until it is given to start or wake.

        Raises:
            LeaseTimeoutError: The GPUs were not granted in time, or not before the rollout was over.
        """
        resource = Accelerator.of_platform().resource
        return Lease.acquire(LeaseRequest(name, "replica", (self.world_size,), resource), timeout_s, over=self._over)

    async def start(self, weights: WeightSource, lease: Lease | SharedLease | None = None) -> PullReport:
        """Start the engine on ``lease``, or on a new one, load the weights, and return what was loaded.

        Raises:
            LeaseTimeoutError: The GPUs were not granted in time.
            ReplicaError: The engine did not start in time or failed; the lease is returned.
        """
        self.lease = lease or await asyncio.to_thread(self.acquire, self.name, self._pool.grant_timeout_s)
        return await self._bring_up(self.launch_servers, weights)

    async def wake(self, weights: WeightSource, lease: Lease | SharedLease) -> PullReport:
        """Wake the parked engine on a lease of the devices that it slept on, load the weights, and return what was.

        Raises:
            ReplicaError: The engine did not wake in time or failed; it is ended, and the lease is returned.
        """
        assert self.state is ReplicaState.PARKED and self.lease is not None
        assert lease.device_key() == self.lease.device_key(), "a live process can't change its devices"
        self.lease = lease
        return await self._bring_up(self._wake_engine, weights)

    async def _bring_up(self, engine_up: Callable[[], Awaitable[None]], weights: WeightSource) -> PullReport:
        began_s = time.monotonic()
        try:
            self.state = ReplicaState.STARTING
            await self._within(self._pool.start_timeout_s, engine_up(), ("the engine was not ready", _START_KEY))
            self.engine_s = time.monotonic() - began_s
            self.state = ReplicaState.LOADING
            pulled = self._server_handle.pull_weights.remote(weights.version, weights.store_name, weights.timeout_s)
            limit_s = weights.timeout_s + _PULL_WAITS * ANSWER_GRACE_S
            what = "its server did not load the weights", _PULL_KEY
            report: PullReport = await self._within(limit_s, pulled, what)
            self.state = ReplicaState.READY
            return report
        except BaseException:
            await self.stop()
            raise

    async def _within(self, limit_s: float, work: Awaitable[Any], what: tuple[str, str]) -> Any:
        """Return the result of ``work``; ``what`` = its failure and the key of its limit."""
        try:
            return await asyncio.wait_for(work, limit_s)
        except asyncio.TimeoutError:
            raise ReplicaError(
                f"replica {self.name}: {what[0]} after {limit_s:g} s. Raise {what[1]}, or look for the engine's error "
                "above."
            ) from None

    async def _wake_engine(self) -> None:
        assert self.lease is not None
        await self._server_handle.wake.remote(self.lease.name)

    async def launch_servers(self) -> None:
        """Make a warm server actor serve on the leased devices.

        Differs from verl: the lease tells the devices, not a worker process, and the actor exists already.
        """
        assert self.lease is not None
        (node,) = self.lease.nodes
        server, self._server_process = await self._warm_servers.take(self.node_id)
        self.servers = [server]
        await server.become.remote(
            {LEASE_VARIABLE: self.lease.name},
            {
                "config": self.config,
                "model_config": self.model_config,
                "rollout_mode": self.rollout_mode,
                "workers": [None] * self.world_size,
                "replica_rank": self.replica_rank,
                "node_rank": 0,
                "gpus_per_node": self.world_size,
                "nnodes": 1,
                "cuda_visible_devices": ",".join(node.device_ids),
            },
        )
        await server.launch_server.remote()
        self._engine_processes = await server.engine_processes.remote()
        ip, port = await server.get_server_address.remote()
        self._server_handle = server
        self._server_address = f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"

    async def is_lost(self) -> bool:
        """Return whether the engine or its server is dead, or so busy that it does not answer."""
        try:
            return not await self._answer(self._server_handle.is_alive.remote())
        except (ray.exceptions.RayError, asyncio.TimeoutError):
            return True

    async def release(self) -> ReleaseReport:
        """Drain, end the engine, give the lease back, and return how long each took.

        Raises:
            ReplicaError: A process survived, or may have; the lease is kept, because its GPUs are still in use.
            LeaseReleaseError: Ray did not confirm the release in time.
        """
        started = time.monotonic()
        drained = await self._drain()
        drained_s = time.monotonic()
        await self._stop_engine()
        stopped_s = time.monotonic()
        await self._return_lease()
        return ReleaseReport(drained, drained_s - started, stopped_s - drained_s, time.monotonic() - stopped_s)

    async def park(self) -> ParkReport:
        """Drain, put the engine to sleep, give the lease back, and return how long each took and what is still held.

        Raises:
            ReplicaError: The engine did not sleep, or more device memory is in use than may be. The lease
                is kept: release the replica.
            LeaseReleaseError: Ray did not confirm the release in time.
        """
        assert self.lease is not None
        began_s = time.monotonic()
        drained = await self._drain()
        drained_s = time.monotonic()
        memory = await self._sleep()
        asleep_s = time.monotonic()
        await asyncio.to_thread(self.lease.release, self._pool.release_timeout_s)
        self.state = ReplicaState.PARKED
        return ParkReport(drained, drained_s - began_s, asleep_s - drained_s, time.monotonic() - asleep_s, memory)

    async def _sleep(self) -> ParkedMemory:
        try:
            memory: ParkedMemory = await self._answer(self._server_handle.park.remote())
        except (ray.exceptions.RayError, asyncio.TimeoutError) as error:
            raise ReplicaError(f"replica {self.name}: the engine did not sleep: {error!r}. It is ended.") from error
        is_given_away = not isinstance(self.lease, SharedLease)  # beside the trainer, its own state is in use there
        limit = self._pool.park_residual_bytes
        if limit is None:
            left = int((1 - self.config.gpu_memory_utilization) * memory.device_total_bytes)
            limit = max(0, left - FRESH_ENGINE_BYTES)
        if is_given_away and memory.device_bytes > limit:
            raise ReplicaError(
                f"replica {self.name}: {memory.device_bytes} bytes in use on a device of the sleeping engine, limit "
                f"{limit}. It is ended. Lower gpu_memory_utilization, or raise rlhfless.pool.park_residual_bytes."
            )
        return memory

    async def host_available_bytes(self) -> int:
        """Return the memory that processes of the replica's node can still get; 0 if its server does not answer."""
        try:
            return int(await self._answer(self._server_handle.host_available_bytes.remote()))
        except (ray.exceptions.RayError, asyncio.TimeoutError):
            return 0

    async def stop(self) -> None:
        """End the engine and give the lease back at once; whatever still runs on it is lost. Safe to call twice.

        Raises:
            ReplicaError: A process survived, or may have; the lease is kept, because its GPUs are still in use.
            LeaseReleaseError: Ray did not confirm the release in time.
        """
        await self._stop_engine()
        await self._return_lease()

    async def _drain(self) -> bool:
        """Wait until no request runs, at most ``drain_timeout_s``, then abort what is left; return whether nothing was.

        The clients of aborted requests see an error.
        """
        self.state = ReplicaState.DRAINING
        deadline = time.monotonic() + self._pool.drain_timeout_s
        try:
            while await self._answer(self._server_handle.num_running.remote()):
                if time.monotonic() > deadline:
                    await asyncio.wait_for(self.abort_all_requests(reject_request=True), self._pool.release_timeout_s)
                    return False
                await asyncio.sleep(_DRAIN_POLL_S)
        except asyncio.TimeoutError:
            return False
        except ray.exceptions.RayError:
            pass  # a server that is gone has nothing to drain
        return True

    async def _stop_engine(self) -> None:
        survivors: tuple[int, ...] = ()
        for server in self.servers:
            survivors = await self._stop_server(server)
        if survivors:
            self.state = ReplicaState.LOST
            raise ReplicaError(
                f"replica {self.name}: processes {list(survivors)} survived a kill, so its "
                "GPUs stay leased. Look at their node."
            )
        self.servers = []  # only now: whoever stops the replica again has to end what still runs

    async def _return_lease(self) -> None:
        if self.lease is not None:
            await asyncio.to_thread(self.lease.release, self._pool.release_timeout_s)
        if self.state is not ReplicaState.LOST:
            self.state = ReplicaState.RELEASED

    async def _stop_server(self, server: Any) -> tuple[int, ...]:
        """End the engine, and return the pids that survived; a server in good health waits for another replica."""
        timeout_s = self._pool.release_timeout_s
        is_launching = self.state is ReplicaState.STARTING  # and may go on to, into the launch of the next replica
        try:
            survivors = await asyncio.wait_for(server.stop_engine.remote(timeout_s), timeout_s + _ANSWER_S)
        except (ray.exceptions.RayError, asyncio.TimeoutError):
            self.state = ReplicaState.LOST
            survivors = await self._reap(timeout_s)
        if self.state is ReplicaState.LOST or survivors or is_launching:
            ray.kill(server, no_restart=True)  # only now: the server is the one that knows its processes
        else:
            self._warm_servers.give_back(self.node_id, server)
        return tuple(survivors)

    async def _reap(self, timeout_s: float) -> tuple[int, ...]:
        """End the processes of a server that does not answer, from a task on its node; none survives a dead node.

        Raises:
            ReplicaError: The node lives, and did not end them in time.
        """
        if self._server_process is None or self.lease is None:
            return ()
        affinity = NodeAffinitySchedulingStrategy(node_id=self.node_id, soft=False)
        reap = ray.remote(num_cpus=0)(reap_server).options(scheduling_strategy=affinity)
        survivors = reap.remote(self._server_process, self._engine_processes, timeout_s)
        try:
            return tuple(await asyncio.wait_for(survivors, timeout_s + _ANSWER_S))
        except (ray.exceptions.RayError, asyncio.TimeoutError) as error:
            if not any(node["NodeID"] == self.node_id and node["Alive"] for node in ray.nodes()):
                return ()
            raise ReplicaError(
                f"replica {self.name}: node {self.lease.nodes[0].ip} did not end its processes: {error!r}. Its GPUs "
                "stay leased. Look at the node."
            ) from error

    async def _answer(self, reference: Any) -> Any:
        """Return a server's answer within ``release_timeout_s``."""
        return await asyncio.wait_for(reference, self._pool.release_timeout_s)
