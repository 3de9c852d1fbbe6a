"""Bad input through the real ``python -m verl.trainer.main_ppo``: one clear line, and no process left.

What the start-up check refuses is in ``tests/unit/test_startup.py``; each run here imports all of verl.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

LIMIT_S = 300.0
MARK = "RLHFLESS_TEST_RUN"


def _processes_of(run: str) -> list[str]:
    """Return the command lines of living processes that inherited the environment of ``run``."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == run:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def _start(tmp_path: Path, *overrides: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "verl.trainer.main_ppo", f"hydra.run.dir={tmp_path}", *overrides]
    run = str(tmp_path)
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        cwd=tmp_path,
        env={**os.environ, "VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", MARK: run, **environ},
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert _processes_of(run) == []
    return result


VLLM = "actor_rollout_ref.rollout.name=vllm"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["trainer.v1.trainer_mode=sync"],
            ["trainer.v1.trainer_mode='sync'", "must be rlhfless_sync", "the override 'trainer.v1.trainer_mode=sync'"],
        ),
        ([VLLM, "data.train_files=/nowhere.parquet"], ["data.train_files='/nowhere.parquet'", "is missing"]),
    ],
    ids=["first check", "one of the last"],
)
def test_main_ppo_ends_with_one_line(tmp_path: Path, overrides: list[str], parts: list[str]) -> None:
    result = _start(tmp_path, "+rlhfless=default", *overrides)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "rlhfless: error:" in line]
    for part in parts:
        assert part in line


def test_an_unknown_planner_group_lists_the_known_ones(tmp_path: Path) -> None:
    result = _start(tmp_path, "+rlhfless=default", "rlhfless/planner=magic")
    assert result.returncode == 1
    assert "Could not find 'rlhfless/planner/magic'" in result.stderr
    assert "fixed" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_composed_configuration_can_be_looked_at(tmp_path: Path) -> None:
    result = _start(
        tmp_path, "+rlhfless=default", "rlhfless.planner.schedule=[1,2]", "--cfg", "job", "--package", "rlhfless"
    )
    assert result.returncode == 0
    assert "max_gpus: null" in result.stdout
    assert "name: elastic" in result.stdout
