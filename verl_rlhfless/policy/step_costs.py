"""What a step takes beside its rollout: transitions, the trainer's phases, inference that the tail hides.

The best uniform static fleet, to which every plan is compared, is here too. Where the trainer keeps its lease during
the rollout, that fleet stands beside the trainer and is never given back; else it is resident, stock's way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from verl_rlhfless.policy.fuse import fits
from verl_rlhfless.policy.packing import most_replicas
from verl_rlhfless.policy.snapshot import FloatArray, PoolSnapshot
from verl_rlhfless.policy.stages import Options, stay
from verl_rlhfless.policy.units import Units

_EARLY = 0.9
"""Samples that end in the last tenth of the rollout are too late to be fused: loading takes as long."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A uniform static fleet: its size, predicted step seconds and GPU-seconds."""

    tp: int
    step_s: float
    gpu_s: float


@dataclass(frozen=True)
class StepCosts:
    """What a step of one batch takes around its rollout.

    Attributes:
        pool: What may be leased, and what it takes.
        units: The batch with its predicted lengths.
        tokens: Prompt and expected response tokens of the batch.
        can_fuse: Whether freed GPUs may take inference.
    """

    pool: PoolSnapshot
    units: Units
    tokens: float
    can_fuse: bool

    @classmethod
    def of(cls, pool: PoolSnapshot, units: Units, *, can_fuse: bool) -> StepCosts:
        """Return the costs of a batch with predicted lengths."""
        tokens = float(((units.prompt + units.mean) * units.size).sum())
        return cls(pool, units, tokens, can_fuse and fits(pool))

    @property
    def _context(self) -> float:
        """Expected tokens of a sample, prompt included."""
        return self.tokens / float(self.units.size.sum())

    @property
    def phases_s(self) -> float:
        """Seconds of inference and update on the trainer."""
        trainer = self.pool.trainer
        return trainer.inference_s(self.tokens, self._context) + trainer.update_s(self.tokens, self._context)

    @property
    def transition_s(self) -> float:
        """Leased seconds to publish the weights and, unless it keeps its lease, to suspend and resume the trainer."""
        trainer = self.pool.trainer
        if self.pool.keeps_trainer:
            return trainer.publish_s
        return trainer.publish_s + 2 * trainer.state_copy_s + trainer.times.resume_s

    @property
    def elastic_s(self) -> float:
        """Seconds of an elastic step beside start and decoding."""
        times = self.pool.trainer.times
        num_grants = 1 if self.pool.keeps_trainer else 2
        return self.transition_s + num_grants * times.grant_s + times.park_s + self.phases_s

    @property
    def shared_s(self) -> float:
        """Seconds beside start and decoding of a step whose engines share the trainer's lease."""
        trainer = self.pool.trainer
        return trainer.publish_s + trainer.times.park_s + self.phases_s

    def rollout_s(self, step_s: float, *, is_shared: bool = False) -> float:
        """Return how long a step of ``step_s`` takes from the request for its fleet to its last sample."""
        return step_s - (self.shared_s if is_shared else self.elastic_s - self.pool.trainer.times.grant_s)

    def shared_step_s(self, options: Options) -> FloatArray:
        """Return [M] seconds of a step on each option as engines that share the trainer's lease.

        Inf for more engines than sleep there: its GPUs would be held while one starts.
        """
        rollout_s, _ = stay(self.pool, options, self.units.lane(self.units.order))
        step_s = self.shared_s + self.start_s(options) + rollout_s
        asleep = options.by_size(lambda tp: self.pool.warm_beside.get(tp, 0))
        return np.where(options.gpus <= asleep, step_s, np.inf)

    def trainer_gpu_s(self, step_s: FloatArray) -> FloatArray | float:
        """Return the GPU-seconds of an elastic step beside its replicas."""
        held_s = step_s if self.pool.keeps_trainer else self.transition_s + self.phases_s
        return held_s * self.pool.trainer.num_gpus

    def start_s(self, options: Options) -> FloatArray:
        """Return [M] leased seconds until an option's replicas are usable, the mean over its GPUs.

        Replicas that wake begin while others still start.
        """
        times = self.pool.trainer.times
        load = options.by_size(lambda tp: self.pool.perf[tp].load_s)
        warm = options.by_size(lambda tp: self.pool.warm.get(tp, 0))
        cold_share = np.maximum(0.0, 1 - warm / options.gpus)
        start_s: FloatArray = times.wake_s + cold_share * (times.cold_start_s - times.wake_s) + load
        return start_s

    def fused(self, rollout_s: FloatArray, rollout_gpu_s: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the seconds that fusion takes off each step, and the GPU-seconds that it adds.

        Inference costs the same GPU-seconds on freed GPUs as on the trainer; waking and loading come on top. Arguments
        and results have one shape: predicted seconds and GPU-seconds of rollouts.
        """
        if not self.can_fuse:
            return np.zeros_like(rollout_s), np.zeros_like(rollout_s)
        trainer = self.pool.trainer
        rate = trainer.fuse_tokens_per_s(self._context)
        start_s = trainer.times.wake_s + trainer.fuse_load_s
        free_gpu_s = np.maximum(self.pool.num_gpus * rollout_s - rollout_gpu_s, 0.0) / 2
        window_s = np.maximum(rollout_s / 2 - start_s, 0.0)  # the tail is about the second half
        gpus = np.minimum(
            self.early_tokens / rate / np.maximum(window_s, 1e-9), free_gpu_s / np.maximum(rollout_s, 1e-9)
        )
        tokens = np.minimum(rate * gpus * window_s, self.early_tokens)
        return tokens / (rate * trainer.num_gpus), np.ceil(gpus) * start_s

    @property
    def early_tokens(self) -> float:
        """Tokens of samples that finish early enough to be fused."""
        return self.tokens * self.units.early_share(_EARLY)

    def static_reference(self, options: Options) -> Reference:
        """Return the best uniform static fleet on the same budget."""
        return min(self.static_fleets(options), key=lambda fleet: fleet.step_s)

    def static_fleets(self, options: Options) -> list[Reference]:
        """Return the uniform static fleets on the same budget, by size."""
        pool, trainer = self.pool, self.pool.trainer
        time_s, _ = stay(pool, options, self.units.lane(self.units.order))
        held = static_gpus(pool) + (trainer.num_gpus if pool.keeps_trainer else 0)
        found = []
        for tp, count in static_counts(pool).items():
            step_s = self._static_s(tp, float(time_s[options.index(tp, count)]))
            found.append(Reference(tp, step_s, step_s * held))
        return found

    def _static_s(self, tp: int, rollout_s: float) -> float:
        """Return a static step's seconds: weights loaded by replicas that never end, or stock's hybrid way.

        Stock wakes its colocated engines, reshards the weights, and puts them to sleep.
        """
        pool, trainer, times = self.pool, self.pool.trainer, self.pool.trainer.times
        if pool.keeps_trainer:
            return trainer.publish_s + pool.perf[tp].load_s + rollout_s + self.phases_s
        wake_s = times.hybrid_wake_s if tp in pool.warm or not pool.warm else times.cold_start_s
        return wake_s + trainer.reshard_s + rollout_s + times.hybrid_sleep_s + self.phases_s


def static_counts(pool: PoolSnapshot) -> dict[int, int]:
    """Return the uniform static fleets: tensor-parallel size -> most replicas that fit, of the sizes that do."""
    most = {tp: most_replicas(tp, static_gpus(pool), pool.gpus_per_node) for tp in sorted(pool.perf)}
    return {tp: count for tp, count in most.items() if count}


def static_gpus(pool: PoolSnapshot) -> int:
    """Return the GPUs that a static fleet decodes on: the trainer's own as stock does, else the replicas' budget."""
    has_own = pool.has_resident and not pool.shares_engines and not pool.keeps_trainer
    return pool.trainer.num_gpus if has_own else pool.num_gpus
