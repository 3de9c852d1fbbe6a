"""verl's own v1 ``sync`` trainer with our router, client and rollout stage, on verl's own resident replicas.

Weights, placement and every phase are verl's. A batch that lost a sample stops the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import ray
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig
from verl.workers.rollout.llm_server import LLMServerManager

from verl_rlhfless.config import RlhflessConfig
from verl_rlhfless.errors import DataError, ReplicaError
from verl_rlhfless.live.accelerator import Accelerator
from verl_rlhfless.live.client import ElasticClient
from verl_rlhfless.live.completeness import RolloutLedger
from verl_rlhfless.live.events import EventLog
from verl_rlhfless.live.model_check import check_shape
from verl_rlhfless.live.own_queue import refuse_foreign_queue
from verl_rlhfless.live.request_server import RequestReplica
from verl_rlhfless.live.residency import device_bytes
from verl_rlhfless.live.retry import retry
from verl_rlhfless.live.routing_settings import Nodes, RoutingSettings
from verl_rlhfless.live.step_report import RolloutReport
from verl_rlhfless.live.tickets import RouterSettings

LENGTHS_FILE = "rlhfless_lengths.json"
"""Length history in a checkpoint's folder."""

_ROUTER_CONFIG = Path(__file__).with_name("router.yaml")
_STAGE_MANAGER = "verl_rlhfless.live.stage.StageManager"
_POLL_INTERVAL_S = 0.05  # verl's replay buffer polls every 2 s, which a short rollout would pay in full
_LOOK_S = 0.5  # groups that end before the rollout does are looked for this often: some are refilled


class RequestTrainer(PPOTrainerSync):
    """Synchronous PPO / GRPO whose requests go where our policies send them."""

    def __init__(self, config: DictConfig, settings: RlhflessConfig) -> None:
        self._settings = settings
        _adapt_to_verl(config, settings)
        super().__init__(config)
        self.replay_buffer.poll_interval = _POLL_INTERVAL_S
        self._stock_wait = self.replay_buffer._wait_for_next_poll
        self.replay_buffer._wait_for_next_poll = self._wait_for_samples
        self._events = EventLog.from_environment()
        self._rollout_ledger = RolloutLedger(config.actor_rollout_ref.rollout.n)
        self._rollout_metrics: dict[str, float] = {}

    # ---- set-up

    def init(self) -> None:
        """Set up as verl does, if the cluster's samples are this run's alone."""
        refuse_foreign_queue()
        super().init()

    def _setup(self) -> None:
        model: HFModelConfig = omega_conf_to_dataclass(self.config.actor_rollout_ref.model)
        check_shape(self.config, self._settings, model.hf_config.to_dict())  # one from a hub is first known here
        LLMServerManager.rollout_replica_class = RequestReplica  # "for recipe to change"
        super()._setup()
        self._routing = self._routing_settings()
        settings = self._router_settings()
        retry(lambda: self._router.configure_rollouts.remote(settings, self._routing))

    def _wait_for_samples(self, partition_id: str, last_debug_time: float) -> float:
        """Wait as verl's replay buffer does, but first 0.5 s for the rollout's end: each poll reads every key."""
        with contextlib.suppress(ray.exceptions.RayActorError):  # the clients of a dead router say so
            ray.get(self._router.wait_ended.remote(_LOOK_S))
        self.agent_loop_manager.check_workers()
        return float(self._stock_wait(partition_id, last_debug_time))

    @property
    def _router(self) -> Any:
        return self.llm_server_manager.global_load_balancer

    def _router_settings(self) -> RouterSettings:
        migration, rollout = self._settings.migration, self.config.actor_rollout_ref.rollout
        return RouterSettings(
            progress_interval_s=migration.progress_interval_s,
            max_retries=migration.max_retries,
            is_deterministic=rollout.get("full_determinism", False) and not self._settings.is_placement_fixed,
        )

    def _routing_settings(self) -> RoutingSettings:
        model: HFModelConfig = omega_conf_to_dataclass(self.config.actor_rollout_ref.model)
        settings = RoutingSettings.of_run(self.config, self._settings, model.hf_config.to_dict(), self._nodes())
        settings.pool((settings.tp,))  # a model without a performance model is refused now
        return settings

    def _nodes(self) -> Nodes:
        """Return the cluster; its GPUs have the memory of the trainer's smallest."""
        found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        accelerator = Accelerator.of_platform().resource
        names = {name for resources in found for name in resources}
        measured = ray.get([rank.__ray_call__.remote(device_bytes) for rank in self.actor_rollout_wg.workers])
        num_gpus = tuple(int(resources.get(accelerator, 0)) for resources in found)
        return Nodes(num_gpus, tuple(sorted(names)), min(measured))

    def get_llm_client(self) -> ElasticClient:
        """Return the client that survives cuts and losses."""
        cuts = self._settings.migration.name != "off"
        client: ElasticClient = self.llm_server_manager.get_client(client_cls=ElasticClient, cuts=cuts)
        return client

    # ---- checkpoints

    def _save_checkpoint(self) -> None:
        folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LENGTHS_FILE).write_text(retry(self._router.lengths.remote), encoding="utf-8")
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        self._restore(LENGTHS_FILE, self._router.restore_lengths)

    def _restore(self, name: str, restore: Any) -> None:
        """Give the router what a file of the checkpoint holds, if there is one.

        Raises:
            DataError: The file does not hold such state.
        """
        trainer = self.config.trainer
        folder = Path(trainer.default_local_dir) / f"global_step_{self.global_steps}"
        path = (Path(trainer.resume_from_path) if trainer.resume_mode == "resume_path" else folder) / name
        if self.global_steps and path.exists():
            try:
                text = path.read_text(encoding="utf-8")
                retry(lambda: restore.remote(text))
            except ray.exceptions.RayTaskError as error:
                raise DataError(f"{path}: {error.cause}") from error

    # ---- rollout

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> Any:
        """Run verl's step. Name the groups of a rollout that lost all: verl only says that it has none."""
        try:
            return super().step(metrics, timing_raw)
        except RuntimeError:
            self._rollout_ledger.check((), self.config.data.train_batch_size)
            raise

    def _submit_batch_to_rollout(self, batch: Any) -> int:
        self._rollout_ledger.expect(batch)
        return int(super()._submit_batch_to_rollout(batch))

    def on_sample_end(self) -> None:
        self._take_report()
        super().on_sample_end()

    def _take_report(self) -> None:
        report: RolloutReport | None = retry(self._router.report.remote)
        if report is None:
            return
        if report.failure:
            raise ReplicaError(f"{report.failure}. Its samples are complete, but later steps would not be controlled.")
        record = dataclasses.asdict(report)
        self._events.write("rolled_out", **record)
        self._rollout_metrics = {
            f"rlhfless/{name}": value for name, value in record.items() if name not in ("step", "failure")
        }

    def _consume_sync_metrics(self) -> dict[str, Any]:
        return {**super()._consume_sync_metrics(), **self._rollout_metrics}

    def _balance_batch(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        self._rollout_ledger.check(batch.keys, self.config.data.train_batch_size)
        return super()._balance_batch(batch, *args, **kwargs)


def _adapt_to_verl(config: DictConfig, settings: RlhflessConfig) -> None:
    """Set the keys of verl that our router needs, so that the user sets none of them."""
    rollout = config.actor_rollout_ref.rollout
    with open_dict(config):
        config.trainer.v1.trainer_mode = "sync"  # verl treats any other literal as asynchronous
        OmegaConf.update(rollout, "router_config_path", str(_ROUTER_CONFIG), force_add=True)
        if settings.prefix_dedup.training == "prefix_grouper":
            config.actor_rollout_ref.actor.use_prefix_grouper = True
        OmegaConf.update(rollout, "agent.agent_loop_manager_class", _STAGE_MANAGER, force_add=True)
