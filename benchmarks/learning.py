"""Does a model learn the same on elastic replicas? GRPO on arithmetic, two declared GPUs, stock verl beside elastic.

Lengths are the model's own. A seed makes model, data and sampling; one run is one real verl run on the CPU, about six
minutes, and those that have finished are kept. Every run must rise, and the mean rewards of both arms at the end must
be no further apart than the seeds of stock verl are.

python -m benchmarks.learning --out OUT [--seeds 1,2,3] [--steps 60] [--plot benchmarks/results/learning.png]

Writes benchmarks/results/learning.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.record import Code, Part, keep, write_result
from verl_rlhfless.ab.arms import Arm
from verl_rlhfless.demo import recipe
from verl_rlhfless.demo.assets import arithmetic_problems, build_assets
from verl_rlhfless.demo.run import DemoOptions, run_arm
from verl_rlhfless.report.ab import build_arm

GPUS = 2
_BUDGET = f"trainer.n_gpus_per_node={GPUS}"
ARMS = {
    "stock": recipe.STOCK.with_overrides(_BUDGET),
    "elastic": recipe.ELASTIC.with_overrides(_BUDGET, f"rlhfless.pool.max_gpus={GPUS}"),
}
PROBLEMS = 256
WINDOW = 10
"""Steps over which a reward is averaged at the start and at the end of a run."""


def learnt(rewards: Sequence[float]) -> tuple[float, float]:
    """Return the mean reward of the first and of the last steps of a run."""
    return fmean(rewards[:WINDOW]), fmean(rewards[-WINDOW:])


def compare(runs: Mapping[str, Mapping[int, Sequence[float]]]) -> dict[str, Any]:
    """Return what both arms learnt, and whether that is the same.

    Args:
        runs: Mean reward of each step, by arm and seed.
    """
    arms = {}
    for arm, seeds in runs.items():
        first, last = zip(*(learnt(rewards) for rewards in seeds.values()), strict=True)
        arms[arm] = {
            "first": dict(zip(seeds, first, strict=True)),
            "last": dict(zip(seeds, last, strict=True)),
            "mean_last": fmean(last),
            "spread_last": max(last) - min(last),
            "is_risen": all(end > start for start, end in zip(first, last, strict=True)),
        }
    apart = abs(arms["elastic"]["mean_last"] - arms["stock"]["mean_last"])
    spread = arms["stock"]["spread_last"]  # not elastic's: an arm that scatters must not widen its own tolerance
    return {
        "arms": arms,
        "apart": apart,
        "spread": spread,
        "is_met": apart <= spread and all(arm["is_risen"] for arm in arms.values()),
    }


def rewards_of(arm: Arm, seed: int, steps: int, out: Path) -> Part:
    """Return the mean reward of every step, of an earlier run if there is one."""
    folder = out / f"seed-{seed}"

    def train() -> list[float | None]:
        """Return the mean reward of every step of a new run."""
        assets = build_assets(folder / "assets", arithmetic_problems(PROBLEMS, seed), seed)
        ended = run_arm(arm, assets, DemoOptions(out=folder, steps=steps, seed=seed), print)
        told = f"{arm.name}, seed {seed}: see {ended.folder}/train.log"
        if ended.exit_code:
            raise SystemExit(f"{told}; verl ended with {ended.exit_code}")
        means = [step.figures.reward_mean for step in build_arm(ended.folder).steps]
        if len(means) != steps or None in means:
            raise SystemExit(f"{told}; {len(means)} of {steps} steps were recorded")
        return means

    settings = {"overrides": arm.overrides, "steps": steps, "problems": PROBLEMS, "seed": seed}
    return keep(folder / arm.name / "rewards.json", settings, train)


def draw(runs: Mapping[str, Mapping[int, Sequence[float]]], path: Path) -> None:
    """Write the curves: every seed thin, each arm's mean thick; moving means over the window."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.5))
    for colour, (arm, seeds) in zip(("C0", "C1"), runs.items(), strict=True):
        curves = [[fmean(r[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(r))] for r in seeds.values()]
        for curve in curves:
            axis.plot(range(1, len(curve) + 1), curve, color=colour, linewidth=0.8, alpha=0.5)
        mean = [fmean(at) for at in zip(*curves, strict=True)]
        label = f"{arm}, mean of {len(curves)} seeds"
        axis.plot(range(1, len(mean) + 1), mean, color=colour, linewidth=2.5, label=label)
    axis.set(xlabel="training step", ylabel=f"mean reward, over the last {WINDOW} steps")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    """Train both arms with each seed and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    if options.steps < 2 * WINDOW:
        parser.error(f"--steps must be at least {2 * WINDOW}: the first and the last {WINDOW} are compared")
    runs: dict[str, dict[int, list[float]]] = {name: {} for name in ARMS}
    parts: dict[str, Code] = {}
    for seed in seeds:
        for name, arm in ARMS.items():
            part = rewards_of(arm, seed, options.steps, options.out.resolve())
            runs[name][seed], parts[f"{name}, seed {seed}"] = part
            first, last = learnt(runs[name][seed])
            print(f"{name}, seed {seed}: mean reward {first:.3f} in the first {WINDOW} steps, {last:.3f} in the last")
    if options.plot:
        draw(runs, options.plot)
    command = f"python -m benchmarks.learning --out OUT --seeds {options.seeds} --steps {options.steps}"
    results = {"steps": options.steps, "window": WINDOW, **compare(runs), "rewards": runs}
    write_result("learning", results, command=command, num_gpus=GPUS, parts=parts)


if __name__ == "__main__":
    main()
