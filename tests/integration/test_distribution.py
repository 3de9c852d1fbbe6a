"""What pip installs from a wheel, and what an unpacked sdist holds."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT_S = 300.0

PRINT_COMPOSED = """
import verl_rlhfless
from hydra import compose, initialize_config_module
with initialize_config_module("verl.trainer.config", version_base=None):
    overrides = ["+rlhfless=default", "rlhfless.planner.schedule=[1,2]"]
    config = compose("ppo_trainer", overrides=overrides, return_hydra_config=True)
ours = [source.path for source in config.hydra.runtime.config_sources if source.provider == "verl_rlhfless"]
print(config.trainer.v1.trainer_mode, config.rlhfless.planner.schedule, *ours, verl_rlhfless.__file__)
"""


def _run(*command: str | Path, cwd: Path, **environ: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**os.environ, **environ},
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def _build(source: Path, kind: str, out: Path) -> Path:
    _run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", out, source, cwd=source)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Built from the unpacked sdist, as a package index's users get it."""
    yield _build(unpacked, "wheel", tmp_path_factory.mktemp("wheel"))


def test_the_sdist_can_run_both_commands(unpacked: Path) -> None:
    for name in ("Makefile", "README.md", "LICENSE", "requirements/cpu.txt", "requirements/vllm-stub/pyproject.toml"):
        assert (unpacked / name).is_file(), name
    for name in ("scripts/setup", "scripts/check", ".ci/run"):
        assert os.access(unpacked / name, os.X_OK), name
    assert (unpacked / "tests" / "integration" / Path(__file__).name).is_file()
    assert not (unpacked / ".venv").exists()


def test_the_wheel_holds_the_package_its_groups_and_its_patches_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    in_tree = {
        str(path.relative_to(ROOT))
        for folder in ("verl_rlhfless", "hydra_plugins", "hydra_configs")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".typed")
    }
    assert in_tree <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {
        "verl_rlhfless",
        "verl_rlhfless_patches",
        "hydra_plugins",
        "hydra_configs",
    }
    assert not {"hydra_plugins/__init__.py", "hydra_configs/__init__.py"} & names


def test_the_wheel_registers_with_verl_vllm_and_the_shell(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/entry_points.txt")]
        entry_points = archive.read(name).decode()
    assert "[verl.plugins]\nrlhfless = verl_rlhfless.live.plugin\n" in entry_points
    assert "[vllm.general_plugins]\nrlhfless = verl_rlhfless.live.vllm_plugin:install_in_vllm" in entry_points
    assert "[console_scripts]\nrlhfless = verl_rlhfless.cli:main" in entry_points


def test_the_group_is_found_from_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    installed, stack = (
        tmp_path / "installed",
        Path(sys.prefix) / "lib" / f"python3.{sys.version_info.minor}" / "site-packages",
    )
    _run(sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", installed, wheel, cwd=tmp_path)
    bare = tmp_path / "bare"  # its own site-packages are empty, and folders of PYTHONPATH process no editable installs
    _run(sys.executable, "-m", "venv", "--without-pip", bare, cwd=tmp_path)
    output = _run(
        bare / "bin" / "python", "-W", "ignore", "-c", PRINT_COMPOSED, cwd=tmp_path, PYTHONPATH=f"{installed}:{stack}"
    )
    groups = installed / "hydra_configs"
    assert output.split("\n")[-2] == f"rlhfless_sync [1, 2] {groups} {installed / 'verl_rlhfless' / '__init__.py'}"
