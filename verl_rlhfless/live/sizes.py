"""Which tensor-parallel sizes a planned fleet may have. Light: the launching process asks before Ray starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verl_rlhfless.config import PlannerConfig
from verl_rlhfless.errors import ConfigError
from verl_rlhfless.policy.shapes import parse_model_config


def legal_sizes(planner: PlannerConfig, model: Mapping[str, Any], num_gpus: int) -> tuple[int, ...]:
    """Return the tensor-parallel sizes of a plan: those asked for, or every one that the model allows.

    Args:
        planner: The configuration.
        model: The model's ``config.json``.
        num_gpus: Most GPUs of a replica.

    Raises:
        ConfigError: A size that was asked for does not divide the model's heads, or is too large.
    """
    shape = parse_model_config(model, "the model's config.json")
    possible = shape.split_sizes(num_gpus)
    for tp in planner.tensor_parallel_sizes or ():
        if tp not in possible:
            states = f", {_listed(shape.state_heads)} heads of its layers with states" if shape.state_heads else ""
            seeing = f", and {_listed(shape.seeing)} of its vision encoder" if shape.seeing else ""
            rule = (
                f"{tp} must be at most {num_gpus} GPUs and divide the model's {shape.heads} heads{states} and "
                f"{_listed(shape.widths)} intermediate channels (KV heads: {shape.kv_heads}){seeing}"
            )
            key = "rlhfless.planner.tensor_parallel_sizes"
            raise ConfigError(key, list(planner.tensor_parallel_sizes or ()), rule, f"Possible: {list(possible)}.")
    return planner.tensor_parallel_sizes or possible


def _listed(numbers: tuple[int, ...]) -> str:
    return " and ".join(map(str, numbers))
