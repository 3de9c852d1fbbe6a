"""What the trainer keeps of a rollout: its figures, its length history in every checkpoint, and its failures."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from omegaconf import OmegaConf
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from verl_rlhfless.config import parse_config
from verl_rlhfless.errors import ConfigError, DataError, ReplicaError, SampleLossError
from verl_rlhfless.live import request_trainer as module
from verl_rlhfless.live.events import EventLog
from verl_rlhfless.live.request_trainer import LENGTHS_FILE, RequestTrainer
from verl_rlhfless.live.residency import device_bytes
from verl_rlhfless.live.routing_settings import Nodes
from verl_rlhfless.live.stage import StageManager
from verl_rlhfless.live.step_report import RolloutReport
from verl_rlhfless.policy.predict import LengthModel

REPORT = RolloutReport(3, 8, 5, 2, 0, 1.5, 0.01)


class Router:
    def __init__(self) -> None:
        self.memory = LengthModel(level=4.0, effects={"p": 0.5}).to_json()
        self.last: RolloutReport | None = REPORT
        self.lengths = SimpleNamespace(remote=lambda: self.memory)
        self.report = SimpleNamespace(remote=lambda: self.last)
        self.restore_lengths = SimpleNamespace(remote=self._restore)
        self.wait_ended = SimpleNamespace(remote=self._wait_ended)
        self.is_alive, self.waits_s = True, []

    def _wait_ended(self, timeout_s: float) -> None:
        self.waits_s.append(timeout_s)
        if not self.is_alive:
            raise ray.exceptions.RayActorError

    def _restore(self, text: str) -> None:
        try:
            self.memory = LengthModel.from_json(text).to_json()
        except DataError as error:
            raise ray.exceptions.RayTaskError("restore_lengths", str(error), error) from error


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RequestTrainer:
    monkeypatch.setattr(module.ray, "get", lambda value, **_: value)
    monkeypatch.setattr(PPOTrainerSync, "_save_checkpoint", lambda self: None)
    monkeypatch.setattr(PPOTrainerSync, "_load_checkpoint", lambda self: None)
    made = RequestTrainer.__new__(RequestTrainer)
    made.config = OmegaConf.create({"trainer": {"default_local_dir": str(tmp_path), "resume_mode": "auto"}})
    made.llm_server_manager = SimpleNamespace(global_load_balancer=Router())
    made.agent_loop_manager = SimpleNamespace(check_workers=lambda: None)
    made.global_steps, made._rollout_metrics, made._events = 4, {}, EventLog(None)
    return made


def router(trainer: RequestTrainer) -> Router:
    found: Any = trainer.llm_server_manager.global_load_balancer
    assert isinstance(found, Router)
    return found


@pytest.mark.parametrize("is_alive", [True, False])
def test_the_replay_buffer_polls_when_the_router_has_seen_the_last_sample_or_is_gone(
    trainer: RequestTrainer, is_alive: bool
) -> None:
    router(trainer).is_alive = is_alive
    trainer._stock_wait = lambda partition_id, last_debug_time: last_debug_time + len(router(trainer).waits_s)
    assert trainer._wait_for_samples("train", 5.0) == 6.0
    assert 0 < router(trainer).waits_s[0] < 2


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [(ray.exceptions.ActorDiedError(), True), (ray.exceptions.ActorUnavailableError("not now", None), False)],
)
def test_an_agent_loop_worker_that_is_gone_ends_the_wait_for_its_samples(
    trainer: RequestTrainer, monkeypatch: pytest.MonkeyPatch, error: Exception, is_lost: bool
) -> None:
    calls: list[str] = []
    ended: list[str] = []

    def live() -> str:
        calls.append(f"call {len(calls)}")
        return calls[-1]

    def get(answer: Any) -> Any:
        if answer in ended:
            raise error
        return answer

    monkeypatch.setattr(module.ray, "get", get)
    monkeypatch.setattr(module.ray, "wait", lambda waiting, **_: ([call for call in ended if call in waiting], []))
    manager: Any = StageManager.__new__(StageManager)
    worker = SimpleNamespace(live=SimpleNamespace(remote=live))
    manager.agent_loop_workers, trainer.agent_loop_manager = [worker, worker], manager
    trainer._stock_wait = lambda partition_id, last_debug_time: last_debug_time
    assert trainer._wait_for_samples("train", 5.0) == 5.0
    ended.append("call 1")
    lost = pytest.raises(SampleLossError, match=r"agent-loop worker ended.*num_workers")
    with lost if is_lost else contextlib.nullcontext():
        trainer._wait_for_samples("train", 5.0)
        assert trainer._wait_for_samples("train", 5.0) == 5.0
    assert len(calls) == 3, "each worker is always watched"


def test_the_length_history_is_in_the_checkpoint_and_comes_back(trainer: RequestTrainer, tmp_path: Path) -> None:
    before = router(trainer).memory
    trainer._save_checkpoint()
    assert (tmp_path / "global_step_4" / LENGTHS_FILE).exists()
    router(trainer).memory = ""
    trainer._load_checkpoint()
    assert router(trainer).memory == before


def test_a_checkpoint_without_history_is_no_error(trainer: RequestTrainer) -> None:
    before = router(trainer).memory
    trainer._load_checkpoint()
    assert router(trainer).memory == before


@pytest.mark.parametrize("text", ["", "{", '{"format": "other"}', "[]"])
def test_a_corrupt_or_foreign_history_is_refused_by_name(trainer: RequestTrainer, tmp_path: Path, text: str) -> None:
    (tmp_path / "global_step_4").mkdir()
    (tmp_path / "global_step_4" / LENGTHS_FILE).write_text(text)
    with pytest.raises(DataError, match=rf"global_step_4/{LENGTHS_FILE}: length history: .*Delete the state file"):
        trainer._load_checkpoint()


def test_another_folder_to_resume_from_has_its_own_history(trainer: RequestTrainer, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "global_step_4"
    other.mkdir(parents=True)
    (other / LENGTHS_FILE).write_text(LengthModel(level=1.0).to_json())
    trainer.config.trainer.resume_mode = "resume_path"
    trainer.config.trainer.resume_from_path = str(other)
    trainer._load_checkpoint()
    assert LengthModel.from_json(router(trainer).memory).level == 1.0


def test_the_figures_of_a_rollout_are_among_the_steps_metrics(trainer: RequestTrainer) -> None:
    trainer._take_report()
    metrics = trainer._consume_sync_metrics()
    assert metrics["rlhfless/num_migrations"] == 2 and metrics["rlhfless/rollout_s"] == 1.5
    assert "rlhfless/failure" not in metrics


def test_a_rollout_without_decisions_to_its_end_stops_the_run(trainer: RequestTrainer) -> None:
    router(trainer).last = RolloutReport(3, 8, 5, 2, 0, 1.5, 0.01, failure="the control loop of step 3 failed: x")
    with pytest.raises(ReplicaError, match="control loop of step 3 failed: x"):
        trainer._take_report()


def test_a_gpu_has_the_memory_of_the_trainers_smallest(
    trainer: RequestTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    resources = {"GPU": 2.0, "accelerator_type:A100": 1.0}
    nodes = [{"Alive": True, "Resources": resources}, {"Alive": False, "Resources": {"GPU": 9.0}}]
    ranks = [SimpleNamespace(__ray_call__=SimpleNamespace(remote=lambda call, n=n: (call, n))) for n in (85, 42)]
    monkeypatch.setattr(module.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(module.ray, "get", lambda asked: [n for call, n in asked if call is device_bytes])
    monkeypatch.setattr(module.Accelerator, "of_platform", lambda: SimpleNamespace(resource="GPU"))
    trainer.actor_rollout_wg = SimpleNamespace(workers=ranks)
    assert trainer._nodes() == Nodes((2,), ("GPU", "accelerator_type:A100"), 42)


def test_a_model_without_a_price_ends_the_set_up_before_anything_is_built(
    trainer: RequestTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SimpleNamespace(hf_config=SimpleNamespace(to_dict=lambda: {"kv_lora_rank": 64}))
    monkeypatch.setattr(module, "omega_conf_to_dataclass", lambda _: model)
    monkeypatch.setattr(PPOTrainerSync, "_setup", lambda self: pytest.fail("the set-up began"))
    values = {"trainer": {"device": "cuda"}, "actor_rollout_ref": {"model": {"path": "a/b"}}}
    trainer.config = OmegaConf.create(values)
    trainer._settings = parse_config({"pool": {"name": "resident"}, "dispatcher": {"name": "length_bucket"}})
    with pytest.raises(ConfigError, match=r"model\.path='a/b': its iterations have no price"):
        trainer._setup()


@pytest.mark.parametrize(("migration", "cuts"), [("cut_and_migrate", True), ("rlhfuse", True), ("off", False)])
def test_the_client_knows_whether_samples_may_be_cut(trainer: RequestTrainer, migration: str, cuts: bool) -> None:
    trainer._settings = parse_config({"pool": {"name": "resident"}, "migration": {"name": migration}})
    trainer.llm_server_manager.get_client = lambda client_cls, **kwargs: client_cls({}, None, **kwargs)
    assert trainer.get_llm_client()._cuts is cuts
