"""Which code a record is of: the commit of this package's own checkout, and whether anything differs from it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from verl_rlhfless.report import environment

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not there")
NONE = {"commit": None, "has_uncommitted_changes": None}


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=me", "-c", "user.email=me@here")
    return subprocess.run(
        ["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in ("code.py", "README.md", "benchmarks/results/policy.json"):
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("before")
    root = tmp_path / "checkout"
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    monkeypatch.setattr(environment, "_ROOT", root)
    yield root
    environment.code.cache_clear()


def code() -> dict[str, object]:
    environment.code.cache_clear()
    return environment.code()


def test_the_commit_of_an_unchanged_checkout(checkout: Path) -> None:
    assert code() == {"commit": git(checkout, "rev-parse", "--short", "HEAD"), "has_uncommitted_changes": False}


@pytest.mark.parametrize(
    ("name", "has_changed"),
    [("code.py", True), ("new.py", True), ("README.md", False), ("benchmarks/results/policy.json", False)],
)
def test_changed_code_is_told_but_not_text_and_records(name: str, has_changed: bool, checkout: Path) -> None:
    (checkout / name).write_text("after")
    assert code()["has_uncommitted_changes"] is has_changed


def test_a_package_that_lies_in_somebody_elses_repository_has_no_commit(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site_packages = checkout / ".venv" / "site-packages"
    site_packages.mkdir(parents=True)
    monkeypatch.setattr(environment, "_ROOT", site_packages)
    assert code() == NONE


def test_without_git_or_a_repository_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    assert code() == NONE
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code() == NONE
    environment.code.cache_clear()


def test_the_first_call_counts(checkout: Path) -> None:
    first = code()
    (checkout / "code.py").write_text("after")
    assert environment.code() == first


def test_the_gpus_of_a_host_are_those_that_its_driver_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    told = tmp_path / "nvidia-smi"
    for text, names in [("echo NVIDIA L40S; echo NVIDIA L40S", ["NVIDIA L40S"] * 2), ("echo no driver; exit 9", [])]:
        told.write_text(f"#!/bin/sh\n{text}\n")
        told.chmod(0o755)
        assert environment.gpu_names() == names
    told.unlink()
    assert environment.gpu_names() == [] or shutil.which("nvidia-smi")
