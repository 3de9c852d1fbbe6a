"""The trainer's lease around a rollout, with a worker group that records its moves."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from verl_rlhfless.config import PoolConfig
from verl_rlhfless.errors import DeviceMemoryError, LeaseTimeoutError, SuspendError
from verl_rlhfless.live import trainer as trainer_module
from verl_rlhfless.live import trainer_lease
from verl_rlhfless.live.events import EventLog
from verl_rlhfless.live.trainer import ElasticTrainerSync
from verl_rlhfless.live.trainer_lease import Gpus, TrainerLease
from verl_rlhfless.live.worker_group import ResumeResult, SuspendResult
from verl_rlhfless.policy.suspend import SuspendHistory
from verl_rlhfless.types import DeviceKey, FleetDecision, Forecast, ReplicaSpec

WAIT_S = 30.0
TRAINER: DeviceKey = (("node", frozenset({"0", "1"})),)
ELSEWHERE: DeviceKey = (("node", frozenset({"2"})), ("other", frozenset({"0", "1"})))
SUSPEND, RESUME = "suspend", "resume"


class Clock:
    """Stands still but for the moves: a way to the host takes 3 s, a way back 5 s."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def pass_move(self, move: str) -> None:
        self.now_s += {SUSPEND: 3.0, RESUME: 5.0}[move]


class Group:
    """Two GPUs; a move fails with what ``failures`` holds for it, once each."""

    def __init__(self) -> None:
        self.bound_devices = TRAINER
        self.moves: list[str] = []
        self.failures: dict[str, list[Exception]] = {SUSPEND: [], RESUME: []}
        self.moved = threading.Condition()
        self.clock = Clock()
        self.limits: list[int] = []

    def suspend(self, timeout_s: float, max_reserved_bytes: int) -> SuspendResult:
        self.limits.append(max_reserved_bytes)
        self._move(SUSPEND)
        return SuspendResult(0.1, 0.1, 0.1, (), _lease("old", granted_s=0.0, released_s=100.0))

    def resume(self, timeout_s: float, same_device_wait_s: float) -> ResumeResult:
        self._move(RESUME)
        wrong = _lease("wrong", granted_s=110.0, released_s=112.0)
        return ResumeResult(1.0, 0.5, _lease("new", granted_s=130.0), (wrong,))

    def wait_for(self, *moves: str) -> None:
        with self.moved:
            assert self.moved.wait_for(lambda: self.moves == list(moves), WAIT_S), self.moves

    def _move(self, move: str) -> None:
        self.clock.pass_move(move)
        with self.moved:
            self.moves.append(move)
            self.moved.notify_all()
        if self.failures[move]:
            raise self.failures[move].pop(0)


class Replicas:
    def __init__(self, is_leased: bool = True, devices: DeviceKey = ELSEWHERE) -> None:
        self.is_leased = is_leased
        self.devices = devices

    def device_keys(self) -> list[DeviceKey]:
        return [self.devices]


def _lease(name: str, granted_s: float, released_s: float | None = None) -> Any:
    return SimpleNamespace(name=name, granted_s=granted_s, released_s=released_s)


@pytest.fixture
def group() -> Group:
    return Group()


@pytest.fixture
def lease(group: Group, tmp_path: Path) -> Iterator[TrainerLease]:
    made = TrainerLease(group, Gpus(2, lambda: 4), PoolConfig(), EventLog(tmp_path))
    yield made
    made.close()


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for log in folder.glob("events-*.jsonl") for line in log.read_text().splitlines()]


def repaying(rollout_s: float) -> SuspendHistory:
    return SuspendHistory((rollout_s,), (rollout_s / 100,), (rollout_s / 100,))


def test_replicas_that_need_the_gpus_find_them_free_and_give_them_back(lease: TrainerLease, group: Group) -> None:
    lease.before_rollout(replica_gpus=4)
    assert group.moves == [SUSPEND], "before a replica leases"
    lease.during_rollout(Replicas(devices=TRAINER))
    metrics = lease.after_rollout()
    assert group.moves == [SUSPEND, RESUME]
    assert metrics["rlhfless/trainer_suspended"] == 1
    assert metrics["rlhfless/trainer_gpu_s_given_back"] == 2 * (30 - 2), "wrong leases were held, by this run"


def test_beside_the_replicas_the_trainer_leaves_when_they_have_other_gpus(lease: TrainerLease, group: Group) -> None:
    lease.before_rollout(replica_gpus=2)
    replicas = Replicas(is_leased=False)
    lease.during_rollout(replicas)
    assert group.moves == []
    replicas.is_leased = True
    group.wait_for(SUSPEND)
    lease.after_rollout()
    assert group.moves == [SUSPEND, RESUME]


def test_a_rollout_that_is_over_at_once_moves_nobody(lease: TrainerLease, group: Group) -> None:
    lease.before_rollout(replica_gpus=2)
    lease.during_rollout(Replicas(is_leased=False))
    assert lease.after_rollout() == {"rlhfless/trainer_suspended": 0.0}
    assert group.moves == []


def test_the_trainer_is_back_before_the_rollout_is_over(lease: TrainerLease, group: Group) -> None:
    lease.history = repaying(rollout_s=0.1)
    lease.before_rollout(replica_gpus=2)
    lease.during_rollout(Replicas())
    group.wait_for(SUSPEND, RESUME)
    metrics = lease.after_rollout()
    assert group.moves == [SUSPEND, RESUME]
    assert metrics["rlhfless/resume_wait_s"] < WAIT_S


def test_it_does_not_come_back_early_onto_devices_of_a_replica(lease: TrainerLease, group: Group) -> None:
    lease.history = repaying(rollout_s=0.1)
    lease.before_rollout(replica_gpus=2)
    lease.during_rollout(Replicas(devices=TRAINER))
    assert lease._away is not None
    lease._away.result(WAIT_S)
    assert group.moves == [SUSPEND]
    lease.after_rollout()
    assert group.moves == [SUSPEND, RESUME]


def test_an_early_resume_that_fails_is_tried_again(lease: TrainerLease, group: Group) -> None:
    lease.history = repaying(rollout_s=0.1)
    group.failures[RESUME] = [LeaseTimeoutError("busy")]
    lease.before_rollout(replica_gpus=2)
    lease.during_rollout(Replicas())
    group.wait_for(SUSPEND, RESUME)
    lease.after_rollout()
    assert group.moves == [SUSPEND, RESUME, RESUME]


def test_gpus_that_do_not_come_back_are_the_callers_business(lease: TrainerLease, group: Group) -> None:
    group.failures[RESUME] = [LeaseTimeoutError("busy")]
    lease.before_rollout(replica_gpus=4)
    lease.during_rollout(Replicas())
    with pytest.raises(LeaseTimeoutError):
        lease.after_rollout()


def test_memory_that_stays_on_a_device_keeps_the_lease_for_good(
    lease: TrainerLease, group: Group, tmp_path: Path
) -> None:
    group.failures[SUSPEND] = [DeviceMemoryError("rank 0 holds 1 GiB")]
    lease.before_rollout(replica_gpus=2)
    lease.during_rollout(Replicas())
    group.wait_for(SUSPEND)
    assert lease.after_rollout() == {"rlhfless/trainer_suspended": 0.0}
    assert not lease.before_rollout(replica_gpus=2).is_suspended
    assert "rank 0 holds 1 GiB" in lease.decision.reason
    assert [event["event"] for event in events(tmp_path)] == ["trainer_lease", "suspend_failed", "trainer_lease"]


def test_memory_that_stays_where_replicas_were_to_run_keeps_the_trainer_there(
    lease: TrainerLease, group: Group, tmp_path: Path
) -> None:
    group.failures[SUSPEND] = [DeviceMemoryError("rank 0 holds 1 GiB")]
    assert not lease.before_rollout(replica_gpus=4).is_suspended
    lease.during_rollout(Replicas())
    assert lease.after_rollout() == {"rlhfless/trainer_suspended": 0.0}
    assert not lease.before_rollout(replica_gpus=4).is_suspended
    assert group.moves == [SUSPEND] and "rank 0 holds 1 GiB" in lease.decision.reason
    assert [event["event"] for event in events(tmp_path)] == ["trainer_lease", "suspend_failed", "trainer_lease"]


def test_how_much_may_stay_on_the_devices_is_the_recipes(group: Group, tmp_path: Path) -> None:
    lease = TrainerLease(group, Gpus(2, lambda: 2), PoolConfig(suspend_residual_bytes=7), EventLog(tmp_path))
    lease.before_rollout(replica_gpus=2)
    lease.after_rollout()
    assert group.limits == [7]
    lease.close()


def test_ranks_that_do_not_answer_end_the_run(lease: TrainerLease, group: Group) -> None:
    group.failures[SUSPEND] = [SuspendError("ranks [1] did not offload")]
    lease.before_rollout(replica_gpus=2)
    lease.during_rollout(Replicas())
    group.wait_for(SUSPEND)
    with pytest.raises(SuspendError, match="did not offload"):
        lease.after_rollout()


def test_only_training_rollouts_are_learnt_from(lease: TrainerLease) -> None:
    lease.before_rollout(replica_gpus=4, is_validation=True)
    lease.during_rollout(Replicas())
    lease.after_rollout()
    assert lease.history == SuspendHistory()
    lease.before_rollout(replica_gpus=4)
    lease.during_rollout(Replicas())
    lease.after_rollout()
    assert len(lease.history.rollouts_s) == len(lease.history.suspends_s) == len(lease.history.resumes_s) == 1


def test_what_the_moves_took_is_told_and_learnt_with_the_length_of_the_rollout(
    lease: TrainerLease, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_lease, "time", group.clock)
    lease.before_rollout(replica_gpus=4)
    lease.during_rollout(Replicas(devices=TRAINER))
    group.clock.now_s += 40.0
    metrics = lease.after_rollout()
    assert lease.moves_s == (3.0, 5.0) and lease.history == SuspendHistory((43.0,), (3.0,), (5.0,))
    told = {name: metrics[f"rlhfless/{name}"] for name in ("suspend_s", "resume_s", "resume_wait_s")}
    assert told == {"suspend_s": 3.0, "resume_s": 5.0, "resume_wait_s": 5.0}


@pytest.mark.parametrize("leaves", [True, False])
def test_a_planned_step_pays_for_the_trainers_way_to_the_host_and_back(
    lease: TrainerLease, monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    lease.before_rollout(replica_gpus=4, is_shared=not leaves)
    lease.during_rollout(Replicas(devices=TRAINER))
    metrics = {**lease.after_rollout(), "rlhfless/rollout_s": 35.0}
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(monotonic=lambda: 190.0))
    step: Any = SimpleNamespace(
        _step_began_s=90.0,
        _rollout_metrics=metrics,
        _fleet=SimpleNamespace(gpu_s=50.0),
        _routing=SimpleNamespace(trainer_gpus=2),
        _events=EventLog(None),
    )
    forecast = Forecast(rollout_s=30.0, step_s=95.0, gpu_s=200.0, static_step_s=120.0)
    told = ElasticTrainerSync._account(step, FleetDecision(1, (ReplicaSpec(2), ReplicaSpec(2)), "two", forecast))
    away_s = 130.0 - 100.0 - 2.0 if leaves else 0.0  # from the release on the host to the next grant, less a wrong one
    assert told["rlhfless/gpu_s"] == 50.0 + 2 * (100.0 - away_s)
    assert told["rlhfless/step_s"] == 100.0 and told["rlhfless/predicted_gpu_s"] == 200.0


def test_every_rollout_begins_anew(lease: TrainerLease, group: Group) -> None:
    for number in (1, 2):
        lease.before_rollout(replica_gpus=2)
        lease.during_rollout(Replicas())
        group.wait_for(*[SUSPEND, RESUME] * (number - 1), SUSPEND)
        assert lease.after_rollout()["rlhfless/trainer_suspended"] == 1.0
    lease.before_rollout(replica_gpus=2)
    lease.during_rollout(Replicas(is_leased=False))
    assert lease.after_rollout() == {"rlhfless/trainer_suspended": 0.0} and lease.moves_s is None
    assert group.moves == [SUSPEND, RESUME] * 2


def test_a_trainer_whose_gpus_are_shared_stays_however_long_the_rollout_is(lease: TrainerLease, group: Group) -> None:
    lease.history = repaying(rollout_s=100.0)
    lease.before_rollout(replica_gpus=2, is_shared=True)
    lease.during_rollout(Replicas(devices=TRAINER))
    assert lease.after_rollout() == {"rlhfless/trainer_suspended": 0.0} and lease.moves_s is None
    assert group.moves == []
    lease.before_rollout(replica_gpus=4)
    lease.after_rollout()
    assert group.moves == [SUSPEND, RESUME]
    assert lease.moves_s is not None


def test_every_decision_is_recorded_with_its_reason(lease: TrainerLease, tmp_path: Path) -> None:
    lease.before_rollout(replica_gpus=4)
    lease.during_rollout(Replicas())
    lease.after_rollout()
    decision, suspended, resumed = events(tmp_path)
    assert decision["reason"].startswith("the trainer's 2 GPUs and the replicas' 4")
    assert (suspended["event"], suspended["lease"]) == ("trainer_suspended", "old")
    assert (resumed["event"], resumed["lease"], resumed["num_wrong_leases"]) == ("trainer_resumed", "new", 1)


def test_a_run_that_must_not_suspend_says_why(group: Group, tmp_path: Path) -> None:
    lease = TrainerLease(group, Gpus(2, lambda: 2), PoolConfig(), EventLog(tmp_path), kept_because="fusion is on")
    assert not lease.before_rollout(replica_gpus=2).is_suspended
    lease.during_rollout(Replicas())
    assert lease.after_rollout() == {"rlhfless/trainer_suspended": 0.0}
    assert events(tmp_path)[0]["reason"] == "fusion is on"
    lease.close()
