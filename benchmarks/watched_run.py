"""A small real run on two declared GPUs while its processes are looked at."""

from __future__ import annotations

import subprocess
from pathlib import Path

from benchmarks.process_watch import Look, ProcessWatch
from verl_rlhfless.ab.arms import Arm
from verl_rlhfless.ab.cluster import CPU_HOST, HostSize, private_cluster
from verl_rlhfless.demo.assets import MODEL_SIZE, ModelSize, arithmetic_problems, build_assets
from verl_rlhfless.demo.run import DemoOptions, arm_command, arm_environment
from verl_rlhfless.live.observer import METRICS_FILE

NUM_GPUS = 2
SMALL_STEPS = (
    "data.train_batch_size=4",
    "data.max_response_length=16",
    "actor_rollout_ref.rollout.n=2",
    "actor_rollout_ref.rollout.max_model_len=528",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
)
"""Overrides of the demo's recipe: eight short samples in a step."""

_START_S = 600.0
_STEP_S = 60.0  # at most, like the time to the end of the first


def watched_run(
    arm: Arm, steps: int, folder: Path, model: ModelSize = MODEL_SIZE, host: HostSize = CPU_HOST
) -> list[Look]:
    """Train in a new folder and return a look at all processes for every second.

    Raises:
        SystemExit: The run failed.
    """
    folder.mkdir(parents=True)
    assets = build_assets(folder / "assets", arithmetic_problems(64, seed=1), seed=1, size=model)
    command = arm_command(arm.with_overrides(*SMALL_STEPS), assets, DemoOptions(out=folder, steps=steps), folder)
    with (
        private_cluster(NUM_GPUS, arm_environment(folder), host) as cluster,
        (folder / "train.log").open("w") as log,
        ProcessWatch(cluster, folder / METRICS_FILE) as watch,
    ):
        driver = subprocess.Popen(command, env=cluster.child_environment(), stdout=log, stderr=log)
        try:
            exit_code = driver.wait(_START_S + steps * _STEP_S)
        finally:
            driver.kill()
    if exit_code:
        raise SystemExit(f"{folder.name}: the run ended with {exit_code}; see {folder / 'train.log'}")
    return watch.looks
