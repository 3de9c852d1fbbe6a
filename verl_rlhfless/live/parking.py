"""Parked replicas: engines that sleep without a lease between two rollouts, woken in place of a cold start.

Invariants: an engine wakes only on the devices that it slept on; one that can't is ended before another starts in its
place; a parked engine that died, or does not wake, costs a start and nothing else. The lot decides nothing by itself:
whether to park is :mod:`verl_rlhfless.policy.park`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
from collections import Counter, defaultdict

import ray

from verl_rlhfless.config import PoolConfig
from verl_rlhfless.errors import ReplicaError, RlhflessError
from verl_rlhfless.live.events import EventLog
from verl_rlhfless.live.lease import Lease
from verl_rlhfless.live.replica import ElasticReplica
from verl_rlhfless.live.replica_life import ReplicaState, WeightSource
from verl_rlhfless.live.same_devices import DeviceSearch, lease_devices
from verl_rlhfless.live.shared_lease import SharedLease, TrainerDevices
from verl_rlhfless.live.weights import PullReport
from verl_rlhfless.policy.park import ParkDecision, ParkView, decide_park, worth_waiting_s
from verl_rlhfless.types import DeviceKey, FleetDecision

logger = logging.getLogger(__name__)

_OTHERS_S = 1.0  # how long a replica whose devices nothing sleeps on waits for what the others of its fleet get
_VERSIONS_IN_PROGRESS = 2  # the next weight version on its way into the store, and what replicas load of it


class ParkingLot:
    """Keeps at most as many parked engines as the largest fleet of the run had replicas.

    Attributes:
        is_last: Set it when no further rollout will come: nothing is parked then.
    """

    def __init__(self, config: PoolConfig, events: EventLog, can_sleep: bool = True) -> None:
        self._config = config
        self._can_sleep = can_sleep
        self._events = events
        self._parked: list[ElasticReplica] = []  # the one that sleeps longest first
        self._stuck: list[ElasticReplica] = []  # did not come up and hold their lease: processes survived
        self._uses: Counter[int] = Counter()
        self._starts_s: dict[int, list[float]] = defaultdict(list)
        self._wakes_s: dict[int, list[float]] = defaultdict(list)
        self._relaunches_s: dict[int, list[float]] = defaultdict(list)
        self._searches: set[asyncio.Task[DeviceSearch]] = set()
        self._largest_fleet = 0
        self._version_bytes = 0
        self.is_last = False

    @property
    def parked(self) -> Counter[int]:
        """Tensor-parallel size -> engines that sleep now."""
        return Counter(replica.world_size for replica in self._parked)

    def parked_on(self, devices: TrainerDevices) -> Counter[int]:
        """Return, by tensor-parallel size, how many engines that sleep can wake together on these devices."""
        slept_on = defaultdict(list)
        for replica in self._parked:
            assert replica.lease is not None
            slept_on[replica.world_size].append(replica.lease.device_key())
        return Counter({tp: devices.num_together(keys) for tp, keys in slept_on.items()})

    @property
    def sizes_together(self) -> list[int]:
        """Tensor-parallel sizes of engines that can wake together, the one that sleeps shortest first."""
        sizes, taken = [], set[tuple[str, str]]()
        for replica in reversed(self._parked):
            assert replica.lease is not None
            devices = {(node_id, one) for node_id, ids in replica.lease.device_key() for one in ids}
            if taken.isdisjoint(devices):
                taken |= devices
                sizes.append(replica.world_size)
        return sizes

    def expect(self, decision: FleetDecision) -> None:
        """Note a fleet of the run: engines of its kinds may be needed again."""
        for tp, count in Counter(spec.tp for spec in decision.replicas).items():
            self._uses[tp] = max(self._uses[tp], count)
        self._largest_fleet = max(self._largest_fleet, len(decision.replicas))

    async def bring_up(
        self, fresh: ElasticReplica, weights: WeightSource, shared: TrainerDevices | None = None
    ) -> tuple[ElasticReplica, PullReport]:
        """Return a replica that serves, a woken one if its devices can be had in time, else ``fresh``, started.

        Args:
            fresh: Started if no parked engine can serve for it.
            weights: What it loads.
            shared: Where it runs without a lease of its own; ``None`` = it leases.

        Raises:
            LeaseTimeoutError: No GPUs in time.
            ReplicaError: The engine did not start.
        """
        if shared is not None:
            return await self._bring_up_beside_trainer(fresh, weights, shared)
        lease, gave_way = None, False
        if self._alike(fresh):
            lease = fresh.lease = (await self._searched(fresh)).lease
            parked = self._bound_to(lease.device_key(), fresh)
            if parked is None:
                await self._others_searched()
                gave_way = await self._give_way(fresh, lease)
            else:
                report = await self._wake(parked, lease, weights)
                if report is not None:
                    return parked, report
                lease = fresh.lease = None  # returned with the engine that did not wake
        report = await self._start(fresh, weights, lease)
        (self._relaunches_s if gave_way else self._starts_s)[fresh.world_size].append(fresh.engine_s)
        return fresh, report

    async def _bring_up_beside_trainer(
        self, fresh: ElasticReplica, weights: WeightSource, devices: TrainerDevices
    ) -> tuple[ElasticReplica, PullReport]:
        wanted = [parked.lease.device_key() for parked in self._alike(fresh) if parked.lease is not None]
        lease = fresh.lease = devices.take(fresh.name, fresh.world_size, wanted)
        parked = self._bound_to(lease.device_key(), fresh)
        if parked is not None:
            report = await self._wake(parked, lease, weights)
            if report is not None:
                return parked, report
            lease = fresh.lease = devices.take(fresh.name, fresh.world_size)
        report = await self._start(fresh, weights, lease)
        self._starts_s[fresh.world_size].append(fresh.engine_s)
        return fresh, report

    async def _start(
        self, fresh: ElasticReplica, weights: WeightSource, lease: Lease | SharedLease | None
    ) -> PullReport:
        try:
            report = await fresh.start(weights, lease)
        except BaseException:
            self._keep_if_stuck(fresh)
            raise
        self._version_bytes = report.num_bytes
        return report

    def _keep_if_stuck(self, replica: ElasticReplica) -> bool:
        """Keep a replica that did not come up for a second try to end it, if it holds its lease; return whether."""
        if replica.holds_lease:
            self._stuck.append(replica)
        return replica.holds_lease

    async def end_stuck(self) -> list[BaseException | None]:
        """End what survived when it did not come up, and return their leases; a failure for each that survives again.

        Call it when the rollout is over.
        """
        stuck, self._stuck = self._stuck, []
        return await asyncio.gather(*[replica.stop() for replica in stuck], return_exceptions=True)

    async def retire(self, replica: ElasticReplica) -> float:
        """Park a replica that has left the router, or end it; return how long that took once it was drained [s].

        Raises:
            ReplicaError: A process survived; the lease is kept.
            LeaseReleaseError: Ray did not confirm the release in time.
        """
        decision = await self._decide(replica)
        if decision.park:
            try:
                seconds = await self._park(replica, decision)
            except ReplicaError as error:
                decision = ParkDecision(False, str(error))
            else:
                await self._end_surplus()
                return seconds
        report = await replica.release()
        assert replica.lease is not None
        self._events.write(
            "replica_released",
            lease=replica.lease.name,
            state=replica.state.value,
            reason=decision.reason,
            **dataclasses.asdict(report),
        )
        return report.engine_s + report.lease_s

    async def end_dead(self) -> None:
        """End parked engines that died in their sleep, or do not answer: no plan counts with them any more."""
        for replica in list(self._parked):
            if await replica.is_lost():
                await self._end(replica, "died in its sleep")

    async def make_room(self) -> None:
        """End parked engines, the one that sleeps longest first, while their host has no room for the next weights."""
        for replica in list(self._parked):
            available = await replica.host_available_bytes()
            if available < self._reserved_bytes:
                await self._end(replica, f"the host has {available} bytes left for the next weight version")

    async def close(self) -> None:
        """End every parked engine.

        Raises:
            ReplicaError: A process survived; the others are ended all the same.
        """
        leaving = list(self._parked)
        ended = await asyncio.gather(*[self._end(replica, "closed") for replica in leaving], return_exceptions=True)
        failures = [outcome for outcome in ended if isinstance(outcome, BaseException)]
        if failures:
            raise failures[0]

    # ---- wake

    def _alike(self, fresh: ElasticReplica) -> list[ElasticReplica]:
        return [parked for parked in self._parked if parked.can_serve_for(fresh)]

    async def _searched(self, fresh: ElasticReplica) -> DeviceSearch:
        search = asyncio.create_task(asyncio.to_thread(self._search, fresh))
        self._searches.add(search)
        search.add_done_callback(self._searches.discard)
        return await search

    async def _others_searched(self) -> None:
        """Wait a little while others search: an engine that one of them may still wake must not give way."""
        if self._searches:
            await asyncio.wait(self._searches, timeout=_OTHERS_S)

    def _search(self, fresh: ElasticReplica) -> DeviceSearch:
        """Lease devices for ``fresh``, those of a parked engine if they can be had; runs in a thread."""
        number = itertools.count(1)

        def acquire(timeout_s: float) -> Lease:
            return fresh.acquire(f"{fresh.name}-{next(number)}", timeout_s)

        def release(lease: Lease) -> None:
            lease.release(self._config.release_timeout_s)

        def wanted() -> set[DeviceKey]:
            return {parked.lease.device_key() for parked in self._alike(fresh) if parked.lease is not None}

        wait_s = worth_waiting_s(self._view(fresh.world_size, host_available_bytes=0))
        return lease_devices(acquire, release, wanted, self._config.grant_timeout_s, wait_s)

    def _bound_to(self, key: DeviceKey, fresh: ElasticReplica) -> ElasticReplica | None:
        """Return the parked engine on these devices that can serve for ``fresh``."""
        found = [one for one in self._alike(fresh) if one.lease is not None and one.lease.device_key() == key]
        return found[0] if found else None

    async def _wake(
        self, parked: ElasticReplica, lease: Lease | SharedLease, weights: WeightSource
    ) -> PullReport | None:
        """Return what a parked engine loaded, ``None`` if it did not wake and the lease is returned."""
        assert parked.lease is not None
        slept_as = parked.lease.name
        self._parked.remove(parked)
        try:
            report = await parked.wake(weights, lease)
        except (RlhflessError, ray.exceptions.RayError) as error:
            logger.warning("rlhfless: parked replica %s did not wake: %s", parked.name, error)
            self._events.write("parked_ended", parked_as=slept_as, reason=f"did not wake: {error}")
            if self._keep_if_stuck(parked):
                raise  # nothing else can start on these GPUs
            return None
        self._wakes_s[parked.world_size].append(parked.engine_s)
        self._events.write("replica_woken", lease=lease.name, parked_as=slept_as, seconds=parked.engine_s)
        return report

    async def _give_way(self, fresh: ElasticReplica, lease: Lease) -> bool:
        """End a parked engine whose devices did not come, so that ``fresh`` starts in its place; return whether."""
        leaving = self._alike(fresh)
        if not leaving:
            return False
        try:
            await self._end(leaving[0], f"lease {lease.name} has other devices")
        except BaseException:
            await asyncio.to_thread(lease.release, self._config.release_timeout_s)
            raise
        return True

    # ---- park

    async def _decide(self, replica: ElasticReplica) -> ParkDecision:
        if await replica.is_lost():
            return ParkDecision(False, "its engine is dead")
        view = self._view(replica.world_size, await replica.host_available_bytes())
        return decide_park(self._config.park, view)

    def _view(self, tp: int, host_available_bytes: int) -> ParkView:
        return ParkView(
            can_sleep=self._can_sleep,
            uses_ahead=0 if self.is_last else self._uses[tp],
            num_parked=self.parked[tp],
            starts_s=tuple(self._starts_s[tp]),
            wakes_s=tuple(self._wakes_s[tp]),
            relaunches_s=tuple(self._relaunches_s[tp]),
            same_device_wait_s=self._config.same_device_wait_s,
            host_available_bytes=host_available_bytes,
            host_reserved_bytes=self._reserved_bytes,
        )

    @property
    def _reserved_bytes(self) -> int:
        return _VERSIONS_IN_PROGRESS * self._version_bytes

    async def _park(self, replica: ElasticReplica, decision: ParkDecision) -> float:
        report = await replica.park()
        assert replica.lease is not None and replica.state is ReplicaState.PARKED
        self._parked.append(replica)
        self._events.write(
            "replica_parked",
            lease=replica.lease.name,
            num_gpus=replica.world_size,
            reason=decision.reason,
            **dataclasses.asdict(report),
        )
        return report.sleep_s + report.lease_s

    async def _end_surplus(self) -> None:
        if len(self._parked) > self._largest_fleet:
            await self._end(self._parked[0], "more are parked than the largest fleet needs")

    async def _end(self, replica: ElasticReplica, reason: str) -> None:
        self._parked.remove(replica)
        assert replica.lease is not None
        self._events.write("parked_ended", parked_as=replica.lease.name, reason=reason)
        await replica.stop()
