"""The versions that this package is written for, read from the metadata of what is installed.

Invariant: the ranges agree with ``pyproject.toml``. What a range can't promise is probed by feature
(``live/seams.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from verl_rlhfless.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Requirement:
    """A distribution that a run needs, and the versions of it that are supported."""

    distribution: str
    supported: str
    tested: str


REQUIREMENTS = (
    Requirement("verl", ">=0.9.1,<0.10", "0.9.1"),
    # 0.24.0 is what verl[vllm] 0.9.1 selects; 0.32 asks for a transformers that verl 0.9.1 excludes
    Requirement("vllm", ">=0.24,<0.32", "0.24.0, 0.28.0 and 0.31.0 on CPU"),
    Requirement("ray", ">=2.52,<3", "2.60.0"),  # 2.52 brought token authentication
    Requirement("hydra-core", ">=1.3.6,<1.4", "1.3.8"),  # 1.3.6 restricts what a configuration may instantiate
)


def installed_version(distribution: str) -> str | None:
    """Return the installed version of ``distribution``, or ``None`` if it is missing."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def check_requirement(requirement: Requirement) -> str:
    """Return the installed version.

    Raises:
        UnsupportedError: It is missing or outside the supported range.
    """
    name, supported = requirement.distribution, requirement.supported
    action = f"Install one with: pip install '{name}{supported}' (tested: {requirement.tested})."
    found = installed_version(name)
    if found is None:
        raise UnsupportedError(f"{name} is not installed; supported is {name}{supported}. {action}")
    if not SpecifierSet(supported).contains(found, prereleases=True):
        raise UnsupportedError(f"{name}={found}: outside the supported range {supported}. {action}")
    return found
