"""The one schema of ``rlhfless.*``. Values are checked here, once; past this module every field is valid.

Invariant: every key that the Hydra groups under ``hydra_configs/rlhfless`` set is a field here, and an unknown key is an error.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from verl_rlhfless.errors import ConfigError

TRAINER_MODE = "rlhfless_sync"
"""Value of ``trainer.v1.trainer_mode`` that selects the elastic trainer."""

_T = TypeVar("_T")


def _choice(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        close = difflib.get_close_matches(value, known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else "Choose one of them."
        raise ConfigError(key, value, f"must be one of {', '.join(known)}", hint)


def _at_least(key: str, value: float, low: float) -> None:
    if not value >= low:
        raise ConfigError(key, value, f"must be >= {low:g}", f"Set {key}={low:g} or more.")


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """``rlhfless.pool``: who leases GPUs, and how many at most."""

    name: str = "off"
    max_gpus: int | None = None
    grant_timeout_s: float = 300.0
    release_timeout_s: float = 30.0
    start_timeout_s: float = 600.0
    drain_timeout_s: float = 60.0
    same_device_wait_s: float = 30.0
    resume_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        _choice("rlhfless.pool.name", self.name, ("off", "elastic"))
        if self.max_gpus is not None:
            _at_least("rlhfless.pool.max_gpus", self.max_gpus, 1)
        for name in (
            "grant_timeout_s",
            "release_timeout_s",
            "start_timeout_s",
            "drain_timeout_s",
            "same_device_wait_s",
            "resume_timeout_s",
        ):
            _at_least(f"rlhfless.pool.{name}", getattr(self, name), 0.1)


@dataclass(frozen=True, slots=True)
class WeightsConfig:
    """``rlhfless.weights``: how a replica gets the trainer's weights."""

    name: str = "off"
    bucket_mib: int = 256
    max_versions: int = 2
    pull_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        _choice("rlhfless.weights.name", self.name, ("off", "store"))
        _at_least("rlhfless.weights.bucket_mib", self.bucket_mib, 1)
        if self.bucket_mib > 1024:
            raise ConfigError(
                "rlhfless.weights.bucket_mib", self.bucket_mib, "must be <= 1024", "Use buckets of at most 1 GiB."
            )
        if self.max_versions not in (1, 2):
            raise ConfigError(
                "rlhfless.weights.max_versions",
                self.max_versions,
                "must be 1 or 2",
                "Use 2: one version is served while the next one is published.",
            )
        _at_least("rlhfless.weights.pull_timeout_s", self.pull_timeout_s, 1)


@dataclass(frozen=True, slots=True)
class PlannerConfig:
    """``rlhfless.planner``: how many rollout replicas a step leases."""

    name: str = "off"
    schedule: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        _choice("rlhfless.planner.name", self.name, ("off", "fixed"))
        key, schedule = "rlhfless.planner.schedule", list(self.schedule)
        if not schedule:
            raise ConfigError(key, schedule, "must not be empty", "Give the number of replicas of each step, e.g. [1,2].")
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in schedule):
            raise ConfigError(key, schedule, "every entry must be an integer >= 1", "Write e.g. [1,2,1,2].")


@dataclass(frozen=True, slots=True)
class StageConfig:
    """A stage that this version knows only as switched off; later versions give it names."""

    name: str = "off"

    def __post_init__(self) -> None:
        _choice("rlhfless.<stage>.name", self.name, ("off",))


@dataclass(frozen=True, slots=True)
class ReplayConfig:
    """``rlhfless.replay``: force every response length from a recorded trace."""

    trace: str | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ConfigError("rlhfless.replay.scale", self.scale, "must be > 0", "Use 1.0 for the recorded lengths.")


@dataclass(frozen=True, slots=True)
class InstrumentConfig:
    """``rlhfless.instrument``: what every arm, stock too, is measured with."""

    pace: str | None = None
    observer: str | None = None


@dataclass(frozen=True, slots=True)
class RlhflessConfig:
    """The whole of ``rlhfless.*``."""

    pool: PoolConfig = field(default_factory=PoolConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    predictor: StageConfig = field(default_factory=StageConfig)
    dispatcher: StageConfig = field(default_factory=StageConfig)
    prefix_dedup: StageConfig = field(default_factory=StageConfig)
    migration: StageConfig = field(default_factory=StageConfig)
    fusion: StageConfig = field(default_factory=StageConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    instrument: InstrumentConfig = field(default_factory=InstrumentConfig)

    @property
    def is_elastic(self) -> bool:
        """Whether rollout replicas are leased in each step."""
        return self.pool.name == "elastic"

    def active(self) -> dict[str, str]:
        """Return ``{stage: name}`` of everything that is not off, for the start-up line."""
        named = {f.name: getattr(getattr(self, f.name), "name", "off") for f in dataclasses.fields(self)}
        return {stage: name for stage, name in named.items() if name != "off"}


def parse_config(values: Mapping[str, Any] | None) -> RlhflessConfig:
    """Return the checked configuration below the ``rlhfless`` key.

    Args:
        values: The resolved mapping, or ``None`` when the recipe has no ``rlhfless`` key (everything off).

    Raises:
        ConfigError: An unknown key, a value of the wrong type, or a broken rule; the message has key, value, rule, action.
    """
    config = _build(RlhflessConfig, values or {}, "rlhfless")
    together = {"pool": config.pool.name, "weights": config.weights.name, "planner": config.planner.name}
    if len({name == "off" for name in together.values()}) > 1:
        off = next(stage for stage, name in together.items() if name == "off")
        raise ConfigError(
            f"rlhfless.{off}.name",
            "off",
            f"pool, weights and planner work only together, and {together} mixes on and off",
            f"Set rlhfless/{off} as in +rlhfless=default, or use +rlhfless=off for stock verl.",
        )
    return config


def _build(cls: type[_T], values: Mapping[str, Any], prefix: str) -> _T:
    if not isinstance(values, Mapping):
        raise ConfigError(prefix, values, "must be a group of keys", "Compose it with +rlhfless=default.")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            close = difflib.get_close_matches(str(name), list(hints), n=1)
            action = f"Did you mean {prefix}.{close[0]}?" if close else f"Known keys: {', '.join(hints)}."
            raise ConfigError(f"{prefix}.{name}", values[name], "is not a known key", action)
    kwargs = {name: _convert(hints[name], value, f"{prefix}.{name}") for name, value in values.items()}
    try:
        return cls(**kwargs)
    except ConfigError as error:
        if "<stage>" not in error.key:
            raise
        raise ConfigError(f"{prefix}.name", error.value, error.rule, error.action) from None


def _convert(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, key)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = next(option for option in options if option is not type(None))
    if typing.get_origin(kind) is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(key, value, "must be a list", "Write e.g. [1,2,1,2].")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and value is False:
        return "off"  # YAML 1.1 reads a bare `off` as a boolean
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(key, value, f"must be of type {kind.__name__}", "Correct the value.")
    return value
