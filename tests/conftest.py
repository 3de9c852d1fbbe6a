"""Shared by all tests: cheap folders run first; without a GPU, verl uses the CPU platform and GPU tests are skipped.

The platform is set before any test imports verl, and Ray clusters of tests inherit it. Configuration files of installed
packages are parsed once: hundreds of tests compose verl's recipe, and parsing took more than half of each composition.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins

TESTS = Path(__file__).parent
CHEAP_FIRST = ("unit", "property", "contract", "integration", "e2e")


def _has_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout


if not _has_gpu():
    os.environ.setdefault("VERL_PLATFORM", "cpu")


@pytest.fixture(scope="session", autouse=True)
def packaged_configuration_is_parsed_once() -> Iterator[None]:
    """Hydra gets a fresh copy of each parsed file, since it changes what it loads."""
    Plugins.instance()  # registers the kinds of sources
    packages = SourcesRegistry.instance().resolve("pkg")
    parse = packages.load_config

    @cache
    def parsed(provider: str, path: str, config_path: str) -> bytes:
        return pickle.dumps(parse(packages(provider, f"pkg://{path}"), config_path))

    def load_config(self: Any, config_path: str) -> Any:
        return pickle.loads(parsed(self.provider, self.path, config_path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packages, "load_config", load_config)
        yield


def _cost(item: pytest.Item) -> int:
    return CHEAP_FIRST.index(item.path.relative_to(TESTS).parts[0])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_cost)
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if needing and not _has_gpu():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; nvidia-smi lists none"))
