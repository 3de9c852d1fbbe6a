"""Options that name something shipped (a cluster, a model) or a JSON file that describes one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from verl_rlhfless.errors import ConfigError, DataError, why
from verl_rlhfless.schema import what_to_do

_T = TypeVar("_T")


def load(option: str, name_or_path: str, shipped: Mapping[str, _T], parse: Callable[[Any, str], _T], file: str) -> _T:
    """Return what an option names.

    Args:
        option: The option, for errors.
        name_or_path: Its value.
        shipped: What is shipped, by name.
        parse: Returns what a parsed file describes, given its path for errors.
        file: What kind of file it has to be, in words.

    Raises:
        ConfigError: An unknown name, or a key of the file whose value breaks a rule.
        DataError: The file cannot be read or is no JSON.
    """
    if name_or_path in shipped:
        return shipped[name_or_path]
    path, names = Path(name_or_path), ", ".join(shipped)
    if not path.is_file():
        if path.suffix == ".json":
            raise ConfigError(option, name_or_path, "no such file", f"Or choose one of {names}.")
        hint = what_to_do(name_or_path, shipped, "Choose one of them.")
        raise ConfigError(option, name_or_path, f"must be one of {names}, or {file}", hint)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {why(error)}. Give {file}.") from error
    return parse(values, str(path))
