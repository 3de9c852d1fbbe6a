"""Real vLLM engines of the demo's tiny model, as server actors without a trainer; for tests and benchmarks."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import ray

from verl_rlhfless.demo.assets import arithmetic_problems, build_assets
from verl_rlhfless.demo.recipe import CPU_ENVIRONMENT, common_overrides

_TIMEOUT_S = 300.0


class Engines:
    """Starts server actors whose engines hold the same weights.

    Args:
        folder: Where model and tokenizer are written.
        overrides: Further overrides of verl's configuration.
    """

    def __init__(self, folder: Path, *overrides: str) -> None:
        from hydra import compose, initialize_config_module

        assets = build_assets(folder / "assets", arithmetic_problems(64, seed=1), seed=1)
        common = common_overrides(assets, folder, steps=1, seed=1)[:-1]
        ours = ("load_format=auto", "engine_kwargs.vllm.num_gpu_blocks_override=512")  # 64 MiB of keys and values
        with initialize_config_module("verl.trainer.config", version_base=None):
            rollout = [f"++actor_rollout_ref.rollout.{override}" for override in ours]
            self.config = compose("ppo_trainer", [*common, *rollout, *overrides])
        self._num_started = 0

    async def start(self, server: Any = None) -> tuple[str, Any]:
        """Start an engine, on a new actor or on one whose engine has ended; return its address and the actor."""
        from verl.workers.rollout.replica import RolloutMode

        if server is None:
            server = warm_actor()
        rank, self._num_started = self._num_started, self._num_started + 1
        arguments = {
            "config": self.config.actor_rollout_ref.rollout,
            "model_config": self.config.actor_rollout_ref.model,
            "rollout_mode": RolloutMode.STANDALONE,
            "workers": [None],
            "replica_rank": rank,
            "node_rank": 0,
            "gpus_per_node": 1,
            "nnodes": 1,
            "cuda_visible_devices": "0",
        }

        async def start() -> tuple[str, int]:
            await server.become.remote({"RLHFLESS_LEASE": f"r{rank}"}, arguments)
            await server.launch_server.remote()
            await server.set_global_steps.remote(1)
            address: tuple[str, int] = await server.get_server_address.remote()
            return address

        ip, port = await asyncio.wait_for(start(), _TIMEOUT_S)
        return f"{ip}:{port}", server

    def logit_gap(self, context: list[int]) -> float:
        """Return how far the two best logits after ``context`` are apart, by a forward pass of the model."""
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.config.actor_rollout_ref.model.path)
        with torch.no_grad():
            best = model(torch.tensor([context])).logits[0, -1].topk(2).values
        return float(best[0] - best[1])


def warm_actor() -> Any:
    """Return a server actor that does its imports now."""
    from verl_rlhfless.live.warm_server import WarmServer

    environment = {**CPU_ENVIRONMENT, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    options = {"num_cpus": 0, "max_concurrency": 1000, "runtime_env": {"env_vars": environment}}
    return ray.remote(WarmServer).options(**options).remote()
