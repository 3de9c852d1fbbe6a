"""Parked engines wake on their own devices only, are never more than a fleet, and their loss costs a start."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from verl_rlhfless.config import PoolConfig
from verl_rlhfless.errors import LeaseImpossibleError, ReplicaError
from verl_rlhfless.live.events import EventLog
from verl_rlhfless.live.parked_memory import ParkedMemory
from verl_rlhfless.live.parking import ParkingLot
from verl_rlhfless.live.replica_life import ParkReport, ReleaseReport, ReplicaState, WeightSource
from verl_rlhfless.live.shared_lease import TrainerDevices
from verl_rlhfless.types import FleetDecision, LeasedNode, ReplicaSpec

WEIGHTS = WeightSource("store", version=7, timeout_s=1.0)
MIB = 2**20


class Lease:
    held: list[Lease]
    names: set[str]

    def __init__(self, name: str, devices: str) -> None:
        assert name not in self.names, "a lease's name is used once"
        self.names.add(name)
        self.name, self.devices = f"rlhfless/replica/{name}", devices
        self.held.append(self)

    @property
    def released_s(self) -> float | None:
        return None if self in self.held else 20.0

    def device_key(self) -> Any:
        return (("node", frozenset(self.devices)),)

    def release(self, timeout_s: float = 0) -> None:
        if self in self.held:
            self.held.remove(self)


class Replica:
    """A replica whose engine is a fact and not a process."""

    free = "abcd"
    host_bytes = 8 << 30
    engines: set[Replica]
    park_fails = wake_fails = False

    def __init__(self, rank: int, tp: int = 1, config: str = "") -> None:
        self.rank, self.world_size = rank, tp
        self.name = f"r{rank}"
        self.config = (config, tp)
        self.lease: Any = None
        self.state = ReplicaState.REQUESTED
        self.engine_s = 0.0
        self.is_dead = self.survives = False
        self.versions: list[int] = []

    @property
    def holds_lease(self) -> bool:
        return self.lease is not None and self.lease.released_s is None

    def can_serve_for(self, other: Replica) -> bool:
        return self.config == other.config

    def acquire(self, name: str, timeout_s: float) -> Lease:
        taken = "".join(lease.devices for lease in Lease.held)
        return Lease(name, "".join(sorted(set(self.free) - set(taken)))[: self.world_size])

    async def start(self, weights: WeightSource, lease: Lease | None = None) -> Any:
        self.lease = lease or self.acquire(self.name, 1.0)
        self.engines.add(self)
        return self._loaded(weights, 1.0)

    async def wake(self, weights: WeightSource, lease: Lease) -> Any:
        assert self.state is ReplicaState.PARKED and lease.device_key() == self.lease.device_key()
        self.lease = lease
        if self.wake_fails or self.is_dead:
            await self.stop()
            raise ReplicaError("does not wake")
        return self._loaded(weights, 0.1)

    def _loaded(self, weights: WeightSource, engine_s: float) -> Any:
        self.engine_s, self.state = engine_s, ReplicaState.READY
        self.versions.append(weights.version)
        return SimpleNamespace(version=weights.version, checksum="c", seconds=0.0, num_bytes=MIB)

    async def is_lost(self) -> bool:
        return self.is_dead

    async def host_available_bytes(self) -> int:
        return self.host_bytes

    async def park(self) -> ParkReport:
        if self.park_fails:
            raise ReplicaError("holds too much")
        self.lease.release()
        self.state = ReplicaState.PARKED
        return ParkReport(True, 0.0, 0.1, 0.0, ParkedMemory(5 * MIB, 40 * MIB, 7 * MIB, self.host_bytes))

    async def release(self) -> ReleaseReport:
        await self.stop()
        return ReleaseReport(True, 0.0, 0.2, 0.0)

    async def stop(self) -> None:
        if self.survives:
            raise ReplicaError("a process survived")
        self.engines.discard(self)
        self.lease.release()
        self.state = ReplicaState.RELEASED


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lease, "held", [], raising=False)
    monkeypatch.setattr(Lease, "names", set(), raising=False)
    monkeypatch.setattr(Replica, "engines", set(), raising=False)


class Run:
    """A lot in a run of steps."""

    def __init__(self, folder: Path, **pool: Any) -> None:
        self.folder = folder
        self.lot = ParkingLot(PoolConfig(name="elastic", same_device_wait_s=0.1, **pool), EventLog(folder))
        self.num_ranks = 0

    def start(self, *tps: int, config: str = "", shared: TrainerDevices | None = None) -> list[Any]:
        self.lot.expect(FleetDecision(1, tuple(ReplicaSpec(tp) for tp in tps), "test"))
        fresh = []
        for tp in tps:
            fresh.append(Replica(self.num_ranks, tp, config))
            self.num_ranks += 1

        async def bring_up() -> list[Any]:
            up = await asyncio.gather(*[self.lot.bring_up(one, WEIGHTS, shared) for one in fresh])
            return [replica for replica, _ in up]

        return asyncio.run(bring_up())

    def retire(self, replicas: list[Any]) -> None:
        async def retire() -> None:
            await asyncio.gather(*[self.lot.retire(replica) for replica in replicas])

        asyncio.run(retire())

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [line for path in self.folder.glob("events-*.jsonl") for line in path.read_text().splitlines()]
        return [event for event in map(json.loads, lines) if event["event"] == name]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_a_parked_engine_serves_the_next_step_on_a_new_lease_with_new_weights(run: Run) -> None:
    (first,) = run.start(1)
    run.retire([first])
    assert Lease.held == [], "a parked engine costs no lease"
    (second,) = run.start(1)
    assert second is first and first.versions == [7, 7]
    (parked,), (woken,) = run.events("replica_parked"), run.events("replica_woken")
    assert parked["lease"] == woken["parked_as"] != woken["lease"]
    assert parked["memory"]["device_bytes"] == 5 * MIB and parked["num_gpus"] == 1
    assert run.lot.parked.total() == 0


def test_single_replicas_may_be_parked_in_the_middle_of_a_rollout(run: Run) -> None:
    one, two = run.start(1, 1)
    run.retire([one])
    assert two.state is ReplicaState.READY and len(Lease.held) == 1
    (again,) = run.start(1)
    assert again is one


def test_devices_that_went_to_someone_else_cost_a_start_and_end_the_engine(run: Run) -> None:
    (first,) = run.start(1)
    run.retire([first])
    foreign = Lease("foreign", "a")
    (second,) = run.start(1)
    assert second is not first and second.lease.device_key() == (("node", frozenset("b")),)
    assert Replica.engines == {second}, "the engine that could not move is ended, not used on other devices"
    assert [lease.devices for lease in Lease.held] == ["a", "b"] and foreign in Lease.held
    (ended,) = run.events("parked_ended")
    assert "has other devices" in ended["reason"]


def test_where_nothing_sleeps_a_lease_has_its_replicas_name(run: Run) -> None:
    fleet = run.start(1, 1)
    assert [replica.lease.name for replica in fleet] == ["rlhfless/replica/r0", "rlhfless/replica/r1"]


def test_no_lease_waits_for_devices_when_nothing_of_its_kind_sleeps(run: Run) -> None:
    run.retire(run.start(1))
    (wide,) = run.start(2)
    assert wide.world_size == 2 and run.lot.parked.total() == 1
    (other,) = run.start(1, config="other engine arguments")
    assert other.versions == [7], "an engine with other arguments is not reused"


def test_an_engine_that_died_in_its_sleep_is_started_again(run: Run) -> None:
    (first,) = run.start(1)
    run.retire([first])
    first.is_dead = True
    (second,) = run.start(1)
    assert second is not first and Replica.engines == {second} and len(Lease.held) == 1
    assert run.lot.parked.total() == 0


def test_one_that_neither_wakes_nor_ends_keeps_its_gpus_until_it_can_be_ended(run: Run) -> None:
    (first,) = run.start(1)
    run.retire([first])
    first.is_dead = first.survives = True
    with pytest.raises(ReplicaError, match="a process survived"):
        run.start(1)
    assert Lease.held == [first.lease]
    first.survives = False
    assert asyncio.run(run.lot.end_stuck()) == [None] and Lease.held == []


def test_one_that_holds_too_much_memory_is_ended(run: Run) -> None:
    (first,) = run.start(1)
    first.park_fails = True
    run.retire([first])
    assert not Replica.engines and not Lease.held and run.lot.parked.total() == 0
    (released,) = run.events("replica_released")
    assert released["reason"] == "holds too much"


def test_a_dead_one_is_not_parked(run: Run) -> None:
    (first,) = run.start(1)
    first.is_dead = True
    run.retire([first])
    assert run.lot.parked.total() == 0 and not Lease.held


@pytest.mark.parametrize("park", ["never", "auto"])
def test_nothing_is_parked_when_asked_so_or_after_the_last_rollout(tmp_path: Path, park: str) -> None:
    run = Run(tmp_path, park=park)
    run.lot.is_last = park == "auto"
    run.retire(run.start(1))
    assert run.lot.parked.total() == 0 and not Replica.engines


def test_there_are_never_more_than_the_largest_fleet(run: Run) -> None:
    run.retire(run.start(1, 1))
    run.retire(run.start(2))
    assert run.lot.parked.total() == 2 and len(Replica.engines) == 2
    assert run.events("parked_ended")[0]["reason"].startswith("more are parked")


def test_one_too_many_that_can_not_be_ended_is_an_error_and_the_new_one_still_sleeps(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = run.start(1)
    run.retire(narrow)

    async def survives() -> None:
        raise ReplicaError("a process survived")

    monkeypatch.setattr(narrow[0], "stop", survives)
    (wide,) = run.start(2)
    with pytest.raises(ReplicaError, match="survived"):
        run.retire([wide])
    assert wide.state is ReplicaState.PARKED and run.lot.parked.total() == 1


def test_a_host_that_runs_out_of_memory_gets_it_back(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.retire(run.start(1, 1))
    asyncio.run(run.lot.make_room())
    assert run.lot.parked.total() == 2
    monkeypatch.setattr(Replica, "host_bytes", MIB)
    asyncio.run(run.lot.make_room())
    assert run.lot.parked.total() == 0 and not Replica.engines


def test_what_died_in_its_sleep_is_counted_with_no_more(run: Run) -> None:
    dead, asleep = started = run.start(1, 1)
    run.retire(started)
    dead.is_dead = True
    asyncio.run(run.lot.end_dead())
    assert run.lot.parked == {1: 1} and Replica.engines == {asleep}


def test_a_lease_whose_place_a_parked_engine_does_not_make_is_given_back(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (parked,) = run.start(1)
    run.retire([parked])

    async def survives() -> None:
        raise ReplicaError("a process survived")

    monkeypatch.setattr(parked, "stop", survives)
    foreign = Lease("foreign", "a")
    with pytest.raises(ReplicaError, match="survived"):
        run.start(1)
    assert Lease.held == [foreign], "nobody runs on it"


def test_engines_whose_wakes_take_longer_than_a_start_are_parked_no_more(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.retire(run.start(1))
    wake = Replica.wake

    async def slowly(replica: Replica, weights: WeightSource, lease: Lease) -> Any:
        report = await wake(replica, weights, lease)
        replica.engine_s = 5.0
        return report

    monkeypatch.setattr(Replica, "wake", slowly)
    run.retire(run.start(1))
    assert run.lot.parked.total() == 0
    (released,) = run.events("replica_released")
    assert released["reason"].startswith("a wake takes 5.00 s, a start 1.00 s")


def test_all_are_ended_at_the_end_even_if_one_can_not_be(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = run.start(1, 1)
    run.retire([one, two])

    async def survives() -> None:
        raise ReplicaError("a process survived")

    monkeypatch.setattr(one, "stop", survives)
    with pytest.raises(ReplicaError, match="survived"):
        asyncio.run(run.lot.close())
    assert Replica.engines == {one}


def test_two_replicas_that_search_at_once_never_wake_the_same_engine(run: Run) -> None:
    one, two = run.start(1, 1)
    run.retire([one, two])
    Lease("foreign", "a")
    woken = run.start(1, 1)
    assert len({id(replica) for replica in woken}) == 2
    assert Replica.engines == set(woken)
    assert sorted(lease.devices for lease in Lease.held) == ["a", "b", "c"]


def test_one_replica_more_than_engines_sleep_takes_the_devices_of_none(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    parked = run.start(1, 1)
    run.retire(parked)
    order = iter("cab")  # the first lease has devices that nothing sleeps on, while the two others are on their way
    first_asked = threading.Event()

    def acquire(replica: Replica, name: str, timeout_s: float) -> Lease:
        if replica.rank == 2:
            lease = Lease(name, next(order))
            first_asked.set()
            return lease
        assert first_asked.wait(5.0)
        time.sleep(0.05)
        return Lease(name, next(order))

    monkeypatch.setattr(Replica, "acquire", acquire)
    fleet = run.start(1, 1, 1)
    assert set(parked) < set(fleet), "both engines woke"
    assert run.events("parked_ended") == []


def beside_trainer(devices: str) -> TrainerDevices:
    return TrainerDevices("rlhfless/trainer", (LeasedNode("node", "10.0.0.1", tuple(devices)),))


def test_engines_wake_beside_the_trainer_and_on_leases_of_their_own_in_turn(run: Run) -> None:
    run.retire(run.start(1, 1))
    first = run.start(1, 1, shared=beside_trainer("cba"))
    assert set(first) == Replica.engines and len(run.events("replica_woken")) == 2
    assert Lease.held == [], "nothing is leased"
    assert sorted(one.lease.name.rpartition("-")[2] for one in first) == ["1", "2"]
    run.retire(first)
    assert set(run.start(1, 1)) == set(first) and len(Lease.held) == 2


def test_an_engine_that_sleeps_elsewhere_stays_where_it_is_when_others_start_beside_the_trainer(run: Run) -> None:
    elsewhere = run.start(1)
    run.retire(elsewhere)
    (started,) = run.start(1, shared=beside_trainer("cd"))
    assert started is not elsewhere[0] and run.lot.parked.total() == 1
    assert started.lease.device_key() == (("node", frozenset("c")),)


def test_what_can_wake_beside_the_trainer_is_counted_by_size_and_place(run: Run) -> None:
    narrow = run.start(1, 1)
    run.start(2)
    run.retire(narrow)
    assert run.lot.parked == {1: 2}
    on = [run.lot.parked_on(beside_trainer(devices)) for devices in ("abcd", "bcd", "cd")]
    assert on == [{1: 2}, {1: 1}, {1: 0}]


def test_what_can_wake_together_is_counted_from_the_engine_that_sleeps_shortest(run: Run) -> None:
    run.retire(run.start(1, 1, 1))
    run.retire(run.start(2))
    assert run.lot.parked == {1: 2, 2: 1}
    assert run.lot.sizes_together == [2, 1], "the wide one sleeps on the devices of a narrow one"


def test_engines_that_sleep_on_other_devices_can_all_wake_together(run: Run) -> None:
    fleet = run.start(1, 1, 2)
    run.retire(fleet)
    assert run.lot.sizes_together == [2, 1, 1]


def test_what_woke_together_for_a_validation_serves_the_next_step(run: Run) -> None:
    engines = run.start(1, 2, 1)
    run.retire(engines)
    validating = run.start(*run.lot.sizes_together)
    run.retire(validating)
    assert set(run.start(1, 2, 1)) == set(validating) == set(engines)
    assert len(run.events("replica_woken")) == 6 and run.events("parked_ended") == []


def test_one_that_does_not_wake_beside_the_trainer_gives_its_devices_to_a_start(run: Run) -> None:
    (first,) = run.start(1)
    run.retire([first])
    first.is_dead = True
    devices = beside_trainer("a")
    (second,) = run.start(1, shared=devices)
    assert Replica.engines == {second} and second.lease.device_key() == (("node", frozenset("a")),)
    with pytest.raises(LeaseImpossibleError):
        devices.take("next", 1)
    run.retire([second])
    assert devices.take("next", 1).nodes[0].device_ids == ("a",), "a part is given back"
