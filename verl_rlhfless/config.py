"""The one schema of ``rlhfless.*``. Values are checked here, once; past this module every field is valid.

Invariants: every key that the Hydra groups under ``hydra_configs/rlhfless`` set is a field here, and an unknown key is
an error. A field carries its rule beside its default, so a section is its own documentation.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from verl_rlhfless.errors import ConfigError

TRAINER_MODE = "rlhfless_sync"
"""Value of ``trainer.v1.trainer_mode`` that selects the elastic trainer."""

_Rule = Callable[[str, Any], None]
"""Raises ``ConfigError`` if the value (second) of the key (first) breaks the rule."""
_RULE = "rule"

_T = TypeVar("_T")


def _one_of(*known: str) -> Any:
    """Return a field whose value is one of ``known``; the first one is the default."""

    def check(key: str, value: str) -> None:
        if value not in known:
            close = difflib.get_close_matches(value, known, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"Set {key} to one of these names."
            raise ConfigError(key, value, f"must be one of {', '.join(known)}", hint)

    return field(default=known[0], metadata={_RULE: check})


def _within(low: float, high: float = math.inf, *, default: float | None) -> Any:
    """Return a field whose value is finite and in ``low .. high`` inclusive, or ``None`` where its type allows it."""

    def check(key: str, value: float | None) -> None:
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            limits = f">= {low:g}" if high == math.inf else f"in {low:g} .. {high:g}"
            raise ConfigError(
                key, value, f"must be a finite number {limits}", f"Set {key}={default or low:g}, for instance."
            )

    return field(default=default, metadata={_RULE: check})


def _check_schedule(key: str, value: tuple[Any, ...]) -> None:
    if not value:
        raise ConfigError(key, [], "must not be empty", f"Give the number of replicas of each step: {key}=[1,2].")
    wrong = [n for n in value if isinstance(n, bool) or not isinstance(n, int) or n < 1]
    if wrong:
        raise ConfigError(
            key, list(value), f"every entry must be an integer >= 1, and {wrong[0]!r} is not", f"Write {key}=[1,2,1,2]."
        )


@dataclass(frozen=True, slots=True)
class _Section:
    """A group of keys below ``KEY``; applies the rule of every field."""

    KEY: ClassVar[str]

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            if _RULE in item.metadata:
                item.metadata[_RULE](f"{self.KEY}.{item.name}", getattr(self, item.name))


@dataclass(frozen=True, slots=True)
class PoolConfig(_Section):
    """Who leases GPUs, how many at most, and how long each part of a lease may take.

    ``max_gpus`` counts the trainer's GPUs and the replicas' together; ``None`` sets no limit of our own.
    """

    KEY: ClassVar[str] = "rlhfless.pool"
    name: str = _one_of("off", "elastic")
    max_gpus: int | None = _within(1, default=None)
    grant_timeout_s: float = _within(0.1, default=300.0)
    release_timeout_s: float = _within(0.1, default=30.0)
    start_timeout_s: float = _within(0.1, default=600.0)
    drain_timeout_s: float = _within(0.1, default=60.0)
    same_device_wait_s: float = _within(0.1, default=30.0)
    resume_timeout_s: float = _within(0.1, default=600.0)


@dataclass(frozen=True, slots=True)
class WeightsConfig(_Section):
    """How a replica gets the trainer's weights.

    ``max_versions`` is 2 so that one version is served while the next one is published.
    """

    KEY: ClassVar[str] = "rlhfless.weights"
    name: str = _one_of("off", "store")
    bucket_mib: int = _within(1, 1024, default=256)
    max_versions: int = _within(1, 2, default=2)
    pull_timeout_s: float = _within(1, default=300.0)


@dataclass(frozen=True, slots=True)
class PlannerConfig(_Section):
    """How many rollout replicas a step leases: ``schedule`` repeats when the run has more steps than entries."""

    KEY: ClassVar[str] = "rlhfless.planner"
    name: str = _one_of("off", "fixed")
    schedule: tuple[int, ...] = field(default=(1,), metadata={_RULE: _check_schedule})


@dataclass(frozen=True, slots=True)
class PredictorConfig(_Section):
    """Response lengths are not predicted in this version."""

    KEY: ClassVar[str] = "rlhfless.predictor"
    name: str = _one_of("off")


@dataclass(frozen=True, slots=True)
class DispatcherConfig(_Section):
    """Requests reach replicas by verl's own load balancer in this version."""

    KEY: ClassVar[str] = "rlhfless.dispatcher"
    name: str = _one_of("off")


@dataclass(frozen=True, slots=True)
class PrefixDedupConfig(_Section):
    """Shared prefixes are left to vLLM's prefix cache in this version."""

    KEY: ClassVar[str] = "rlhfless.prefix_dedup"
    name: str = _one_of("off")


@dataclass(frozen=True, slots=True)
class MigrationConfig(_Section):
    """A sample stays on its replica in this version."""

    KEY: ClassVar[str] = "rlhfless.migration"
    name: str = _one_of("off")


@dataclass(frozen=True, slots=True)
class FusionConfig(_Section):
    """Inference on finished samples starts after the rollout in this version."""

    KEY: ClassVar[str] = "rlhfless.fusion"
    name: str = _one_of("off")


@dataclass(frozen=True, slots=True)
class ReplayConfig(_Section):
    """Forces every response length from the recorded trace ``trace`` (a path), multiplied by ``scale``."""

    KEY: ClassVar[str] = "rlhfless.replay"
    trace: str | None = None
    scale: float = _within(1e-3, 1e3, default=1.0)


@dataclass(frozen=True, slots=True)
class InstrumentConfig(_Section):
    """What every arm, stock too, is measured with: paths of a pacing profile and of the observer's record."""

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
        together = {section.KEY: section.name for section in (self.pool, self.weights, self.planner)}
        off = [key for key, name in together.items() if name == "off"]
        if 0 < len(off) < len(together):
            state = ", ".join(f"{key}.name={name}" for key, name in together.items())
            raise ConfigError(
                f"{off[0]}.name",
                "off",
                f"pool, weights and planner work only together ({state})",
                "Start from +rlhfless=default, or use +rlhfless=off for stock verl.",
            )

    @property
    def is_elastic(self) -> bool:
        """Whether rollout replicas are leased in each step."""
        return self.pool.name == "elastic"

    def active(self) -> dict[str, str]:
        """Return ``{section: name}`` of what is not off; replay, pace and observer are named by their file."""
        parts = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        names = {section: getattr(part, "name", "off") for section, part in parts.items()}
        files = {"replay": self.replay.trace, "pace": self.instrument.pace, "observer": self.instrument.observer}
        return {key: name for key, name in {**names, **files}.items() if name not in ("off", None)}


def parse_config(values: object) -> RlhflessConfig:
    """Return the checked configuration below the ``rlhfless`` key.

    Args:
        values: Its content as plain containers; ``None`` when the recipe has no such key (everything off).

    Raises:
        ConfigError: An unknown key, a value of the wrong type, or a broken rule.
    """
    return _build(RlhflessConfig, {} if values is None else values, "rlhfless")


def _build(cls: type[_T], values: object, key: str) -> _T:
    if not isinstance(values, Mapping):
        group = key.replace(".", "/")
        raise ConfigError(
            key, values, "must be a group of keys, not one value", f"Choose the group with a slash: {group}=NAME."
        )
    hints = typing.get_type_hints(cls)
    known = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            action = f"Did you mean {key}.{close[0]}?" if close else f"Known keys: {', '.join(known)}."
            raise ConfigError(f"{key}.{name}", values[name], "is not a known key", action)
    return cls(**{name: _convert(hints[name], value, f"{key}.{name}") for name, value in values.items()})


def _convert(hint: Any, value: Any, key: str) -> Any:
    """Return ``value`` as the annotated type ``hint``: a section, a tuple, or a scalar that may be ``None``."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast("type[Any]", hint), value, key)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and types.NoneType in options:
        return None
    kind = options[0]
    if typing.get_origin(kind) is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(key, value, "must be a list", f"Write {key}=[1,2,1,2].")
        return tuple(value)
    if kind is str and value is False:
        return "off"  # YAML 1.1 reads a bare `off` as a boolean
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigError(key, value, f"must be {_NOUNS[kind]}", f"Set {key} to {_NOUNS[kind]}.")
    return value


_NOUNS = {str: "a string", int: "an integer", float: "a number"}
