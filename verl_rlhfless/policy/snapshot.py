"""Frozen values that policies read and return.

Samples are numbered ``0 .. B-1`` in batch order, ``n`` consecutive ones a group.

Invariant: nothing here refers to a live object; arrays are never written after construction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from verl_rlhfless.policy.perf import EnginePerf
from verl_rlhfless.policy.transitions import TrainerPerf

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

HELD, WAITING, RUNNING, FINISHED = 0, 1, 2, 3
"""States of a sample: no replica yet, queued at one, decoding or in prefill, complete."""

STARTING, READY, GONE = "starting", "ready", "gone"
"""States of a replica, as far as a policy tells them apart; ``GONE`` also stands for one that was lost."""

NEVER = 1e12
"""A ``next_look_s`` beyond the end of any rollout: no further look is wanted [s]."""


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """What several prompts begin with, such as a system prompt. The shorter of two with one name begins the longer."""

    name: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Batch:
    """The prompts of one step.

    Attributes:
        step: Number of the training step.
        prompt_ids: [G], unique in the step.
        group_of: [B] int64, the group of each sample.
        prompt_tokens: [B] int64.
        max_response_tokens: Most tokens a response may have.
        prefixes: [G] what a group's prompt shares with other groups; empty = nothing is shared between any.
    """

    step: int
    prompt_ids: tuple[str, ...]
    group_of: IntArray
    prompt_tokens: IntArray
    max_response_tokens: int
    prefixes: tuple[SharedPrefix | None, ...] = ()

    @property
    def num_samples(self) -> int:
        """Samples of the batch (B)."""
        return len(self.group_of)

    @property
    def leaders(self) -> IntArray:
        """First sample of each group, [G]; every group has one."""
        return np.unique(self.group_of, return_index=True)[1]


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """What may be leased, and what it takes.

    Attributes:
        num_gpus: Most GPUs that may be leased at once (the budget).
        gpus_per_node: GPUs of one node; a replica stays inside one.
        perf: Performance of a replica by tensor-parallel size (the legal ones).
        trainer: Performance of the trainer and times of leases.
        warm: Tensor-parallel size -> GPUs on which replicas of that size come up in ``wake_s`` instead of
            ``cold_start_s``, because their engines are parked.
        warm_beside: As ``warm``, of the engines that can wake beside the trainer, on its lease.
        has_kv_transfer: Whether a replica can take a moved sample's keys and values from another one; vLLM as verl
            runs it cannot, it recomputes.
        keeps_trainer: The trainer holds its lease during the rollout too, beside ``num_gpus``.
        has_resident: Whether a step may also run on engines that share the trainer's lease, as stock's do.
        shares_engines: Whether those are the engines that other steps lease, which load the published weights; else
            they are the trainer's own, into which it reshards its weights as stock does.
    """

    num_gpus: int
    gpus_per_node: int
    perf: Mapping[int, EnginePerf]
    trainer: TrainerPerf
    warm: Mapping[int, int] = field(default_factory=dict)
    warm_beside: Mapping[int, int] = field(default_factory=dict)
    has_kv_transfer: bool = False
    keeps_trainer: bool = False
    has_resident: bool = True
    shares_engines: bool = False


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """How a rollout starts.

    Attributes:
        fleet: Tensor-parallel size of each replica; replica ids are the positions.
        replica_of: [B] int64, replica of each sample, -1 = held back for now.
        order: [B] int64, sample ids in the order in which they are submitted.
        is_resident: Replicas run on the trainer's own lease, as stock's do, and nothing is given back.
        is_static: An empty replica keeps its lease.
        has_kv_pool: Moved samples find their keys and values in a global pool (Seer), so that nothing is recomputed.
        rebinds_turns: A session of several turns may continue on another replica; else it stays where it began (verl's
            sticky sessions).
        first_look_s: Seconds after the start until the controller looks for the first time.
        price: GPU-seconds that one second of this step is worth, for decisions during the rollout.
        predicted_step_s / predicted_gpu_s: What the planner expects of the whole step.
        predicted_rollout_s: Of that, from the request for the fleet to the last sample's end; ``None`` for stock's.
        static_step_s: What it expects of the best static fleet.
        objective: Weighted time and cost of the step over those of the best static fleet.
        reason: Why this fleet.
    """

    fleet: tuple[int, ...]
    replica_of: IntArray
    order: IntArray
    is_resident: bool
    is_static: bool
    has_kv_pool: bool = False
    rebinds_turns: bool = False
    first_look_s: float = NEVER
    price: float = 0.0
    predicted_step_s: float | None = None
    predicted_gpu_s: float | None = None
    predicted_rollout_s: float | None = None
    static_step_s: float | None = None
    objective: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica at the moment of a look.

    Attributes:
        replica: Its id, the position in ``RolloutView.replicas``.
        tp: Tensor-parallel size.
        state: ``STARTING``, ``READY`` or ``GONE``.
        num_waiting: Requests that its engine has queued.
        num_running: Requests that decode or are in prefill.
        context_tokens: Prompt and generated tokens of what decodes.
    """

    replica: int
    tp: int
    state: str
    num_waiting: int
    num_running: int
    context_tokens: int


@dataclass(frozen=True, slots=True)
class RolloutView:
    """The rollout at one moment.

    Attributes:
        now_s: Seconds since the rollout began (weights published).
        batch: The prompts.
        pool: What could be leased when the step was planned.
        generated: [B] int64, response tokens so far.
        state: [B] int8, ``HELD`` .. ``FINISHED``.
        replica_of: [B] int64, -1 = none.
        replicas: Every replica of this rollout, by id.
        free_gpus: GPUs of the budget that nobody leases; on a resident fleet those without work and fused inference.
        fuse_tokens: Tokens of finished samples that no inference phase has taken yet.
        fuse_samples: How many those samples are.
        fusing_gpus: GPUs that run fused inference.
        fusible_gpus: Of the free ones, GPUs that fused inference gets at once; never those of preemptible nodes.
    """

    now_s: float
    batch: Batch
    pool: PoolSnapshot
    generated: IntArray
    state: NDArray[np.int8]
    replica_of: IntArray
    replicas: tuple[ReplicaView, ...]
    free_gpus: int
    fuse_tokens: int
    fuse_samples: int
    fusing_gpus: int
    fusible_gpus: int = 0

    @property
    def alive(self) -> IntArray:
        """Ids of the samples that are not complete, increasing."""
        return np.flatnonzero(self.state != FINISHED)

    @property
    def num_held(self) -> IntArray:
        """Unfinished samples of each replica, [R]."""
        of = self.replica_of[self.alive]
        return np.bincount(of[of >= 0], minlength=len(self.replicas))


@dataclass(frozen=True, slots=True)
class Move:
    """Send samples to a replica: unstarted ones for free, running ones by cut and continuation."""

    samples: IntArray
    replica: int


@dataclass(frozen=True, slots=True)
class Reaction:
    """What to change in a running rollout.

    Attributes:
        starts: Tensor-parallel size of replicas to start; their ids follow the existing ones.
        moves: Samples to place or to migrate.
        fuse_gpus: Further freed GPUs that begin inference on finished samples.
        next_look_s: Time of the next look.
        reason: Why, empty when nothing changes.
        releases: Replicas that get no more work and give their lease back with their last request. In the simulator
            empty replicas end by themselves and need not be named.
    """

    next_look_s: float
    starts: tuple[int, ...] = ()
    moves: tuple[Move, ...] = ()
    fuse_gpus: int = 0
    reason: str = ""
    releases: tuple[int, ...] = ()
