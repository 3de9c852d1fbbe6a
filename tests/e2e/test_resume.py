"""A run that is killed goes on from its checkpoint: the next prompts, its length history and its measured costs."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from verl_rlhfless.ab.cluster import private_cluster
from verl_rlhfless.demo import recipe
from verl_rlhfless.demo.assets import Assets
from verl_rlhfless.demo.run import DemoOptions, arm_command, arm_environment, run_arm

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1200)]

LENGTHS_FILE, COSTS_FILE = "rlhfless_lengths.json", "rlhfless_costs.json"
KILLED_AFTER = 2
SAMPLES = recipe.PROMPTS_PER_STEP * recipe.SAMPLES_PER_PROMPT


def _kill_after_checkpoint(command: list[str], folder: Path, checkpoints: Path) -> None:
    latest = checkpoints / "latest_checkpointed_iteration.txt"
    with private_cluster(recipe.NUM_GPUS, arm_environment(folder)) as cluster, (folder / "train.log").open("w") as log:
        driver = subprocess.Popen(command, env=cluster.child_environment(), stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 600
            while not (latest.exists() and int(latest.read_text()) >= KILLED_AFTER):
                assert driver.poll() is None, (folder / "train.log").read_text()[-3000:]
                assert time.monotonic() < deadline, f"no checkpoint of step {KILLED_AFTER} within 600 s"
                time.sleep(0.1)
        finally:
            driver.kill()
            driver.wait()


def _state(checkpoints: Path, step: int, name: str) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoints / f"global_step_{step}" / name).read_text())
    return state


def test_a_killed_run_goes_on_with_everything_that_it_had_learnt(assets: Assets, tmp_path: Path) -> None:
    checkpoints, killed = tmp_path / "checkpoints", tmp_path / "killed"
    killed.mkdir()
    arm = recipe.ELASTIC.with_overrides("trainer.save_freq=1", f"trainer.default_local_dir={checkpoints}")
    command = arm_command(arm, assets, DemoOptions(out=tmp_path, steps=50), killed)
    _kill_after_checkpoint(command, killed, checkpoints)
    last = int((checkpoints / "latest_checkpointed_iteration.txt").read_text())
    lengths, costs = (_state(checkpoints, last, name) for name in (LENGTHS_FILE, COSTS_FILE))

    resumed = run_arm(
        arm.with_overrides("trainer.resume_mode=auto"), assets, DemoOptions(out=tmp_path, steps=last + 1), print
    )
    assert resumed.exit_code == 0, resumed.why
    records = [json.loads(line) for line in (resumed.folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [last + 1]
    (lines,) = (path.read_text().splitlines() for path in resumed.folder.glob("samples-*.jsonl"))
    rows = {sample["row"] for sample in map(json.loads, lines) if "row" in sample}
    first = last * recipe.PROMPTS_PER_STEP
    assert rows == set(range(first, first + recipe.PROMPTS_PER_STEP)), "the prompts after those of the checkpoint"
    assert _state(checkpoints, last + 1, LENGTHS_FILE)["num_samples"] == lengths["num_samples"] + SAMPLES
    phases = _state(checkpoints, last + 1, COSTS_FILE)["latest"]["phases"]
    assert phases[:last] == costs["latest"]["phases"] and len(phases) == last + 1
