"""How many GPUs trainer and replicas may hold together. Light: the launching process asks before Ray starts."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf


def other_pools(run: Any) -> dict[str, int]:
    """Return the GPUs that verl's pools of reward and teacher models hold for the whole run, by their section.

    Args:
        run: verl's configuration.
    """
    reward = run.reward.reward_model
    has_pool = {
        "reward.reward_model": reward.enable and reward.enable_resource_pool,
        "distillation": OmegaConf.select(run, "distillation.enabled"),
    }
    sections = {key: OmegaConf.select(run, key) for key, is_there in has_pool.items() if is_there}
    return {key: section.n_gpus_per_node * section.nnodes for key, section in sections.items()}


def gpu_budget(run: Any, max_gpus: int | None, num_gpus: int) -> int:
    """Return the most GPUs that trainer and replicas may lease together.

    Args:
        run: verl's configuration.
        max_gpus: ``rlhfless.pool.max_gpus``; ``None`` = what verl's other pools leave of the cluster.
        num_gpus: Of the cluster.
    """
    return max(0, num_gpus - sum(other_pools(run).values())) if max_gpus is None else max_gpus
