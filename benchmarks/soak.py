"""Does anything grow? A long elastic run beside a long run of stock verl: host memory, processes and open files.

Real runs of the demo's model on two declared GPUs. Every elastic step leases one or two replicas in turn, so that
engines are parked, woken and left over, the trainer leaves and comes back, and one weight version follows another.
A figure's growth is its median over the last third of the steps minus that over the middle third, for each step.

    python -m benchmarks.soak [--steps 90]    # about 20 minutes, 12 GB of memory; writes benchmarks/results/soak.json
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.process_watch import Look, ProcessWatch
from benchmarks.record import write_result
from verl_rlhfless.ab.arms import Arm
from verl_rlhfless.ab.cluster import private_cluster
from verl_rlhfless.demo import recipe
from verl_rlhfless.demo.assets import arithmetic_problems, build_assets
from verl_rlhfless.demo.run import DemoOptions, arm_command, arm_environment
from verl_rlhfless.live.observer import METRICS_FILE

_GPUS = 2
_STEPS = 90
_TIMEOUT_S = 3600.0
_LOOK_S = 2.0
_OVERRIDES = (
    f"trainer.n_gpus_per_node={_GPUS}",
    "data.train_batch_size=4",
    "data.max_response_length=16",
    "actor_rollout_ref.rollout.n=2",
    "actor_rollout_ref.rollout.max_model_len=528",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
)
_ELASTIC = (f"rlhfless.pool.max_gpus={_GPUS}", "rlhfless/planner=fixed", "rlhfless.planner.schedule=[1,2]")
ARMS = (recipe.STOCK.with_overrides(*_OVERRIDES), recipe.ELASTIC.with_overrides(*_OVERRIDES, *_ELASTIC))


def measure(arm: Arm, steps: int, out: Path) -> dict[str, Any]:
    """Train, and return what grew.

    Raises:
        SystemExit: The run failed.
    """
    folder = out / arm.name
    folder.mkdir(parents=True)
    assets = build_assets(folder / "assets", arithmetic_problems(64, seed=1), seed=1)
    command = arm_command(arm, assets, DemoOptions(out=folder, steps=steps), folder)
    with (
        private_cluster(_GPUS, arm_environment(folder)) as cluster,
        (folder / "train.log").open("w") as log,
        ProcessWatch(cluster, folder / METRICS_FILE, _LOOK_S) as watch,
    ):
        driver = subprocess.Popen(command, env=cluster.child_environment(), stdout=log, stderr=log)
        try:
            exit_code = driver.wait(_TIMEOUT_S)
        finally:
            driver.kill()
    if exit_code:
        raise SystemExit(f"{arm.name}: the run ended with {exit_code}; see {folder / 'train.log'}")
    return growth(watch.looks, steps)


def growth(looks: Sequence[Look], steps: int) -> dict[str, Any]:
    """Return what the processes hold at the end, and by how much each figure grows in a step.

    Raises:
        SystemExit: A third of the run was too short to be looked at.
    """
    last = [look for look in looks if 2 * steps / 3 <= look.steps_done < steps]
    middle = [look for look in looks if steps / 3 <= look.steps_done < 2 * steps / 3]
    if not (middle and last):
        raise SystemExit(f"{steps} steps are too few to see growth. Give more --steps.")
    kinds = sorted({kind for look in last for kind in look.pss_bytes})

    def held(figure: Callable[[Look], int]) -> dict[str, float]:
        at_end = median(map(figure, last))
        return {"at_end": at_end, "growth_per_step": (at_end - median(map(figure, middle))) / (steps / 3)}

    return {
        "pss_bytes": held(lambda look: look.total_bytes),
        "num_processes": held(lambda look: sum(look.counts.values())),
        "num_files": held(lambda look: sum(look.num_files.values())),
        "pss_bytes_by_kind": {kind: held(lambda look, kind=kind: look.pss_bytes.get(kind, 0)) for kind in kinds},
    }


def main() -> None:
    """Train both arms and write what grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=_STEPS)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as out:
        results = {"steps": steps, **{arm.name: measure(arm, steps, Path(out)) for arm in ARMS}}
    write_result("soak", results, command=f"python -m benchmarks.soak --steps {steps}", num_gpus=_GPUS)


if __name__ == "__main__":
    main()
