"""Does anything grow? A long elastic run beside a long run of stock verl: host memory, processes and open files.

Real runs of the demo's model on two declared GPUs. Every elastic step leases one or two replicas in turn, so that
engines are parked, woken and left over, the trainer leaves and comes back, and one weight version follows another.
A figure's growth is its median over the last third of the steps minus that over the middle third, for each step.

    python -m benchmarks.soak [--steps 45]    # about 13 minutes, 12 GB of memory; writes benchmarks/results/soak.json
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.process_watch import Look
from benchmarks.record import write_result
from benchmarks.watched_run import NUM_GPUS, watched_run
from verl_rlhfless.demo import recipe

_STEPS = 45
_ELASTIC = (f"rlhfless.pool.max_gpus={NUM_GPUS}", "rlhfless/planner=fixed", "rlhfless.planner.schedule=[1,2]")
_TRAINER = f"trainer.n_gpus_per_node={NUM_GPUS}"
ARMS = (recipe.STOCK.with_overrides(_TRAINER), recipe.ELASTIC.with_overrides(_TRAINER, *_ELASTIC))


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
        results = {
            "steps": steps,
            **{arm.name: growth(watched_run(arm, steps, Path(out) / arm.name), steps) for arm in ARMS},
        }
    write_result("soak", results, command=f"python -m benchmarks.soak --steps {steps}", num_gpus=NUM_GPUS)


if __name__ == "__main__":
    main()
