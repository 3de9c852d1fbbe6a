"""All elastic replicas of a step: started together in the background, registered with the router, released together."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import ray
from omegaconf import DictConfig, OmegaConf, open_dict

from verl_rlhfless.config import RlhflessConfig
from verl_rlhfless.errors import ReplicaError, RlhflessError
from verl_rlhfless.live.events import EventLog
from verl_rlhfless.live.orders import ReclaimReplica, StartReplica
from verl_rlhfless.live.parking import ParkingLot
from verl_rlhfless.live.replica import ElasticReplica
from verl_rlhfless.live.replica_life import WeightSource
from verl_rlhfless.live.retry import once, retry, retry_async
from verl_rlhfless.live.shared_lease import TrainerDevices
from verl_rlhfless.live.warm_pool import WarmPool
from verl_rlhfless.policy.learnt import ReplicaTimes, Standby, Way
from verl_rlhfless.types import DeviceKey, FleetDecision, ReplicaSpec

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class Fleet:
    """Enacts fleet decisions; it never decides how many replicas a step gets.

    Attributes:
        replicas: Those that came up.
        num_started: Replicas that came up for the last decision, those that have ended since included.
        max_gpus: GPUs that the last decision leased.
        parking: Engines that sleep between two rollouts.
        gpu_s: GPU-seconds of the leases of its replicas that have ended.
        starts: What it took each of its replicas to come up.
        releases_s: What it took each to leave its GPUs, once it was drained.
    """

    def __init__(
        self, config: DictConfig, settings: RlhflessConfig, router: Any, events: EventLog, warm_servers: WarmPool
    ) -> None:
        self._rollout = config.actor_rollout_ref.rollout
        self._model = config.actor_rollout_ref.model
        self._settings = settings
        self._router = router
        self._events = events
        self._ranks = itertools.count()
        self.replicas: list[ElasticReplica] = []
        self._asked_for: list[ElasticReplica] = []
        self._shared: TrainerDevices | None = None
        self.max_gpus = self.num_started = 0
        self.gpu_s = 0.0
        self.starts: list[ReplicaTimes] = []
        self.releases_s: list[float] = []
        self._num_servers = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rlhfless-fleet")
        self._starting: Future[list[str]] | None = None
        self._life: Future[None] | None = None
        self._over = threading.Event()  # of the rollout: a replica of the next one waits for another
        self.parking = ParkingLot(settings.pool, events, can_sleep=_can_sleep(config))
        self._warm_servers = warm_servers
        self._warm_servers.fill()

    @property
    def standby(self) -> Standby:
        """What waits for a replica."""
        return Standby(self.parking.parked, self._warm_servers.num_waiting)

    def expect(self, decision: FleetDecision) -> None:
        """Tell the router which replicas will come: from then on a step can be announced; ``start`` follows."""
        assert not self.replicas and self._starting is None, "a fleet is released before the next one starts"
        tps = [spec.tp for spec in decision.replicas]
        retry(lambda: self._router.expect.remote(tps))

    def start(
        self,
        decision: FleetDecision,
        weights: WeightSource,
        *,
        imports_first: bool = False,
        shared: TrainerDevices | None = None,
    ) -> None:
        """Begin to start every replica of the decision at once, and return.

        Args:
            decision: The fleet.
            weights: What its replicas load.
            imports_first: Whether replicas lease only when the servers of fresh ones have done their imports. Set it if
                the trainer has left already. A trainer that leaves as soon as the replicas are leased needs them to
                lease at once: later they would get the devices that it has just left.
            shared: The trainer's devices, on which the replicas run without leases; ``None`` = each leases.
        """
        logger.info("rlhfless: step %d: %s", decision.step, decision.reason)
        self._shared, self._over = shared, threading.Event()
        self.max_gpus, self.num_started, self.gpu_s = 0 if shared else decision.num_gpus, 0, 0.0
        self.starts, self.releases_s, self._num_servers = [], [], self.standby.num_servers
        self.parking.expect(decision)
        candidates = self._asked_for = [self._new_replica(spec) for spec in decision.replicas]
        self._starting = Future()
        fresh = Counter(spec.tp for spec in decision.replicas) - self.parking.parked
        num_imports = fresh.total() if imports_first else 0
        self._life = self._thread.submit(asyncio.run, self._live(candidates, weights, num_imports, self._starting))

    @property
    def is_leased(self) -> bool:
        """Whether every replica that was asked for has its GPUs."""
        return all(replica.lease is not None for replica in self._asked_for)

    def device_keys(self) -> list[DeviceKey]:
        """Return the devices of every lease that the replicas of this rollout hold or held."""
        known = {replica.name: replica.lease for replica in (*self._asked_for, *self.replicas)}
        return [lease.device_key() for lease in known.values() if lease is not None]

    def wait_started(self) -> None:
        """Return when every replica came up or failed; the step goes on with those that came up.

        Raises:
            ReplicaError: None came up; the message holds each replica's reason.
        """
        if self._starting is None:
            return
        failures = self._starting.result()
        self._starting = None
        if not self.num_started:
            raise ReplicaError("no rollout replica came up. " + " | ".join(failures))

    def give_up_waiting(self) -> None:
        """End the wait of replicas that have no GPUs yet: the rollout is over. Those that have them come up."""
        self._over.set()

    async def _live(
        self, candidates: list[ElasticReplica], weights: WeightSource, num_imports: int, started: Future[list[str]]
    ) -> None:
        """Start the replicas, and start and end others for as long as the router asks."""
        orders = asyncio.create_task(self._take_orders(weights))
        try:
            await self._warm_servers.wait_warm(num_imports, self._settings.pool.start_timeout_s)
            started.set_result(await self._start_all(candidates, weights))
        except BaseException as error:  # noqa: BLE001  handed to the thread that waits for the start
            started.set_exception(error)
        await orders

    async def _take_orders(self, weights: WeightSource) -> None:
        """Start and end replicas as the router asks, side by side, until it asks for no more."""
        running: list[asyncio.Task[Any]] = []
        lost: list[asyncio.Task[Any]] = []
        with contextlib.suppress(ray.exceptions.RayActorError):  # a router that is gone asks for nothing
            while (order := await retry_async(lambda: self._router.wanted.remote(len(running)))) is not None:
                is_start = isinstance(order, StartReplica)
                work = self._replace(order.tp, weights, tuple(lost)) if is_start else self._end(order.server)
                running.append(asyncio.create_task(work))
                if isinstance(order, ReclaimReplica):
                    lost.append(running[-1])
        await _all_ended(running)

    async def _replace(self, tp: int, weights: WeightSource, lost: tuple[asyncio.Task[Any], ...]) -> None:
        """Start a replica, once the GPUs of those that were lost are back: it may need them."""
        if lost:
            await asyncio.wait(lost)
        await self._try_start(self._new_replica(ReplicaSpec(tp)), weights)

    async def _end(self, server: str) -> None:
        """Release one replica in mid-rollout; one that can't be released is tried again at the end, which raises."""
        replica = next((replica for replica in self.replicas if replica.server_address == server), None)
        if replica is None:
            return  # it ends already
        self.replicas.remove(replica)
        try:
            await self._release_one(replica)
        except Exception as error:  # noqa: BLE001  raised by the second try, if that fails too
            logger.error("rlhfless: %s could not be released: %s", replica.name, error)
            self.replicas.append(replica)
            return
        await self._tell_returned(replica)

    async def _tell_returned(self, replica: ElasticReplica) -> None:
        """Tell the router that GPUs are free; if it stays out of reach, they count as leased to the rollout's end."""
        with contextlib.suppress(ray.exceptions.ActorUnavailableError):
            await retry_async(once(self._router, "lease_returned", replica.world_size))

    async def _start_all(self, candidates: list[ElasticReplica], weights: WeightSource) -> list[str]:
        """Return why replicas did not come up."""
        failures = await _all_ended(self._try_start(replica, weights) for replica in candidates)
        return [failure for failure in failures if failure]

    async def _try_start(self, replica: ElasticReplica, weights: WeightSource) -> str:
        try:
            await self._start_one(replica, weights)
        except Exception as error:  # noqa: BLE001  told to the router, recorded, and raised if nobody came up
            self._events.write("replica_failed", replica=replica.name, reason=str(error))
            logger.error("rlhfless: %s: %s", replica.name, error)
            if not replica.holds_lease:
                await self._tell_returned(replica)
            await retry_async(once(self._router, "give_up_expected", replica.world_size))
            return f"{replica.name}: {error}"
        return ""

    async def _start_one(self, fresh: ElasticReplica, weights: WeightSource) -> None:
        asked_s = time.time()
        replica, report = await self.parking.bring_up(fresh, weights, self._shared)
        self.replicas.append(replica)
        way = self._started() if replica is fresh else "wake"
        assert replica.lease is not None
        granted_s = replica.lease.granted_s
        start_s = time.time() - granted_s - report.seconds
        self.starts.append(ReplicaTimes(way, granted_s - asked_s, max(0.0, start_s), report.seconds))
        self._events.write(
            "pulled", lease=replica.lease.name, version=report.version, checksum=report.checksum, seconds=report.seconds
        )
        self.num_started += 1
        server = {replica.server_address: replica.server_handle}
        await retry_async(once(self._router, "add_servers", server, replica.world_size))
        self._events.write("replica_ready", lease=replica.lease.name)

    def _started(self) -> Way:
        self._num_servers -= 1
        return "warm_start" if self._num_servers >= 0 else "cold_start"

    def _new_replica(self, spec: ReplicaSpec) -> ElasticReplica:
        rollout = self._rollout.copy()
        with open_dict(rollout):
            rollout.tensor_model_parallel_size = spec.tp
        pool, servers = self._settings.pool, self._warm_servers
        return ElasticReplica(next(self._ranks), rollout, self._model, pool, servers, self._over)

    def release(self) -> None:
        """Take every replica out of the router, drain it, end it, and give its lease back.

        Raises:
            RlhflessError: A replica could not be ended or its lease not be returned; the others are released all
                the same.
        """
        self.give_up_waiting()
        failures: list[BaseException] = []
        if self._life is not None:
            with contextlib.suppress(ray.exceptions.RayActorError):
                asyncio.run(retry_async(self._router.stop_wanting.remote))
            try:
                self._life.result()  # a replica that has its GPUs and is on its way holds a lease
            except Exception as error:  # noqa: BLE001  raised below, when the replicas have been released
                failures.append(error)
            self._life = self._starting = None
        leaving, self.replicas = self.replicas, []
        outcomes = asyncio.run(self._release_all(leaving))
        failures += [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if failures:
            if isinstance(failures[0], RlhflessError):
                raise failures[0]
            raise ReplicaError(f"the fleet did not end in order: {failures[0]!r}") from failures[0]

    def look_after_standby(self) -> None:
        """Let go of what died while it waited, and make room for the next weights; call it between rollouts."""

        async def look() -> None:
            await self._warm_servers.forget_dead()
            await self.parking.end_dead()
            await self.parking.make_room()

        asyncio.run(look())

    def close(self) -> None:
        """Release every replica, and end the engines that are parked and the servers that wait for one."""
        self.parking.is_last = True
        with contextlib.ExitStack() as ends:
            ends.callback(self._warm_servers.close)
            ends.callback(self._thread.shutdown)
            ends.callback(lambda: asyncio.run(self.parking.close()))
            self.release()

    async def _release_all(self, leaving: list[ElasticReplica]) -> list[BaseException | None]:
        addresses = [replica.server_address for replica in leaving]
        leave = [retry_async(lambda: self._router.remove_servers.remote(addresses))] if leaving else []
        left = await asyncio.gather(*leave, return_exceptions=True)
        released = await asyncio.gather(*[self._release_one(replica) for replica in leaving], return_exceptions=True)
        return [*left, *released, *await self.parking.end_stuck()]

    async def _release_one(self, replica: ElasticReplica) -> None:
        lease = replica.lease  # a parked one may be woken on another lease at once
        self.releases_s.append(await self.parking.retire(replica))
        assert lease is not None
        self.gpu_s += lease.gpu_s


async def _all_ended(works: Iterable[Coroutine[Any, Any, _T] | asyncio.Task[_T]]) -> list[_T]:
    """Return what each returned. A failure is raised when all have ended: one that is cut off would leave a lease."""
    outcomes = await asyncio.gather(*works, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]


def _can_sleep(config: DictConfig) -> bool:
    """Return whether engines may sleep: on a CPU always, because they have nothing to free."""
    if OmegaConf.select(config, "trainer.device") == "cpu":
        logger.info("rlhfless: engines sleep between rollouts; on a CPU that frees nothing, it is accounting only")
        return True
    return bool(OmegaConf.select(config, "actor_rollout_ref.rollout.enable_sleep_mode", default=True))
