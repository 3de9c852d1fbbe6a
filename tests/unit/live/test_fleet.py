"""A step goes on with the replicas that come up, and whatever came up is released, whoever fails."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf
from ray.exceptions import ActorUnavailableError

from verl_rlhfless.config import parse_config
from verl_rlhfless.errors import LeaseTimeoutError, ReplicaError
from verl_rlhfless.live import fleet as fleet_module
from verl_rlhfless.live import retry as retry_module
from verl_rlhfless.live.events import EventLog
from verl_rlhfless.live.fleet import Fleet
from verl_rlhfless.live.orders import EndReplica, Order, ReclaimReplica, StartReplica
from verl_rlhfless.live.replica_life import ReleaseReport, WeightSource
from verl_rlhfless.live.shared_lease import SharedLease, TrainerDevices
from verl_rlhfless.policy.learnt import ReplicaTimes
from verl_rlhfless.policy.schedule import scheduled_fleet
from verl_rlhfless.types import FleetDecision, LeasedNode, ReplicaSpec

_WEIGHTS = WeightSource("store", version=7, timeout_s=1.0)


class FakeReplica:
    """Fails where its rank says so, and remembers what was asked of it."""

    start_fails: frozenset[int] = frozenset()
    release_fails: frozenset[int] = frozenset()
    survives: frozenset[int] = frozenset()
    lacks_gpus: frozenset[int] = frozenset()
    may_start: threading.Event | None = None

    def __init__(self, rank: int, rollout: Any, *others: Any) -> None:
        self.rank = rank
        *_, self.over = others
        self.name = f"r{rank}"
        self.world_size = rollout.tensor_model_parallel_size
        self.server_address, self.server_handle = f"host:{rank}", f"handle-{rank}"
        self.lease: Any = SimpleNamespace(
            name=f"rlhfless/replica/r{rank}", granted_s=10.0, gpu_s=3.0 * self.world_size, released_s=None
        )
        self.state = SimpleNamespace(value="released")
        self.is_released = self.is_dead = False
        self.engine_s = 1.0

    @property
    def holds_lease(self) -> bool:
        return self.lease is not None and self.lease.released_s is None

    async def is_lost(self) -> bool:
        return self.is_dead

    async def stop(self) -> None:
        if self.rank in self.survives:
            raise ReplicaError(f"process of engine {self.rank} survived")
        self.is_released, self.lease.released_s = True, 20.0

    async def host_available_bytes(self) -> int:
        return 0

    def can_serve_for(self, other: FakeReplica) -> bool:
        return True

    async def start(self, weights: WeightSource, lease: Any) -> Any:
        self.lease = lease or self.lease
        if self.rank in self.lacks_gpus:
            self.lease = None
            is_over = await asyncio.to_thread(self.over.wait, 10)
            raise LeaseTimeoutError("the rollout is over" if is_over else "not granted")
        if self.may_start is not None:
            await asyncio.to_thread(self.may_start.wait, 10)
        if self.rank in self.start_fails:
            await self.stop()
            raise ReplicaError(f"engine {self.rank} broke")
        return SimpleNamespace(version=weights.version, checksum="c", seconds=0.0, num_bytes=1)

    async def release(self) -> ReleaseReport:
        self.is_released = True
        if self.rank in self.release_fails:
            raise ReplicaError(f"engine {self.rank} survived")
        if isinstance(self.lease, SharedLease):
            self.lease.release()
        return ReleaseReport(True, 0.0, 0.0, 0.0)


class FakeRouter:
    """verl's router as far as a fleet uses it."""

    def __init__(self) -> None:
        self.servers: dict[str, Any] = {}
        self.expected: list[int] = []
        self.tps: list[int] = []
        self.returned: list[int] = []
        self.given_up = 0
        self.lease_returned = SimpleNamespace(remote=self._returned)
        self.expect = SimpleNamespace(remote=self._expect)
        self.give_up_expected = SimpleNamespace(remote=self._give_up)
        self.add_servers = SimpleNamespace(remote=self._add)
        self.remove_servers = SimpleNamespace(remote=self._remove)
        self.once = SimpleNamespace(remote=self._once)
        self.wanted = SimpleNamespace(remote=self._wanted)
        self.stop_wanting = SimpleNamespace(remote=self._stop_wanting)
        self.wishes: queue.Queue[Order | None] = queue.Queue()
        self.orders: list[Order | None] = []
        self.num_out_of_reach = 0

    def _reached(self) -> None:
        if self.num_out_of_reach:
            self.num_out_of_reach -= 1
            raise ActorUnavailableError("a disturbed network", b"0" * 16)

    async def _once(self, call: str, method: str, *args: Any) -> None:
        await getattr(self, method).remote(*args)

    async def _wanted(self, number: int) -> Order | None:
        if number == len(self.orders):
            self.orders.append(await asyncio.to_thread(self.wishes.get))
        self._reached()
        return self.orders[number]

    async def _stop_wanting(self) -> None:
        self.wishes.put(None)

    def _expect(self, tps: list[int]) -> None:
        self.expected = list(tps)
        self.orders.clear()

    async def _give_up(self, tp: int) -> None:
        self.given_up += tp

    async def _returned(self, tp: int) -> None:
        self.returned.append(tp)

    async def _add(self, servers: dict[str, Any], tp: int) -> None:
        self.servers.update(servers)
        self.tps.append(tp)

    async def _remove(self, addresses: list[str]) -> None:
        for address in addresses:
            self.servers.pop(address, None)


class FakeWarmPool:
    """Notes what it was asked for."""

    def __init__(self) -> None:
        self.num_fills = 0
        self.num_waiting = 1
        self.is_closed = False
        self.waited_for: list[int] = []

    def fill(self) -> None:
        self.num_fills += 1

    async def wait_warm(self, count: int, timeout_s: float) -> None:
        self.waited_for.append(count)

    async def forget_dead(self) -> None:
        self.num_waiting = 0

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def warm_servers() -> FakeWarmPool:
    return FakeWarmPool()


@pytest.fixture
def router() -> FakeRouter:
    return FakeRouter()


@pytest.fixture
def fleet(router: FakeRouter, warm_servers: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """A fleet that ends with its test: its thread waits for wishes, and would keep the whole test run alive."""
    monkeypatch.setattr(fleet_module.ray, "get", lambda value, **_: value)
    monkeypatch.setattr(retry_module, "_WAITS_S", (0.0, 0.0))
    monkeypatch.setattr(fleet_module, "ElasticReplica", type("Replica", (FakeReplica,), {}))
    run = OmegaConf.create({"actor_rollout_ref": {"rollout": {"tensor_model_parallel_size": 1}, "model": {}}})
    fleet = Fleet(run, parse_config(None), router, EventLog(None), warm_servers)
    yield fleet
    with contextlib.suppress(ReplicaError):  # of a release that a test made fail
        fleet.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rlhfless-fleet")]


def begin(fleet: Fleet, decision: FleetDecision, *, imports_first: bool = False, shared: Any = None) -> None:
    fleet.expect(decision)
    fleet.start(decision, _WEIGHTS, imports_first=imports_first, shared=shared)


def started(fleet: Fleet, *decision: Any, tp: int = 1) -> None:
    begin(fleet, scheduled_fleet(*decision, tp=tp))
    fleet.wait_started()


def until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_replicas_serve_until_they_are_released(fleet: Fleet, router: FakeRouter) -> None:
    started(fleet, 1, (2,), tp=2)
    assert fleet.max_gpus == 4 and router.expected == [2, 2]
    assert router.servers == {"host:0": "handle-0", "host:1": "handle-1"}
    replicas = list(fleet.replicas)
    fleet.release()
    assert router.servers == {} and all(replica.is_released for replica in replicas)
    fleet.release()  # nothing left to do


def test_ranks_are_never_used_twice(fleet: Fleet, router: FakeRouter) -> None:
    for step in (1, 2):
        started(fleet, step, (1,))
        assert list(router.servers) == [f"host:{step - 1}"]
        fleet.release()


def test_step_goes_on_with_the_replicas_that_came_up(fleet: Fleet, router: FakeRouter) -> None:
    fleet_module.ElasticReplica.start_fails = frozenset({0})
    started(fleet, 1, (2,))
    assert list(router.servers) == ["host:1"]
    assert router.given_up == 1, "the router does not wait for the one that failed"


def test_nothing_is_leased_before_servers_have_done_their_imports(fleet: Fleet, warm_servers: FakeWarmPool) -> None:
    imported = threading.Event()

    async def wait_warm(count: int, timeout_s: float) -> None:
        warm_servers.waited_for.append(count)
        await asyncio.to_thread(imported.wait, 10)

    warm_servers.wait_warm = wait_warm  # type: ignore[method-assign]
    begin(fleet, scheduled_fleet(1, (2,), tp=1), imports_first=True)
    until(lambda: warm_servers.waited_for == [2])
    assert not fleet.starts
    imported.set()
    fleet.wait_started()
    assert len(fleet.starts) == 2


def test_imports_are_not_waited_for_where_leases_must_not_come_late(fleet: Fleet, warm_servers: FakeWarmPool) -> None:
    started(fleet, 1, (2,))
    assert warm_servers.waited_for == [0]


def test_a_failed_start_gives_its_gpus_back_in_the_routers_account(fleet: Fleet, router: FakeRouter) -> None:
    fleet_module.ElasticReplica.start_fails = frozenset({0})
    started(fleet, 1, (2,))
    assert router.returned == [1]


def test_gpus_of_a_failed_start_whose_processes_survive_are_not_free_until_those_are_ended(
    fleet: Fleet, router: FakeRouter
) -> None:
    fleet_module.ElasticReplica.start_fails = fleet_module.ElasticReplica.survives = frozenset({0})
    started(fleet, 1, (2,))
    assert router.returned == [] and router.given_up == 1
    stuck = fleet._asked_for[0]
    fleet_module.ElasticReplica.survives = frozenset()
    fleet.release()
    assert stuck.is_released


def test_processes_of_a_failed_start_that_survive_the_rollout_too_are_an_error(fleet: Fleet) -> None:
    fleet_module.ElasticReplica.start_fails = fleet_module.ElasticReplica.survives = frozenset({0})
    started(fleet, 1, (2,))
    serving = fleet.replicas[0]
    with pytest.raises(ReplicaError, match="process of engine 0 survived"):
        fleet.release()
    assert serving.is_released


def test_replicas_start_while_the_caller_submits_its_prompts(fleet: Fleet, router: FakeRouter) -> None:
    fleet_module.ElasticReplica.may_start = threading.Event()
    begin(fleet, scheduled_fleet(1, (1,), tp=1))
    assert router.expected == [1] and not router.servers
    fleet_module.ElasticReplica.may_start.set()
    fleet.wait_started()
    assert list(router.servers) == ["host:0"]


def test_release_waits_for_a_replica_that_is_on_its_way(fleet: Fleet) -> None:
    fleet_module.ElasticReplica.may_start = threading.Event()
    begin(fleet, scheduled_fleet(1, (1,), tp=1))
    threading.Timer(0.05, fleet_module.ElasticReplica.may_start.set).start()
    fleet.release()
    assert not fleet.replicas, "its lease is returned too"


def test_a_replica_without_gpus_holds_up_no_step_whose_rollout_is_over(
    fleet: Fleet, router: FakeRouter, caplog: pytest.LogCaptureFixture
) -> None:
    fleet_module.ElasticReplica.lacks_gpus = frozenset({1, 2})
    begin(fleet, scheduled_fleet(1, (2,), tp=1))
    router.wishes.put(StartReplica(1))
    until(lambda: "host:0" in router.servers)
    fleet.give_up_waiting()
    fleet.wait_started()
    fleet.release()
    assert fleet.num_started == 1 and router.given_up == 2
    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert sorted(told) == ["rlhfless: r1: the rollout is over", "rlhfless: r2: the rollout is over"]


def test_a_release_ends_the_wait_for_gpus_and_the_next_rollout_waits_again(fleet: Fleet) -> None:
    fleet_module.ElasticReplica.lacks_gpus = frozenset({1, 3})
    for _ in range(2):
        begin(fleet, scheduled_fleet(1, (2,), tp=1))
        waiting = fleet._asked_for[1].over
        assert not waiting.is_set()
        until(lambda: fleet.num_started == 1)
        fleet.release()
        assert waiting.is_set() and not fleet.replicas


def test_no_replica_at_all_is_an_error_with_every_reason(fleet: Fleet) -> None:
    fleet_module.ElasticReplica.start_fails = frozenset({0, 1})
    with pytest.raises(ReplicaError, match=r"no rollout replica came up.*engine 0 broke.*engine 1 broke"):
        started(fleet, 1, (2,))


def test_one_failed_release_does_not_keep_the_others(fleet: Fleet) -> None:
    fleet_module.ElasticReplica.release_fails = frozenset({0})
    started(fleet, 1, (2,))
    replicas = list(fleet.replicas)
    with pytest.raises(ReplicaError, match="engine 0 survived"):
        fleet.release()
    assert all(replica.is_released for replica in replicas) and not fleet.replicas


def test_servers_are_warmed_up_while_the_trainer_is_still_being_built(fleet: Fleet, warm_servers: FakeWarmPool) -> None:
    assert warm_servers.num_fills == 1


def test_a_plan_does_not_count_with_what_died_between_two_rollouts(fleet: Fleet) -> None:
    assert fleet.standby.num_servers == 1
    fleet.look_after_standby()
    assert fleet.standby.num_servers == 0


def test_servers_in_waiting_end_with_the_fleet_even_if_a_replica_does_not(
    fleet: Fleet, warm_servers: FakeWarmPool
) -> None:
    fleet_module.ElasticReplica.release_fails = frozenset({0})
    started(fleet, 1, (1,))
    with pytest.raises(ReplicaError, match="engine 0 survived"):
        fleet.close()
    assert warm_servers.is_closed


def test_a_lost_replica_gives_its_lease_back_before_the_one_that_replaces_it_starts(
    fleet: Fleet, router: FakeRouter
) -> None:
    started(fleet, 1, (2,))
    dead, healthy = fleet.replicas
    dead.is_dead = True
    router.wishes.put(ReclaimReplica(dead.server_address))
    router.wishes.put(StartReplica(1))
    until(lambda: "host:2" in router.servers)
    assert dead.is_released and not healthy.is_released
    assert router.returned == [1], "its GPUs are free again"
    fleet.release()
    assert healthy.is_released and not fleet.replicas


def test_a_lost_replica_that_can_not_be_released_yet_is_released_later(fleet: Fleet, router: FakeRouter) -> None:
    fleet_module.ElasticReplica.release_fails = frozenset({0})
    started(fleet, 1, (2,))
    dead = fleet.replicas[0]
    dead.is_dead = True
    router.wishes.put(ReclaimReplica(dead.server_address))
    router.wishes.put(StartReplica(1))
    until(lambda: "host:2" in router.servers)
    assert router.returned == [], "its GPUs are not free"
    dead.is_released, fleet_module.ElasticReplica.release_fails = False, frozenset()
    fleet.release()
    assert dead.is_released


def test_orders_are_taken_again_from_a_router_that_was_out_of_reach(fleet: Fleet, router: FakeRouter) -> None:
    started(fleet, 1, (1,))
    router.num_out_of_reach = 2
    router.wishes.put(StartReplica(1))
    until(lambda: "host:1" in router.servers)
    router.wishes.put(EndReplica("host:0"))
    until(lambda: router.returned == [1])
    assert [type(order) for order in router.orders] == [StartReplica, EndReplica], "each was carried out once"


def test_a_router_that_stays_out_of_reach_is_not_asked_for_ever(fleet: Fleet, router: FakeRouter) -> None:
    started(fleet, 1, (1,))
    (serving,) = fleet.replicas
    router.num_out_of_reach = 10**9
    router.wishes.put(StartReplica(1))
    assert fleet._life is not None
    fleet._life.result(timeout=10)
    fleet.release()
    assert serving.is_released


def test_a_return_that_the_router_does_not_hear_of_ends_no_run(fleet: Fleet, router: FakeRouter) -> None:
    async def is_out_of_reach(_: int) -> None:
        asked.set()
        raise ActorUnavailableError("a disturbed network", b"0" * 16)

    asked = threading.Event()
    router.lease_returned = SimpleNamespace(remote=is_out_of_reach)
    started(fleet, 1, (2,))
    router.wishes.put(EndReplica("host:0"))
    assert asked.wait(10)
    fleet.release()
    assert not fleet.replicas


def test_a_router_that_is_gone_during_the_start_is_an_error_and_no_endless_wait(
    fleet: Fleet, router: FakeRouter
) -> None:
    async def is_gone(_: int) -> None:
        raise fleet_module.ray.exceptions.RayActorError

    router.give_up_expected = SimpleNamespace(remote=is_gone)
    fleet_module.ElasticReplica.start_fails = frozenset({0})
    begin(fleet, scheduled_fleet(1, (2,), tp=1))
    assert fleet._starting is not None
    with pytest.raises(fleet_module.ray.exceptions.RayActorError):
        fleet._starting.result(timeout=10)
    fleet.release()
    assert not fleet.replicas


def test_a_router_that_is_gone_cuts_off_no_replica_on_its_way(fleet: Fleet, router: FakeRouter) -> None:
    async def is_gone(_: int) -> None:
        told.set()
        raise fleet_module.ray.exceptions.RayActorError

    told = threading.Event()
    router.give_up_expected = SimpleNamespace(remote=is_gone)
    fleet_module.ElasticReplica.start_fails = frozenset({0})
    fleet_module.ElasticReplica.may_start = threading.Event()
    begin(fleet, scheduled_fleet(1, (2,), tp=1))
    on_its_way = fleet._asked_for[1]
    fleet_module.ElasticReplica.may_start.set()
    assert told.wait(10)
    fleet.release()
    assert on_its_way.is_released, "it held a lease"


def test_a_fleet_that_can_take_no_more_orders_releases_its_replicas_and_says_why(
    fleet: Fleet, router: FakeRouter
) -> None:
    started(fleet, 1, (2,))
    replicas = list(fleet.replicas)
    router.wishes.put(object())  # type: ignore[arg-type]
    with pytest.raises(ReplicaError, match="AttributeError"):
        fleet.release()
    assert all(replica.is_released for replica in replicas)


def test_a_replica_whose_release_failed_for_any_reason_is_released_at_the_end(
    fleet: Fleet, router: FakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(replica: FakeReplica) -> ReleaseReport:
        tried.set()
        raise OSError("connection reset")

    tried = threading.Event()
    started(fleet, 1, (2,))
    ended = fleet.replicas[0]
    with monkeypatch.context() as patch:
        patch.setattr(fleet_module.ElasticReplica, "release", fails)
        router.wishes.put(EndReplica(ended.server_address))
        assert tried.wait(10)
        until(lambda: ended in fleet.replicas)
    fleet.release()
    assert ended.is_released and router.returned == []


def test_a_replica_that_the_router_ends_gives_its_lease_back_while_the_others_serve(
    fleet: Fleet, router: FakeRouter
) -> None:
    started(fleet, 1, (2,))
    ended, serving = fleet.replicas
    router.wishes.put(EndReplica(ended.server_address))
    until(lambda: router.returned == [1])
    assert ended.is_released and not serving.is_released
    fleet.release()
    assert serving.is_released and fleet.num_started == 2
    assert fleet.gpu_s == 2 * 3.0


def test_a_replica_may_end_while_another_one_still_starts(fleet: Fleet, router: FakeRouter) -> None:
    started(fleet, 1, (1,))
    (serving,) = fleet.replicas
    fleet_module.ElasticReplica.may_start = threading.Event()
    router.wishes.put(StartReplica(1))
    router.wishes.put(EndReplica(serving.server_address))
    until(lambda: serving.is_released)
    fleet_module.ElasticReplica.may_start.set()
    fleet.release()
    assert router.returned == [1]


def test_a_replica_that_cannot_be_ended_fails_the_release_and_not_the_rollout(fleet: Fleet, router: FakeRouter) -> None:
    fleet_module.ElasticReplica.release_fails = frozenset({0})
    started(fleet, 1, (2,))
    router.wishes.put(EndReplica("host:0"))
    with pytest.raises(ReplicaError, match="engine 0 survived"):
        fleet.release()
    assert router.returned == [], "its GPUs are not free"


def test_replicas_of_different_sizes_start_and_the_router_knows_each(fleet: Fleet, router: FakeRouter) -> None:
    begin(fleet, FleetDecision(1, (ReplicaSpec(2), ReplicaSpec(1), ReplicaSpec(1)), "mixed"))
    fleet.wait_started()
    assert router.expected == [2, 1, 1] and sorted(router.tps) == [1, 1, 2]
    assert sorted(replica.world_size for replica in fleet.replicas) == [1, 1, 2] and fleet.max_gpus == 4
    fleet.release()


def test_starts_on_a_server_in_waiting_are_told_from_cold_ones(fleet: Fleet) -> None:
    started(fleet, 1, (2,))
    assert sorted(start.way for start in fleet.starts) == ["cold_start", "warm_start"], "one server was in waiting"
    fleet.release()
    assert len(fleet.releases_s) == 2
    started(fleet, 2, (1,))
    assert len(fleet.starts) == 1 and not fleet.releases_s, "each step has its own"


def test_a_start_is_split_into_the_grant_the_engine_and_its_weights(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now_s=100.0)

    async def start(replica: FakeReplica, weights: WeightSource, lease: Any) -> Any:
        replica.lease.granted_s = clock.now_s + 4.0
        clock.now_s += 4.0 + 7.0 + 2.0
        return SimpleNamespace(version=7, checksum="c", seconds=2.0, num_bytes=1)

    monkeypatch.setattr(fleet_module.ElasticReplica, "start", start)
    monkeypatch.setattr(fleet_module, "time", SimpleNamespace(time=lambda: clock.now_s))
    started(fleet, 1, (1,))
    assert fleet.starts == [ReplicaTimes("warm_start", grant_s=4.0, start_s=7.0, load_s=2.0)]


def test_at_the_end_of_a_run_no_engine_is_put_to_sleep(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    async def plenty(replica: FakeReplica) -> int:
        return 2**40

    async def park(replica: FakeReplica) -> Any:
        raise AssertionError("nobody will wake it")

    monkeypatch.setattr(fleet_module.ElasticReplica, "host_available_bytes", plenty)
    monkeypatch.setattr(fleet_module.ElasticReplica, "park", park, raising=False)
    started(fleet, 1, (1,))
    (replica,) = fleet.replicas
    fleet.close()
    assert replica.is_released


def test_replicas_beside_the_trainer_lease_nothing_and_a_lost_one_is_replaced_on_its_devices(
    fleet: Fleet, router: FakeRouter
) -> None:
    devices = TrainerDevices("rlhfless/trainer", (LeasedNode("node", "10.0.0.1", ("0", "1")),))
    begin(fleet, scheduled_fleet(1, (2,), tp=1), shared=devices)
    fleet.wait_started()
    assert fleet.max_gpus == 0 and sorted(router.servers) == ["host:0", "host:1"]
    dead, healthy = fleet.replicas
    dead.is_dead = True
    router.wishes.put(ReclaimReplica(dead.server_address))
    router.wishes.put(StartReplica(1))
    until(lambda: "host:2" in router.servers)
    assert [one.lease.device_key() for one in fleet.replicas] == [healthy.lease.device_key(), dead.lease.device_key()]
    fleet.release()
    assert fleet.gpu_s == 0 and len(fleet.starts) == 3
    assert devices.take("next", 2).nodes[0].device_ids == ("0", "1")


def test_the_next_rollout_leases_again(fleet: Fleet) -> None:
    devices = TrainerDevices("rlhfless/trainer", (LeasedNode("node", "10.0.0.1", ("0",)),))
    begin(fleet, scheduled_fleet(1, (1,), tp=1), shared=devices)
    fleet.release()
    started(fleet, 2, (1,))
    assert fleet.max_gpus == 1 and not isinstance(fleet.replicas[0].lease, SharedLease)
