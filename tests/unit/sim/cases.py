"""Small cells that the tests of the simulator share."""

from __future__ import annotations

import numpy as np

from verl_rlhfless.policy.gpus import GPUS
from verl_rlhfless.policy.shapes import MODELS
from verl_rlhfless.policy.snapshot import Batch
from verl_rlhfless.policy.transitions import LeaseTimes
from verl_rlhfless.sim.cell import Cell
from verl_rlhfless.sim.cluster import CLUSTERS, Cluster
from verl_rlhfless.sim.request import Request, chain_of
from verl_rlhfless.sim.workload import StepData


def steps(count: int, groups: int, n: int, mean: float = 400.0, seed: int = 0, cap: int = 8192) -> tuple[StepData, ...]:
    """Return steps with log-normal lengths; every step visits the same prompts."""
    rng = np.random.default_rng(seed)
    found = []
    for step in range(1, count + 1):
        lengths = np.clip(np.exp(rng.normal(np.log(mean), 0.9, groups * n)), 1, cap).astype(np.int64)
        batch = Batch(
            step=step,
            prompt_ids=tuple(f"p{i}" for i in range(groups)),
            group_of=np.repeat(np.arange(groups), n),
            prompt_tokens=np.full(groups * n, 120),
            max_response_tokens=cap,
        )
        found.append(StepData(batch, lengths))
    return tuple(found)


def request(sample: int, group: int, prompt: int, target: int) -> Request:
    """Return a request whose prompt only its group shares."""
    return Request(sample, prompt, target, chain_of(((group, prompt),)))


def cell(data: tuple[StepData, ...], cluster: str | Cluster = "l40s-16", **changes: float) -> Cell:
    """Return a cell with the 3B model."""
    chosen = CLUSTERS[cluster] if isinstance(cluster, str) else cluster
    return Cell(data, chosen, MODELS["qwen2.5-3b"], LeaseTimes(**changes))


TWO_GPUS = Cluster("two", GPUS["L40S"], 1, 2, 3.6)
