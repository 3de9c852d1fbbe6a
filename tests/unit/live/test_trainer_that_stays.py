"""A trainer that was to leave its GPUs but could not: where replicas run, in that rollout and in later ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.live.routed import settings
from verl_rlhfless.config import PoolConfig
from verl_rlhfless.errors import DeviceMemoryError
from verl_rlhfless.live import trainer as trainer_module
from verl_rlhfless.live.events import EventLog
from verl_rlhfless.live.replica_places import ReplicaPlaces
from verl_rlhfless.live.trainer import ElasticTrainerSync
from verl_rlhfless.live.trainer_lease import Gpus, TrainerLease
from verl_rlhfless.types import FleetDecision, ReplicaSpec

FOUR = FleetDecision(1, (ReplicaSpec(1),) * 4, "four")


class Stays:
    """A worker group of two GPUs that leaves memory on them; half of each device is free."""

    bound_devices = ()

    def suspend(self, timeout_s: float, max_reserved_bytes: int) -> Any:
        raise DeviceMemoryError("rank 0 holds 1 GiB. Use +rlhfless=resident.")

    def devices(self) -> str:
        return "its devices"

    def free_device_share(self, timeout_s: float) -> float:
        return 0.5


class Fleet:
    """Records each start: how many replicas, and the trainer's devices if they share them."""

    def __init__(self) -> None:
        self.starts: list[tuple[int, Any]] = []

    def start(self, decision: FleetDecision, weights: Any, *, imports_first: bool, shared: Any) -> None:
        self.starts.append((len(decision.replicas), shared))


def trainer(folder: Path, monkeypatch: pytest.MonkeyPatch, budget: int, utilization: float, **pool: str) -> Any:
    """Return an elastic trainer of two GPUs, as far as it starts fleets; ``told`` is what its router was told."""
    monkeypatch.setattr(trainer_module.ray, "get", lambda done, **_: done)
    made: Any = ElasticTrainerSync.__new__(ElasticTrainerSync)
    config = PoolConfig(name="elastic", **pool)
    made.actor_rollout_wg, made._fleet, made.told = Stays(), Fleet(), []
    made._trainer_lease = TrainerLease(made.actor_rollout_wg, Gpus(2, lambda: budget), config, EventLog(folder))
    made._settings = SimpleNamespace(pool=config, weights=SimpleNamespace(pull_timeout_s=1.0), plans=False)
    made._routing = replace(settings("elastic"), keeps_trainer=False, trainer_gpus=2)
    made._places = ReplicaPlaces(made._trainer_lease, made.actor_rollout_wg, config, utilization)
    made._store_name, made._version = "weights", 0
    router = SimpleNamespace(reroute=SimpleNamespace(remote=made.told.append))
    made.llm_server_manager = SimpleNamespace(global_load_balancer=router)
    return made


def test_replicas_that_fit_beside_it_do_and_later_fleets_are_no_larger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path, monkeypatch, budget=4, utilization=0.9)
    for _ in range(2):
        made._limit_fleets()
        made._start_fleet(made._places.placed(FOUR))
    assert made._fleet.starts == [(4, None), (2, None)], "the first was decided for a trainer that leaves"
    assert [(told.replica_gpus, told.keeps_trainer) for told in made.told] == [(2, True)], "once"
    made._trainer_lease.close()


def test_replicas_without_a_gpu_of_their_own_share_those_of_the_trainer_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path, monkeypatch, budget=2, utilization=0.5)
    for _ in range(2):
        made._limit_fleets()
        made._start_fleet(made._places.placed(FOUR))
    assert made._fleet.starts == [(4, "its devices"), (2, "its devices")]
    assert made._places.placed(FOUR).is_resident and made.told[0].replica_gpus == 2
    made._trainer_lease.close()


@pytest.mark.parametrize(("utilization", "share_trainer"), [(0.6, "auto"), (0.5, "never")])
def test_without_room_for_any_replica_the_run_ends_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, utilization: float, share_trainer: str
) -> None:
    made = trainer(tmp_path, monkeypatch, budget=2, utilization=utilization, share_trainer=share_trainer)
    with pytest.raises(DeviceMemoryError, match=r"rank 0 holds 1 GiB. Use \+rlhfless=resident"):
        made._start_fleet(FOUR)
    assert not made._fleet.starts
    made._trainer_lease.close()
