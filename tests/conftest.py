"""Shared by all tests: cheap folders run first; without a GPU, verl uses the CPU platform and GPU tests are skipped.

The platform is set before any test imports verl, and Ray clusters of tests inherit it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CHEAP_FIRST = ("unit", "property", "contract", "integration", "e2e")


def _has_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout


if not _has_gpu():
    os.environ.setdefault("VERL_PLATFORM", "cpu")


def _cost(item: pytest.Item) -> int:
    return CHEAP_FIRST.index(item.path.relative_to(TESTS).parts[0])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_cost)
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if needing and not _has_gpu():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; nvidia-smi lists none"))
