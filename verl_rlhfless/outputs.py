"""Refuses output files and folders that cannot be written, before anything is computed.

Invariant: what cannot be written is one ``ConfigError`` with the option's name; a check leaves nothing behind.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from verl_rlhfless.errors import ConfigError


def check_file(key: str, path: Path, inputs: Collection[Path] = ()) -> None:
    """Refuse a file that cannot be written, or that is one of the files which the command reads or writes as well.

    Raises:
        ConfigError: See above.
    """
    if path.is_dir():
        raise ConfigError(key, str(path), "is a folder", "Give the name of a file.")
    if not path.resolve().parent.is_dir():
        raise ConfigError(key, str(path), "its folder does not exist", "Create it, or write elsewhere.")
    if path.resolve() in [one.resolve() for one in inputs]:
        raise ConfigError(key, str(path), "is another file of the same command", "Write elsewhere.")
    if path.exists():
        if not os.access(path, os.W_OK):
            raise ConfigError(key, str(path), "cannot be written", "Write elsewhere.")
        return
    _check_new_file(key, path, path.resolve().parent)


def check_folder(key: str, path: Path) -> None:
    """Refuse a folder that cannot be made, or in which no file can be.

    Raises:
        ConfigError: See above.
    """
    nearest = next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.exists())
    if not nearest.is_dir():
        rule = "is a file" if nearest == path.resolve() else f"{nearest} is a file"
        raise ConfigError(key, str(path), rule, "Name a folder.")
    _check_new_file(key, path, nearest)


@contextmanager
def writing(key: str, path: Path) -> Iterator[None]:
    """Name the option whose file could not be written.

    Raises:
        ConfigError: The body raised ``OSError``, such as on a full disk.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(key, str(path), f"cannot be written: {error.strerror}", "Write elsewhere.") from error


def _check_new_file(key: str, path: Path, folder: Path) -> None:
    with writing(key, path), tempfile.TemporaryFile(dir=folder):
        pass
