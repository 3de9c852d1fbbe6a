"""The one schema of ``rlhfless.*``. Values are checked here, once; past this module every field is valid.

Invariants: every key that the Hydra groups under ``hydra_configs/rlhfless`` set is a field here, and an unknown key is
an error. A field carries its rule beside its default, so a section is its own documentation.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from verl_rlhfless.errors import ConfigError
from verl_rlhfless.schema import RULE, Section, build, one_of, within

TRAINER_MODE = "rlhfless_sync"
"""Value of ``trainer.v1.trainer_mode`` that selects our trainer."""

LEAVING_STRATEGIES = frozenset({"fsdp", "fsdp2"})
"""Strategies of trainers whose state is known to leave its device and come back."""

SUSPEND_RESIDUAL_BYTES = 512 << 20
"""What a suspended rank may keep of its GPU unless the recipe says so: workspaces, buffers that are not sharded."""

_INACTIVE = ("off", "stock", None)


def _check_sizes(key: str, value: tuple[Any, ...] | None) -> None:
    if value is not None and not value:
        raise ConfigError(key, [], "must not be empty", f"Write {key}=[1,2], or null for every legal size.")
    wrong = [n for n in value or () if isinstance(n, bool) or not isinstance(n, int) or n < 1]
    if wrong:
        raise ConfigError(
            key,
            list(value or ()),
            f"every entry must be an integer >= 1, and {wrong[0]!r} is not",
            f"Write {key}=[1,2].",
        )


def _check_schedule(key: str, value: tuple[Any, ...]) -> None:
    if not value:
        raise ConfigError(key, [], "must not be empty", f"Give the number of replicas of each step: {key}=[1,2].")
    wrong = [n for n in value if isinstance(n, bool) or not isinstance(n, int) or n < 1]
    if wrong:
        raise ConfigError(
            key, list(value), f"every entry must be an integer >= 1, and {wrong[0]!r} is not", f"Write {key}=[1,2,1,2]."
        )


@dataclass(frozen=True, slots=True)
class PoolConfig(Section):
    """Who leases GPUs, how many at most, and how long each part of a lease may take.

    ``elastic`` leases replicas in each step; ``resident`` keeps verl's own on the trainer's GPUs and leases nothing.

    ``max_gpus`` counts the trainer's GPUs and the replicas' together; ``None`` = what verl's pools of reward and
    teacher models leave of the cluster. With ``suspend_trainer=auto`` the trainer gives its GPUs back during a rollout
    when that pays, or when the replicas need them; with ``share_trainer=auto`` a planned step whose replicas had better
    not be leased runs them on its GPUs.
    ``park`` says whether the engine of a replica that leaves the rollout sleeps until the next one, and
    ``park_residual_bytes`` is the most memory that may then be in use on its device, by whatever process; ``None`` =
    what ``gpu_memory_utilization`` leaves, less 1 GiB for the context of the next engine, which starts only beside so
    much. Above it the engine is ended.
    ``suspend_residual_bytes`` is the most memory that torch's allocator may hold on a GPU that the trainer leaves; with
    more the trainer keeps its GPUs for the rest of the run.
    ``same_device_wait_s`` bounds the wait for the devices of a suspended trainer or a parked engine.
    ``warm_servers`` is how many server processes do their imports in advance; ``None`` = as many as the largest fleet.
    """

    KEY: ClassVar[str] = "rlhfless.pool"
    name: str = one_of("off", "elastic", "resident")
    max_gpus: int | None = within(1, default=None)
    warm_servers: int | None = within(0, default=None)
    grant_timeout_s: float = within(0.1, default=300.0)
    release_timeout_s: float = within(0.1, default=30.0)
    start_timeout_s: float = within(0.1, default=600.0)
    drain_timeout_s: float = within(0.1, default=60.0)
    same_device_wait_s: float = within(0.1, default=30.0)
    resume_timeout_s: float = within(0.1, default=600.0)
    suspend_trainer: str = one_of("auto", "never")
    suspend_residual_bytes: int = within(0, default=SUSPEND_RESIDUAL_BYTES)
    share_trainer: str = one_of("auto", "never")
    park: str = one_of("auto", "always", "never")
    park_residual_bytes: int | None = within(0, default=None)


@dataclass(frozen=True, slots=True)
class WeightsConfig(Section):
    """How a replica gets the trainer's weights.

    ``max_versions`` is 2 so that one version is served while the next one is published.
    """

    KEY: ClassVar[str] = "rlhfless.weights"
    name: str = one_of("off", "store")
    bucket_mib: int = within(1, 1024, default=256)
    max_versions: int = within(1, 2, default=2)
    pull_timeout_s: float = within(1, default=300.0)


@dataclass(frozen=True, slots=True)
class PlannerConfig(Section):
    """Which rollout replicas a step leases.

    ``fixed`` starts as many as ``schedule`` says, and repeats it when the run has more steps than entries.
    ``cost_aware`` plans each step's fleet from predicted lengths: ``cost_weight`` 0 = only time, 1 = only cost;
    ``max_step_s`` and ``max_usd_per_step`` are limits of a step, the trainer's GPUs included; ``tensor_parallel_sizes``
    are the sizes to choose from, ``None`` = every one that the model and a node allow.
    """

    KEY: ClassVar[str] = "rlhfless.planner"
    name: str = one_of("off", "fixed", "cost_aware")
    schedule: tuple[int, ...] = field(default=(1,), metadata={RULE: _check_schedule})
    cost_weight: float = within(0.0, 1.0, default=0.5)
    max_step_s: float | None = within(1e-3, default=None)
    max_usd_per_step: float | None = within(1e-9, default=None)
    usd_per_gpu_hour: float | None = within(1e-9, default=None)
    min_replicas: int = within(1, default=1)
    max_replicas: int | None = within(1, default=None)
    tensor_parallel_sizes: tuple[int, ...] | None = field(default=None, metadata={RULE: _check_sizes})

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        for name in ("max_step_s", "max_usd_per_step"):
            if self.name == "fixed" and getattr(self, name) is not None:
                rule = "limits a planned fleet, and rlhfless.planner.name=fixed plans none"
                action = "Choose rlhfless/planner=cost_aware, or remove the limit."
                raise ConfigError(f"{self.KEY}.{name}", getattr(self, name), rule, action)
        if self.max_usd_per_step is not None and self.usd_per_gpu_hour is None:
            rule = "needs the price of a GPU, and rlhfless.planner.usd_per_gpu_hour is not set"
            action = f"Set {self.KEY}.usd_per_gpu_hour=PRICE, or remove the limit."
            raise ConfigError(f"{self.KEY}.max_usd_per_step", self.max_usd_per_step, rule, action)
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            rule = f"must be at most {self.KEY}.max_replicas={self.max_replicas}"
            raise ConfigError(f"{self.KEY}.min_replicas", self.min_replicas, rule, "Correct one of the two.")


@dataclass(frozen=True, slots=True)
class PredictorConfig(Section):
    """What the router knows of response lengths: nothing, what earlier steps and siblings tell, or the replayed truth.

    ``oracle`` is the control arm of a benchmark: it reads ``rlhfless.replay.trace``.
    """

    KEY: ClassVar[str] = "rlhfless.predictor"
    name: str = one_of("off", "history", "oracle")


@dataclass(frozen=True, slots=True)
class DispatcherConfig(Section):
    """Which replica a request goes to, and in which order.

    ``stock`` is verl's rule (fewest requests, at once); ``length_bucket`` goes by predicted length, longest first, and
    binds late; ``random`` is the control arm of a benchmark, drawn from ``seed``.
    """

    KEY: ClassVar[str] = "rlhfless.dispatcher"
    name: str = one_of("stock", "length_bucket", "random")
    seed: int = within(0, 2**31 - 1, default=0)


@dataclass(frozen=True, slots=True)
class PrefixDedupConfig(Section):
    """Whether the samples of a group follow its first one to the same replica, whose prefix cache then serves them.

    ``training`` shares the prefix in the trainer's forward pass too, by verl's own prefix grouper.
    """

    KEY: ClassVar[str] = "rlhfless.prefix_dedup"
    name: str = one_of("off", "on")
    training: str = one_of("off", "prefix_grouper")


@dataclass(frozen=True, slots=True)
class MigrationConfig(Section):
    """When a running sample is cut and continues elsewhere, and how a lost one does.

    ``tau`` is the share of a replica's samples that have finished before ``rlhfless`` cuts the rest, and the share of
    all before ``rlhfuse`` does. Progress and retries hold for the loss of a replica too, whatever ``name`` is.
    """

    KEY: ClassVar[str] = "rlhfless.migration"
    name: str = one_of("off", "cut_and_migrate", "rlhfuse", "rlhfless")
    tau: float = within(0.0, 1.0, default=0.8)
    progress_interval_s: float = within(0.01, 60.0, default=0.5)
    max_retries: int = within(0, 100, default=3)


@dataclass(frozen=True, slots=True)
class FusionConfig(Section):
    """Whether inference on finished samples begins on the trainer's GPUs while the tail of the rollout still runs.

    ``end_timeout_s`` bounds the wait for the last such call when the rollout is over.
    """

    KEY: ClassVar[str] = "rlhfless.fusion"
    name: str = one_of("off", "on")
    end_timeout_s: float = within(0.1, default=600.0)


@dataclass(frozen=True, slots=True)
class ReplayConfig(Section):
    """Forces every response length from the recorded trace ``trace`` (a path), multiplied by ``scale``."""

    KEY: ClassVar[str] = "rlhfless.replay"
    trace: str | None = None
    scale: float = within(1e-3, 1e3, default=1.0)


@dataclass(frozen=True, slots=True)
class InstrumentConfig(Section):
    """What every arm, stock too, is measured with: a pacing profile (path or JSON text), the folder of the observer."""

    KEY: ClassVar[str] = "rlhfless.instrument"
    pace: str | None = None
    observer: str | None = None


@dataclass(frozen=True, slots=True)
class RlhflessConfig:
    """The whole of ``rlhfless.*``."""

    pool: PoolConfig = field(default_factory=PoolConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    dispatcher: DispatcherConfig = field(default_factory=DispatcherConfig)
    prefix_dedup: PrefixDedupConfig = field(default_factory=PrefixDedupConfig)
    migration: MigrationConfig = field(default_factory=MigrationConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    instrument: InstrumentConfig = field(default_factory=InstrumentConfig)

    def __post_init__(self) -> None:
        self._check_elastic_parts()
        self._check_request_parts()
        self._check_fusion()

    def _check_elastic_parts(self) -> None:
        together = {section.KEY: section.name for section in (self.pool, self.weights, self.planner)}
        state = ", ".join(f"{key}.name={name}" for key, name in together.items())
        if self.pool.name == "resident":
            on = [key for key, name in list(together.items())[1:] if name != "off"]
            if on:
                rule = f"a resident pool keeps verl's own replicas and weight sync ({state})"
                action = f"Set {on[0].replace('.', '/')}=off, or use rlhfless/pool=elastic."
                raise ConfigError(f"{on[0]}.name", together[on[0]], rule, action)
            return
        off = [key for key, name in together.items() if name == "off"]
        if 0 < len(off) < len(together):
            raise ConfigError(
                f"{off[0]}.name",
                "off",
                f"pool, weights and planner work only together ({state})",
                "Start from +rlhfless=default, or use +rlhfless=off for stock verl.",
            )

    def _check_request_parts(self) -> None:
        if self.predictor.name == "oracle" and self.replay.trace is None:
            rule = "reads true lengths from a replayed trace, and rlhfless.replay.trace is not set"
            raise ConfigError("rlhfless.predictor.name", "oracle", rule, "Set rlhfless.replay.trace=FILE.")
        if self.plans and self.predictor.name == "off":
            rule = "plans from predicted lengths, and rlhfless.predictor.name=off predicts none"
            raise ConfigError("rlhfless.planner.name", "cost_aware", rule, "Choose rlhfless/predictor=history.")
        if self.has_own_rollout:
            return
        for section in (self.predictor, self.dispatcher, self.prefix_dedup, self.migration):
            if section.name not in _INACTIVE:
                rule = "needs our router, and rlhfless.pool.name=off leaves verl's in place"
                action = "Choose rlhfless/pool=resident or rlhfless/pool=elastic, or start from +rlhfless=default."
                raise ConfigError(f"{section.KEY}.name", section.name, rule, action)

    def _check_fusion(self) -> None:
        if self.fusion.name == "off" or self.is_elastic:
            return
        rule = "needs trainer GPUs that are idle during the rollout, and rlhfless.pool.name=off is stock verl"
        if self.pool.name == "resident":
            rule = "rlhfless.pool.name=resident keeps a replica on every trainer GPU until the rollout ends"
        action = "Use rlhfless/pool=elastic (+rlhfless=default), or rlhfless/fusion=off."
        raise ConfigError("rlhfless.fusion.name", self.fusion.name, rule, action)

    @property
    def is_elastic(self) -> bool:
        """Whether rollout replicas are leased in each step."""
        return self.pool.name == "elastic"

    @property
    def plans(self) -> bool:
        """Whether each step's fleet follows from predicted lengths."""
        return self.planner.name == "cost_aware"

    @property
    def has_own_rollout(self) -> bool:
        """Whether requests run through our router, on leased replicas or on verl's own."""
        return self.pool.name != "off"

    @property
    def is_placement_fixed(self) -> bool:
        """Whether a request's replica follows from the batch alone."""
        return self.dispatcher.name == "stock" and self.migration.name == "off"

    def active(self) -> dict[str, str]:
        """Return ``{section: name}`` of what is not off; replay, pace and observer are named by their file."""
        parts = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        names = {section: getattr(part, "name", "off") for section, part in parts.items()}
        files = {"replay": self.replay.trace, "pace": self.instrument.pace, "observer": self.instrument.observer}
        return {key: name for key, name in {**names, **files}.items() if name not in _INACTIVE}


def parse_config(values: object) -> RlhflessConfig:
    """Return the checked configuration below the ``rlhfless`` key.

    Args:
        values: Its content as plain containers; ``None`` when the recipe has no such key (everything off).

    Raises:
        ConfigError: An unknown key, a value of the wrong type, or a broken rule.
    """
    return build(RlhflessConfig, {} if values is None else values, "rlhfless")
