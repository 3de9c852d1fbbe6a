"""The elastic arm with a given fleet and nothing fused, for benchmarks and tests that look at one part alone."""

from __future__ import annotations

from verl_rlhfless.ab.arms import Arm
from verl_rlhfless.demo import recipe


def scheduled(*replicas: int) -> Arm:
    """Return the elastic arm with a trainer on two GPUs and so many replicas in each step, in turn."""
    return recipe.ELASTIC.with_overrides(
        "trainer.n_gpus_per_node=2",
        "rlhfless/planner=fixed",
        f"rlhfless.planner.schedule=[{','.join(map(str, replicas))}]",
        "rlhfless/fusion=off",
    )
