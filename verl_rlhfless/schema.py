"""How a section of ``rlhfless.*`` is declared and read: frozen dataclasses whose fields carry their rules.

Invariants: an unknown key, a value of the wrong type and a broken rule are each one ``ConfigError``; a section that
was constructed is valid.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from verl_rlhfless.errors import ConfigError

Rule = Callable[[str, Any], None]
"""Raises ``ConfigError`` if the value (second) of the key (first) breaks the rule."""
RULE = "rule"
"""Metadata key of a field's rule."""

_T = TypeVar("_T")


def what_to_do(name: str, known: Iterable[str], otherwise: str) -> str:
    """Return what to do about an unknown name: the known one that it resembles, in any case, or ``otherwise``."""
    spelled = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), spelled, n=1)
    return f"Did you mean {spelled[close[0]]}?" if close else otherwise


def one_of(*known: str) -> Any:
    """Return a field whose value is one of ``known``; the first one is the default."""

    def check(key: str, value: str) -> None:
        if value not in known:
            hint = what_to_do(value, known, f"Set {key} to one of these names.")
            raise ConfigError(key, value, f"must be one of {', '.join(known)}", hint)

    return field(default=known[0], metadata={RULE: check})


def within(low: float, high: float = math.inf, *, default: float | None) -> Any:
    """Return a field whose value is finite and in ``low .. high`` inclusive, or ``None`` where its type allows it."""

    def check(key: str, value: float | None) -> None:
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            limits = f">= {low:g}" if high == math.inf else f"in {low:g} .. {high:g}"
            raise ConfigError(
                key, value, f"must be a finite number {limits}", f"Set {key}={default or low:g}, for instance."
            )

    return field(default=default, metadata={RULE: check})


@dataclass(frozen=True, slots=True)
class Section:
    """A group of keys below ``KEY``; applies the rule of every field."""

    KEY: ClassVar[str]

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            rule: Rule | None = item.metadata.get(RULE)
            if rule is not None:
                rule(f"{self.KEY}.{item.name}", getattr(self, item.name))


def build(cls: type[_T], values: object, key: str) -> _T:
    """Return ``values`` (plain containers) as the section ``cls`` whose keys are below ``key``.

    Raises:
        ConfigError: An unknown key, a value of the wrong type, or a broken rule.
    """
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
        return build(typing.cast("type[Any]", hint), value, key)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and types.NoneType in options:
        return None
    kind = options[0]
    if typing.get_origin(kind) is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(key, value, "must be a list", f"Write {key}=[1,2,1,2].")
        return tuple(value)
    if kind is str and isinstance(value, bool):
        return "on" if value else "off"  # YAML 1.1 reads a bare `on` or `off` as a boolean
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigError(key, value, f"must be {_NOUNS[kind]}", f"Set {key} to {_NOUNS[kind]}.")
    return value


_NOUNS = {str: "a string", int: "an integer", float: "a number"}
