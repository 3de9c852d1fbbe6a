"""Seconds of what surrounds decoding: leases, starts, wake, sleep, weight publication and the trainer's phases.

The three costs of elasticity (grant, start or wake, weight load) and stock's own costs (hybrid wake, weight reshard,
sleep) stand side by side here, so that no arm can hide one. Default seconds were measured on a CPU prototype or
follow from bytes over a link.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from verl_rlhfless.policy.gpus import GpuType
from verl_rlhfless.policy.layers import BYTES_PER_PARAM
from verl_rlhfless.policy.perf import Efficiencies
from verl_rlhfless.policy.shapes import ModelShape

FSDP_STATE_BYTES_PER_PARAM = 16
"""fp32 master weights and gradients, two fp32 Adam moments."""


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """Seconds of the life of a lease and of the processes on it.

    Attributes:
        grant_s: Request to grant (nothing is leased yet); a free placement group took 5 ms on the prototype.
        wake_s: Grant to usable of a parked engine, weights not included.
        cold_start_s: Grant to usable of a new engine process, weights not included.
        park_s: Engine to sleep and lease returned.
        resume_s: Grant to usable of the trainer's ranks, state copy not included.
        hybrid_wake_s: Stock's wake of a colocated engine.
        hybrid_sleep_s: Stock's sleep of a colocated engine.
        publish_bytes_per_s: Gathering the sharded weights into host memory.
    """

    grant_s: float = 0.1
    wake_s: float = 2.0
    cold_start_s: float = 60.0
    park_s: float = 0.2
    resume_s: float = 1.3
    hybrid_wake_s: float = 0.5
    hybrid_sleep_s: float = 0.3
    publish_bytes_per_s: float = 10e9


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a training step computes beside the rollout, per token of prompt plus response.

    Attributes:
        has_reference: A reference policy's log-probs (GRPO with a KL loss, verl's default recipe).
        has_critic: A critic's values and update (PPO).
        has_reward_model: Rewards come from a model of the actor's size; else from a rule or a service.
        mfu_train: Share of peak FLOP/s in forward plus backward.
        mfu_infer: Share of peak FLOP/s in forward only.
        micro_tokens: Tokens of one micro-batch on a GPU.
        phase_s: Fixed seconds of one phase (dispatch, padding, metrics).
    """

    has_reference: bool = True
    has_critic: bool = False
    has_reward_model: bool = False
    mfu_train: float = 0.40
    mfu_infer: float = 0.45
    micro_tokens: int = 16384
    phase_s: float = 0.3

    @property
    def inference_passes(self) -> int:
        """Forward passes over the batch that need no gradient: old log-prob, reference, critic values, rewards."""
        return 1 + int(self.has_reference) + int(self.has_critic) + int(self.has_reward_model)

    @property
    def frozen_models(self) -> int:
        """Models that are never updated: reference, reward."""
        return int(self.has_reference) + int(self.has_reward_model)


RECIPES = {
    "grpo": Recipe(),
    "ppo": Recipe(has_critic=True),
    "grpo-rm": Recipe(has_reward_model=True),
    "ppo-rm": Recipe(has_critic=True, has_reward_model=True),
}
"""Recipes by name; all have a reference policy, as verl's own."""


@dataclass(frozen=True)
class TrainerPerf:
    """Seconds of the trainer's phases on ``num_gpus`` GPUs (FSDP over all of them), ``gpus_per_node`` in each node.

    ``slowness`` is the factor by which measured phases took longer than modelled.
    """

    shape: ModelShape
    gpu: GpuType
    num_gpus: int
    gpus_per_node: int
    recipe: Recipe = field(default_factory=Recipe)
    times: LeaseTimes = field(default_factory=LeaseTimes)
    efficiencies: Efficiencies = field(default_factory=Efficiencies)
    slowness: float = 1.0

    def _forward_flops(self, tokens: float, mean_context: float) -> float:
        """Return the FLOPs of one forward pass; a token attends to half of the mean context, in the mean."""
        attention = self.shape.attention_flops * mean_context / 2
        return tokens * (2 * self.shape.matmul_params + attention)

    @property
    def _link_bytes_per_s(self) -> float:
        """Slowest link of NCCL's all-gather rings: between peers, or into a node over all of its network cards.

        What comes from another node enters once and is passed on among peers, so the GPUs' shares of the network add
        up.
        """
        if self.num_gpus <= self.gpus_per_node:
            return self.gpu.peer_bytes_per_s
        return min(self.gpu.peer_bytes_per_s, self.gpus_per_node * self.gpu.network_bytes_per_s)

    def _gather_s(self, passes: float) -> float:
        """Return the seconds in which every rank gathers all weights ``passes`` times (ring all-gather)."""
        sent = self.shape.weight_bytes * (self.num_gpus - 1) / self.num_gpus
        return passes * sent / (self._link_bytes_per_s * self.efficiencies.peer)

    def _pass_s(self, tokens: float, mean_context: float, *, forwards: float, gathers: float, mfu: float) -> float:
        """Return the seconds of a pass over the batch: of compute, or of gathering weights where that takes longer.

        Args:
            tokens: Prompt and response tokens of the batch.
            mean_context: Tokens of a sample.
            forwards: FLOPs in units of a forward pass.
            gathers: How often a micro-batch needs all weights.
            mfu: Share of peak FLOP/s.
        """
        compute = forwards * self._forward_flops(tokens, mean_context) / (self.num_gpus * self.gpu.flops * mfu)
        micro_batches = max(1.0, tokens / self.num_gpus / self.recipe.micro_tokens)
        return max(compute, self._gather_s(gathers) * micro_batches)  # FSDP prefetches the next layer's shards

    def inference_s(self, tokens: float, mean_context: float) -> float:
        """Return the seconds of all forward-only phases over ``tokens`` (0 tokens: 0 seconds)."""
        if tokens <= 0:
            return 0.0
        one = self._pass_s(tokens, mean_context, forwards=1.0, gathers=1.0, mfu=self.recipe.mfu_infer)
        return self.slowness * self.recipe.inference_passes * (one + self.recipe.phase_s)

    def update_s(self, tokens: float, mean_context: float) -> float:
        """Return the seconds of the actor's (and the critic's) update.

        Forward, recomputed forward and backward, which is worth two; then the optimizer, which reads and writes all
        state once.
        """
        one = self._pass_s(tokens, mean_context, forwards=4.0, gathers=3.0, mfu=self.recipe.mfu_train)
        state = FSDP_STATE_BYTES_PER_PARAM * self.shape.params / self.num_gpus
        optimizer = 2 * state / (self.gpu.hbm_bytes_per_s * self.efficiencies.hbm)
        return self.slowness * (1 + int(self.recipe.has_critic)) * (one + optimizer + self.recipe.phase_s)

    @property
    def state_copy_s(self) -> float:
        """Seconds to move one rank's training state between device and host."""
        models = 1 + int(self.recipe.has_critic)
        shard = models * FSDP_STATE_BYTES_PER_PARAM * self.shape.params / self.num_gpus
        shard += self.recipe.frozen_models * self.shape.weight_bytes / self.num_gpus
        return shard / (self.gpu.host_bytes_per_s * self.efficiencies.host)

    @property
    def reshard_s(self) -> float:
        """Seconds of stock's weight sync: every rank gathers the whole model for its colocated engine."""
        return self._gather_s(1.0)

    @property
    def publish_s(self) -> float:
        """Seconds to put one weight version into host memory of each node."""
        return self.shape.weight_bytes / self.times.publish_bytes_per_s

    def fuse_tokens_per_s(self, mean_context: float) -> float:
        """Return finished-sample tokens per second that one freed GPU takes through all forward-only phases."""
        flops = self._forward_flops(1.0, mean_context) * self.recipe.inference_passes
        return self.gpu.flops * self.recipe.mfu_infer / flops

    @property
    def fuse_bytes(self) -> float:
        """Weights of all models that one freed GPU needs for the forward-only phases."""
        return self.recipe.inference_passes * self.shape.weight_bytes

    @property
    def fuse_load_s(self) -> float:
        """Seconds to load them into one freed GPU's memory."""
        return self.fuse_bytes / (self.gpu.host_bytes_per_s * self.efficiencies.host)


def optimizer_state_bytes(shape: ModelShape, recipe: Recipe) -> float:
    """Return the bytes of training state over all GPUs, which must fit beside a sleeping engine."""
    trained = (1 + int(recipe.has_critic)) * FSDP_STATE_BYTES_PER_PARAM * shape.params
    return trained + max(1, recipe.frozen_models) * BYTES_PER_PARAM * shape.params
