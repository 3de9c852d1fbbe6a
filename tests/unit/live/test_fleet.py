"""A step goes on with the replicas that come up, and whatever came up is released, whoever fails."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from verl_rlhfless.config import parse_config
from verl_rlhfless.errors import ReplicaError
from verl_rlhfless.live import fleet as fleet_module
from verl_rlhfless.live.events import EventLog
from verl_rlhfless.live.fleet import Fleet
from verl_rlhfless.live.replica import ReleaseReport, WeightSource
from verl_rlhfless.policy.schedule import scheduled_fleet

_WEIGHTS = WeightSource("store", version=7, timeout_s=1.0)


class FakeReplica:
    """Fails where its rank says so, and remembers what was asked of it."""

    start_fails: frozenset[int] = frozenset()
    release_fails: frozenset[int] = frozenset()

    def __init__(self, rank: int, rollout: Any, *_: Any) -> None:
        self.rank = rank
        self.name = f"r{rank}"
        self.world_size = rollout.tensor_model_parallel_size
        self.server_address, self.server_handle = f"host:{rank}", f"handle-{rank}"
        self.lease = SimpleNamespace(name=f"rlhfless/replica/r{rank}")
        self.state = SimpleNamespace(value="released")
        self.is_released = False

    async def start(self, weights: WeightSource) -> Any:
        if self.rank in self.start_fails:
            raise ReplicaError(f"engine {self.rank} broke")
        return SimpleNamespace(version=weights.version, checksum="c", seconds=0.0)

    async def release(self) -> ReleaseReport:
        self.is_released = True
        if self.rank in self.release_fails:
            raise ReplicaError(f"engine {self.rank} survived")
        return ReleaseReport(True, 0.0, 0.0, 0.0)


class FakeRouter:
    """verl's router as far as a fleet uses it."""

    def __init__(self) -> None:
        self.servers: dict[str, Any] = {}
        self.add_servers = SimpleNamespace(remote=self._add)
        self.remove_servers = SimpleNamespace(remote=self._remove)

    async def _add(self, servers: dict[str, Any]) -> None:
        self.servers.update(servers)

    async def _remove(self, addresses: list[str]) -> None:
        for address in addresses:
            del self.servers[address]


@pytest.fixture
def router() -> FakeRouter:
    return FakeRouter()


@pytest.fixture
def fleet(router: FakeRouter, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    monkeypatch.setattr(fleet_module, "ElasticReplica", type("Replica", (FakeReplica,), {}))
    run = OmegaConf.create({"actor_rollout_ref": {"rollout": {"tensor_model_parallel_size": 1}, "model": {}}})
    return Fleet(run, parse_config(None), router, EventLog(None))


def test_replicas_serve_until_they_are_released(fleet: Fleet, router: FakeRouter) -> None:
    fleet.start(scheduled_fleet(1, (2,), tp=2), _WEIGHTS)
    assert fleet.num_gpus == 4
    assert router.servers == {"host:0": "handle-0", "host:1": "handle-1"}
    replicas = list(fleet.replicas)
    fleet.release()
    assert router.servers == {} and fleet.num_gpus == 0 and all(replica.is_released for replica in replicas)
    fleet.release()  # nothing left to do


def test_ranks_are_never_used_twice(fleet: Fleet, router: FakeRouter) -> None:
    for step in (1, 2):
        fleet.start(scheduled_fleet(step, (1,), tp=1), _WEIGHTS)
        assert list(router.servers) == [f"host:{step - 1}"]
        fleet.release()


def test_step_goes_on_with_the_replicas_that_came_up(fleet: Fleet, router: FakeRouter) -> None:
    fleet_module.ElasticReplica.start_fails = frozenset({0})
    fleet.start(scheduled_fleet(1, (2,), tp=1), _WEIGHTS)
    assert list(router.servers) == ["host:1"]


def test_no_replica_at_all_is_an_error_with_every_reason(fleet: Fleet) -> None:
    fleet_module.ElasticReplica.start_fails = frozenset({0, 1})
    with pytest.raises(ReplicaError, match=r"step 1: no rollout replica came up.*engine 0 broke.*engine 1 broke"):
        fleet.start(scheduled_fleet(1, (2,), tp=1), _WEIGHTS)


def test_one_failed_release_does_not_keep_the_others(fleet: Fleet) -> None:
    fleet_module.ElasticReplica.release_fails = frozenset({0})
    fleet.start(scheduled_fleet(1, (2,), tp=1), _WEIGHTS)
    replicas = list(fleet.replicas)
    with pytest.raises(ReplicaError, match="engine 0 survived"):
        fleet.release()
    assert all(replica.is_released for replica in replicas) and not fleet.replicas
