"""The trainer whose inference begins while the tail of the rollout still runs.

Old log-probs, reference log-probs and values of finished samples are computed on the trainer's own GPUs, which have
nothing else to do while elastic replicas generate. The step then computes only what is missing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from transfer_queue import KVBatchMeta

from verl_rlhfless.config import RlhflessConfig
from verl_rlhfless.live.fusion_loop import FusedWork, FusionLoop, FusionPorts
from verl_rlhfless.live.fusion_recall import InferenceMemory, Phase, RecallingGroup
from verl_rlhfless.live.request_trainer import RequestTrainer
from verl_rlhfless.live.retry import retry
from verl_rlhfless.policy.fuse import CallCost

_FORECAST_TIMEOUT_S = 30.0


class FusionTrainer(RequestTrainer):
    """verl's synchronous trainer; with ``rlhfless/fusion=on`` its forward-only phases begin during the rollout."""

    def __init__(self, config: DictConfig, settings: RlhflessConfig) -> None:
        super().__init__(config, settings)
        self._memory = InferenceMemory()
        self._fusion: FusionLoop | None = None
        self._fused: FusedWork | None = None
        self._phases: dict[str, Phase] = {}

    def _setup(self) -> None:
        super()._setup()
        if self._settings.fusion.name == "on":
            phases = phases_of(self.config, self.use_reference_policy, self.ref_in_actor, self.use_critic)
            self._phases = {phase.method: phase for phase in phases}

    def _may_fuse(self) -> bool:
        """Return whether the trainer's GPUs are its own and idle during the rollout that begins.

        The one place where this is decided: a step that gives the trainer's lease back has nothing to infer on.
        """
        return bool(self._phases) and self.resource_pool_manager.is_leased

    # ---- rollout

    def on_sample_begin(self) -> None:
        super().on_sample_begin()
        if self._may_fuse():
            self._memory.is_open = True
            ports = FusionPorts(self._infer, self._quantum, self._cost, self._remaining_s)
            self._fusion = FusionLoop(self.global_steps, ports, self._events)
            self._fusion.begin()

    def on_sample_end(self) -> None:
        self._end_fusion()
        super().on_sample_end()

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> Any:
        """Run verl's step; whatever ends it, no call to a worker goes on behind it."""
        try:
            return super().step(metrics, timing_raw)
        finally:
            self._end_fusion()
            self._tell_fusion()
            self._memory.clear()

    def _end_fusion(self) -> None:
        fusion, self._fusion = self._fusion, None
        if fusion is not None:
            self._fused = fusion.end(self._settings.fusion.end_timeout_s)
            self._memory.is_open = False

    def _tell_fusion(self) -> None:
        fused, self._fused = self._fused, None
        if fused is None:
            return
        known = [self._memory.of(phase) for phase in self._phases.values()]
        figures = {
            "fused_samples": min(memory.num_recalled for memory in known),
            "late_samples": max(memory.num_computed for memory in known),
            "fused_chunks": fused.num_chunks,
            "fused_s": fused.infer_s,
            "fusion_wait_s": fused.wait_s,
        }
        self._events.write("fusion", step=self.global_steps, failure=fused.failure, **figures)
        is_failed = {"fusion_failed": float(bool(fused.failure))}
        self._rollout_metrics |= {f"rlhfless/{name}": float(value) for name, value in (figures | is_failed).items()}

    # ---- inference, in the thread of the fusion loop

    def _infer(self, batch: KVBatchMeta, is_wanted: Callable[[], bool]) -> None:
        for method in self._phases:
            if not is_wanted():
                return
            batch = getattr(self, method)(batch, {})

    def _quantum(self) -> int:
        return math.lcm(*(phase.quantum(getattr(self, phase.group)) for phase in self._phases.values()))

    def _cost(self) -> CallCost | None:
        return self._memory.cost(list(self._phases.values()))

    def _remaining_s(self) -> float:
        return float(retry(self._router.remaining_s.remote, _FORECAST_TIMEOUT_S))

    # ---- verl's phases, which find what is known already

    @contextlib.contextmanager
    def _recalling(self, method: str) -> Iterator[None]:
        phase = self._phases.get(method)
        if phase is None:
            yield
            return
        group = getattr(self, phase.group)
        setattr(self, phase.group, RecallingGroup(group, phase, self._memory))
        try:
            yield
        finally:
            setattr(self, phase.group, group)

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> Any:
        with self._recalling("_compute_old_log_prob"):
            return super()._compute_old_log_prob(batch, metrics)

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> Any:
        with self._recalling("_compute_ref_log_prob"):
            return super()._compute_ref_log_prob(batch, metrics)

    def _compute_values(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> Any:
        with self._recalling("_compute_values"):
            return super()._compute_values(batch, metrics)


def phases_of(config: DictConfig, has_reference: bool, ref_in_actor: bool, has_critic: bool) -> list[Phase]:
    """Return the forward-only phases of a recipe, in the order of verl's step.

    Args:
        config: The configuration of ``verl.trainer.main_ppo``.
        has_reference: Whether the recipe needs reference log-probs.
        ref_in_actor: Whether the reference is the actor without its adapter.
        has_critic: Whether the recipe needs values.
    """
    rollout, ref, critic = config.actor_rollout_ref.rollout, config.actor_rollout_ref.ref, config.critic
    actor_micro = 1 if rollout.log_prob_use_dynamic_bsz else int(rollout.log_prob_micro_batch_size_per_gpu)
    phases = []
    if not OmegaConf.select(config, "algorithm.rollout_correction.bypass_mode"):  # then they are the rollout's own
        fields = ("log_probs", "entropy")
        phases.append(
            Phase("_compute_old_log_prob", "actor_rollout_wg", "compute_log_prob", "actor", fields, actor_micro)
        )
    if has_reference and ref_in_actor:
        where = ("actor_rollout_wg", "compute_log_prob", "actor", ("log_probs",))
        phases.append(Phase("_compute_ref_log_prob", *where, actor_micro))
    elif has_reference:
        ref_micro = 1 if ref.log_prob_use_dynamic_bsz else int(ref.log_prob_micro_batch_size_per_gpu)
        where = ("ref_policy_wg", "compute_ref_log_prob", "ref", ("log_probs",))
        phases.append(Phase("_compute_ref_log_prob", *where, ref_micro))
    if has_critic:
        micro = critic.get("ppo_infer_micro_batch_size_per_gpu") or critic.ppo_micro_batch_size_per_gpu
        critic_micro = 1 if critic.use_dynamic_bsz or micro is None else int(micro)
        phases.append(Phase("_compute_values", "critic_wg", "infer_batch", "train", ("values",), critic_micro))
    return phases
