"""How a replica falls asleep and ends, and what it does when its server or node does not answer: every wait ends."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from verl.workers.config import RolloutConfig

from verl_rlhfless.config import PoolConfig
from verl_rlhfless.errors import ReplicaError
from verl_rlhfless.live import replica as replica_module
from verl_rlhfless.live.parked_memory import ParkedMemory
from verl_rlhfless.live.replica import ElasticReplica
from verl_rlhfless.live.replica_life import ReplicaState, WeightSource
from verl_rlhfless.live.shared_lease import TrainerDevices
from verl_rlhfless.types import LeasedNode

GIB = 2**30
POOL = PoolConfig(
    name="elastic", park_residual_bytes=1000, release_timeout_s=0.1, start_timeout_s=0.1, drain_timeout_s=0.1
)
WEIGHTS = WeightSource("store", 7, 1.0)
NODE_ID = "a" * 56


class Server:
    """Answers as a server actor does; what a test replaces may hang or fail."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.answers: dict[str, Callable[[], Any]] = {
            "num_running": lambda: 0,
            "park": lambda: ParkedMemory(1000, 8000, 5, 9),
            "stop_engine": lambda: (),
            "is_alive": lambda: True,
            "host_available_bytes": lambda: 9,
        }

    def __getattr__(self, name: str) -> Any:
        async def answer(*_: Any) -> Any:
            self.calls.append(name)
            found = self.answers.get(name, lambda: None)()
            return await found if asyncio.iscoroutine(found) else found

        return SimpleNamespace(remote=answer)


class Lease:
    def __init__(self, devices: str = "0") -> None:
        self.name, self.devices, self.is_held = f"lease-{devices}", devices, True
        self.nodes = [SimpleNamespace(node_id=NODE_ID, ip="10.0.0.1", device_ids=(devices,))]

    def device_key(self) -> str:
        return self.devices

    def release(self, timeout_s: float) -> None:
        self.is_held = False


class WarmPool:
    def __init__(self) -> None:
        self.returned: list[Any] = []

    def give_back(self, node_id: str, server: Any) -> None:
        self.returned.append(server)


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One that serves on device 0."""
    monkeypatch.setattr(replica_module.ray, "kill", lambda *_, **__: None)
    made: Any = ElasticReplica(3, RolloutConfig(name="vllm", tensor_model_parallel_size=1), {}, POOL, WarmPool())  # type: ignore[arg-type]
    made._server_handle = Server()
    made.servers = [made._server_handle]
    made.lease = Lease()
    made.state = ReplicaState.READY
    return made


class Node:
    """The replica's node: whether it lives, and how it answers a task that ends processes."""

    def __init__(self) -> None:
        self.is_alive = True
        self.answer: Callable[[], Any] = lambda: ()

    def remote(self, **_: Any) -> Any:
        async def run(*_: Any) -> Any:
            found = self.answer()
            return await found if asyncio.iscoroutine(found) else found

        return lambda _: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=run))

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": "f" * 56, "Alive": True}, {"NodeID": NODE_ID, "Alive": self.is_alive}]


@pytest.fixture
def node(replica: Any, monkeypatch: pytest.MonkeyPatch) -> Node:
    """Where the replica's server is dead, and its engine perhaps not."""
    node = Node()
    monkeypatch.setattr(replica_module.ray, "remote", node.remote)
    monkeypatch.setattr(replica_module.ray, "nodes", node.nodes)
    monkeypatch.setattr(replica_module, "_ANSWER_S", 0.0)
    replica._server_process = (1, 1.0)
    replica._server_handle.answers |= dict.fromkeys(("stop_engine", "num_running", "is_alive"), die)
    return node


def hang() -> Any:
    return asyncio.sleep(60)


def die() -> Any:
    raise ray.exceptions.RayActorError


def can_not_be_scheduled() -> Any:
    raise ray.exceptions.TaskUnschedulableError("the node is gone")


def test_a_replica_waits_for_gpus_until_its_rollout_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    over, waits = threading.Event(), []
    monkeypatch.setattr(replica_module.Lease, "acquire", lambda *_, over: waits.append(over))
    rollout: Any = RolloutConfig(name="vllm", tensor_model_parallel_size=1)
    waiting: Any = ElasticReplica(4, rollout, {}, POOL, WarmPool(), over)  # type: ignore[arg-type]
    waiting.acquire("r4-1", 300.0)
    assert waits == [over]


def test_a_parked_engine_keeps_its_server_and_gives_its_lease_back(replica: Any) -> None:
    report = asyncio.run(replica.park())
    assert report.drained and report.memory.device_bytes == 1000
    assert replica.state is ReplicaState.PARKED and not replica.lease.is_held
    assert "stop_engine" not in replica._server_handle.calls and replica._warm_servers.returned == []


def test_it_wakes_on_a_lease_of_its_devices_and_loads_the_version(replica: Any) -> None:
    asyncio.run(replica.park())
    lease = Lease()
    replica._server_handle.answers["pull_weights"] = lambda: "report"
    assert asyncio.run(replica.wake(WEIGHTS, lease)) == "report"
    assert replica.state is ReplicaState.READY and replica.lease is lease and lease.is_held
    assert replica._server_handle.calls[-2:] == ["wake", "pull_weights"]


@pytest.mark.parametrize(("answer", "why"), [(hang, "did not sleep"), (die, "did not sleep")])
def test_an_engine_that_does_not_sleep_keeps_its_lease_until_it_is_released(
    replica: Any, answer: Callable[[], Any], why: str
) -> None:
    replica._server_handle.answers["park"] = answer
    with pytest.raises(ReplicaError, match=why):
        asyncio.run(replica.park())
    assert replica.lease.is_held and replica.state is not ReplicaState.PARKED


def test_more_device_memory_than_allowed_is_refused_by_its_key(replica: Any) -> None:
    replica._server_handle.answers["park"] = lambda: ParkedMemory(1001, 8000, 5, 9)
    with pytest.raises(ReplicaError, match=r"1001 bytes.*limit 1000.*rlhfless.pool.park_residual_bytes"):
        asyncio.run(replica.park())
    assert replica.lease.is_held


@pytest.mark.parametrize(
    ("in_use", "total_gib", "limit"),
    [(19 * GIB, 80, None), (19 * GIB + 1, 80, 19 * GIB), (0, 2, None), (1, 2, 0)],
    ids=["just fits", "a byte too much", "nothing on a small device", "a byte on a small device"],
)
def test_without_a_limit_of_its_own_the_next_engine_must_be_able_to_start_beside_its_own_context(
    replica: Any, in_use: int, total_gib: int, limit: int | None
) -> None:
    replica._pool = dataclasses.replace(POOL, park_residual_bytes=None)
    replica.config = RolloutConfig(name="vllm", tensor_model_parallel_size=1, gpu_memory_utilization=0.75)
    replica._server_handle.answers["park"] = lambda: ParkedMemory(in_use, total_gib * GIB, 5, 9)
    with contextlib.nullcontext() if limit is None else pytest.raises(ReplicaError, match=f"limit {limit}\\."):
        asyncio.run(replica.park())
    assert (replica.state is ReplicaState.PARKED) == (limit is None)


def test_beside_the_trainer_what_is_in_use_is_the_trainers_and_no_reason_to_end_the_engine(replica: Any) -> None:
    node = LeasedNode(node_id="node", ip="10.0.0.1", device_ids=("0",))
    replica.lease = TrainerDevices("trainer", [node]).take("r3", 1)
    replica._server_handle.answers["park"] = lambda: ParkedMemory(1 << 34, 1 << 35, 5, 9)
    asyncio.run(replica.park())
    assert replica.state is ReplicaState.PARKED and "stop_engine" not in replica._server_handle.calls


@pytest.mark.parametrize("broken", ["wake", "pull_weights"])
def test_one_that_does_not_come_up_is_ended_and_returns_the_new_lease(replica: Any, broken: str) -> None:
    asyncio.run(replica.park())
    replica._server_handle.answers[broken] = die
    lease = Lease()
    with pytest.raises(ray.exceptions.RayActorError):
        asyncio.run(replica.wake(WEIGHTS, lease))
    assert not lease.is_held and replica.state is ReplicaState.RELEASED
    assert replica._server_handle.calls[-1] == "stop_engine"


def test_a_wake_that_hangs_ends_in_time(replica: Any) -> None:
    asyncio.run(replica.park())
    replica._server_handle.answers["wake"] = hang
    lease = Lease()
    with pytest.raises(ReplicaError, match=r"not ready after 0\.1 s"):
        asyncio.run(replica.wake(WEIGHTS, lease))
    assert not lease.is_held


def test_weights_that_do_not_come_end_the_replica_in_time(replica: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_module, "ANSWER_GRACE_S", 0.01)
    asyncio.run(replica.park())
    replica._server_handle.answers["pull_weights"] = hang
    lease = Lease()
    with pytest.raises(ReplicaError, match=r"r3: its server did not load the weights after 0\.04 s.*pull_timeout_s"):
        asyncio.run(replica.wake(dataclasses.replace(WEIGHTS, timeout_s=0.01), lease))
    assert not lease.is_held


def test_a_server_that_may_still_be_launching_an_engine_launches_no_other(
    replica: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[Any] = []
    monkeypatch.setattr(replica_module.ray, "kill", lambda server, **_: ended.append(server))
    replica._server_handle.answers["launch_server"] = hang

    async def take(node_id: str) -> Any:
        return replica._server_handle, (1, 1.0)

    replica._warm_servers.take = take
    with pytest.raises(ReplicaError, match=r"not ready.*start_timeout_s"):
        asyncio.run(replica.start(WEIGHTS, Lease()))
    assert ended == [replica._server_handle] and replica._warm_servers.returned == []


def test_other_devices_are_never_woken_on(replica: Any) -> None:
    asyncio.run(replica.park())
    with pytest.raises(AssertionError):
        asyncio.run(replica.wake(WEIGHTS, Lease("1")))


def test_a_server_that_never_answers_holds_nobody_up(replica: Any) -> None:
    replica._server_handle.answers |= {"num_running": hang, "is_alive": hang, "host_available_bytes": hang}
    assert asyncio.run(replica.is_lost())
    assert asyncio.run(replica.host_available_bytes()) == 0
    report = asyncio.run(replica.release())
    assert not report.drained and not replica.lease.is_held


def test_a_stopped_parked_engine_leaves_a_server_for_the_next_start(replica: Any) -> None:
    asyncio.run(replica.park())
    asyncio.run(replica.stop())
    assert replica.state is ReplicaState.RELEASED and replica._warm_servers.returned == [replica._server_handle]


@pytest.mark.parametrize("answer", [can_not_be_scheduled, hang])
def test_a_dead_node_keeps_no_lease(replica: Any, node: Node, answer: Callable[[], Any]) -> None:
    node.is_alive, node.answer = False, answer
    asyncio.run(replica.release())
    assert not replica.lease.is_held and replica.state is ReplicaState.LOST


@pytest.mark.parametrize("answer", [can_not_be_scheduled, hang])
def test_a_node_that_does_not_answer_is_named_and_keeps_the_lease_until_it_is_dead(
    replica: Any, node: Node, answer: Callable[[], Any]
) -> None:
    node.answer = answer
    for _ in range(2):
        with pytest.raises(ReplicaError, match=r"r3: node 10\.0\.0\.1 did not end its processes"):
            asyncio.run(replica.release())
        assert replica.lease.is_held
    node.is_alive = False
    asyncio.run(replica.release())
    assert not replica.lease.is_held


def test_what_survived_a_kill_keeps_the_lease_until_it_has_ended(replica: Any, node: Node) -> None:
    node.answer = lambda: (7,)
    for _ in range(2):
        with pytest.raises(ReplicaError, match=r"processes \[7\] survived a kill"):
            asyncio.run(replica.stop())
        assert replica.lease.is_held
    node.answer = lambda: ()
    asyncio.run(replica.stop())
    assert not replica.lease.is_held
