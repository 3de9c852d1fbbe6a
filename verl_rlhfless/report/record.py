"""What is known of an observed arm, as frozen values; ``None`` = not known."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from verl_rlhfless.types import GpuSeconds, LeaseSpan


@dataclass(frozen=True, slots=True)
class RequestUse:
    """How the requests of a step were served, read from the engines' own iterations in every arm alike.

    Attributes:
        rollout_s: From the start of the step to the end of the last engine iteration of its rollout [s].
        prefill_tokens: Prompt tokens that engines computed, recomputed context of moved samples included.
        num_migrations: Running samples that were cut to continue elsewhere; ``None`` without a router of ours.
        router_cpu_s: CPU time of the router's process [s]: requests, journal and decisions; ``None`` likewise.
        host_cpu_percent: Mean of all cores during the rollout; above the limit a paced arm is void.
    """

    rollout_s: float
    prefill_tokens: int
    num_migrations: int | None
    router_cpu_s: float | None
    host_cpu_percent: float | None


@dataclass(frozen=True, slots=True)
class Figures:
    """What a step and a whole run have in common. Of a run: times and reward are means, the difference is the largest.

    Attributes:
        step_s: verl's ``timing_s/step`` [s].
        gen_s: verl's ``timing_s/gen`` [s]: the wait for the replay buffer.
        gpu: GPU-seconds by state, and the most GPUs leased at any instant.
        gpu_s_parked: GPU-seconds in which a process kept its device without a lease.
        parked_device_bytes: Most device memory that one of them left in use on a GPU; 0 where the device is the host.
        reward_mean: Mean score of the samples (``critic/score/mean``).
        rollout_probs_diff_max: Largest difference between the engine's and the trainer's probability of a token.
        rollout_probs_diff_mean: Mean of these differences over the tokens of a step; of a run, the largest of them.
        response_tokens: Tokens of all responses, padding samples left out.
        num_samples: Samples that reached training, padding left out.
        num_replicas: Rollout replicas that could serve.
        requests: How requests were served.
    """

    step_s: float | None
    gen_s: float | None
    gpu: GpuSeconds | None
    reward_mean: float | None
    rollout_probs_diff_max: float | None
    rollout_probs_diff_mean: float | None
    response_tokens: int | None
    num_samples: int | None
    num_replicas: int | None
    requests: RequestUse | None = None
    gpu_s_parked: float | None = None
    parked_device_bytes: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the figures under the names of ``rlhfless-ab/1``."""
        gpu = self.gpu
        return {
            "step_s": self.step_s,
            "gen_s": self.gen_s,
            "gpu_s_allocated": gpu and gpu.allocated,
            "gpu_s_busy": gpu and gpu.busy,
            "gpu_s_idle": gpu and gpu.idle,
            "gpu_s_startup": gpu and gpu.startup,
            "gpu_s_parked": self.gpu_s_parked,
            "parked_device_bytes": self.parked_device_bytes,
            "max_gpus": gpu and gpu.max_gpus,
            "reward_mean": self.reward_mean,
            "rollout_probs_diff_max": self.rollout_probs_diff_max,
            "rollout_probs_diff_mean": self.rollout_probs_diff_mean,
            "response_tokens": self.response_tokens,
            "num_samples": self.num_samples,
            "num_replicas": self.num_replicas,
            **(asdict(self.requests) if self.requests else {}),
        }


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One training step."""

    step: int
    figures: Figures


@dataclass(frozen=True, slots=True)
class Pull:
    """Weights that a replica loaded, beside those that it had to load.

    Attributes:
        lease: The replica's lease.
        expected_version: Version after the last training step that was over by then.
        version: Version that the replica says it loaded; ``None`` when no pull of it was recorded.
        checksum: Of the weights that the replica loaded.
        published_checksum: Of the weights that the trainer published as ``expected_version``.
    """

    lease: str
    expected_version: int | None
    version: int | None
    checksum: str | int | None
    published_checksum: str | int | None


@dataclass(frozen=True, slots=True)
class HostUse:
    """What the arm took of the host.

    Attributes:
        cpu_percent: Mean over the run and all cores.
        memory_peak_bytes: Most memory in use at any look, relative to the start of the watch.
        observer_cpu_percent: The observer's own share of one core.
    """

    cpu_percent: float
    memory_peak_bytes: int
    observer_cpu_percent: float


@dataclass(frozen=True, slots=True)
class Spread:
    """What the prompt groups of a run had of something, each with the mean of its samples.

    Attributes:
        mean: Over the groups.
        std_error: Of that mean, from the spread between groups.
        num_groups: Groups.
    """

    mean: float
    std_error: float
    num_groups: int


@dataclass(frozen=True, slots=True)
class ArmRecord:
    """One arm.

    Attributes:
        steps: Training steps in order.
        total: From the first grant to the last release: initial start, validation and checkpoints included.
        wall_s: The whole run, from the start of the watch to its end [s].
        leases: Every lease.
        pulls: At least one for every elastic replica that could serve.
        host: What it took of the host.
        reward: Scores, by prompt group.
        response_tokens: Lengths of responses, by prompt group.
    """

    steps: tuple[StepRecord, ...]
    total: Figures
    wall_s: float | None
    leases: tuple[LeaseSpan, ...]
    pulls: tuple[Pull, ...]
    host: HostUse | None
    reward: Spread | None = None
    response_tokens: Spread | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the arm as ``rlhfless-ab/1`` holds it."""
        return {
            "steps": [{"step": record.step, **record.figures.as_json()} for record in self.steps],
            "total": {**self.total.as_json(), "wall_s": self.wall_s},
            "pulls": [asdict(pull) for pull in self.pulls],
            "host": self.host and asdict(self.host),
            "reward": self.reward and asdict(self.reward),
            "response_tokens": self.response_tokens and asdict(self.response_tokens),
        }
