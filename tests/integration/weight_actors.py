"""A trainer and a server actor around a small torch model: what verl's processes do with weights, without vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import ray
import torch

from verl_rlhfless.errors import WeightStoreError
from verl_rlhfless.live.checksum import EngineChecksum
from verl_rlhfless.live.weights import PullReport

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers can't import a test module
WAIT_S = 60.0
HIDDEN, VOCAB = 64, 6400  # the embedding is larger than a bucket of 1 MiB


def state(seed: int) -> dict[str, torch.Tensor]:
    """Return weights with the names of a model that ties its head to its embedding."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed": (VOCAB, HIDDEN), "q": (HIDDEN, HIDDEN), "k": (16, HIDDEN), "v": (16, HIDDEN), "norm": (HIDDEN,)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**weights, "lm_head.weight": weights["embed"], "scalar": torch.tensor(float(seed))}


class Model(torch.nn.Module):
    """A model that concatenates q, k and v, as vLLM's do."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        shapes = {"embed": (VOCAB, HIDDEN), "qkv": (HIDDEN + 32, HIDDEN), "norm": (HIDDEN,), "scalar": ()}
        for name, shape in shapes.items():
            setattr(self, name, torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))
        self.model = torch.nn.Identity()  # verl looks for it
        self.skipped = {"lm_head.weight"}

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        rows = {"q": (0, HIDDEN), "k": (HIDDEN, 16), "v": (HIDDEN + 16, 16)}
        for name, tensor in weights:
            if name in self.skipped:
                continue
            target = self.qkv.narrow(0, *rows[name]) if name in rows else getattr(self, name)
            target.copy_(tensor)


def engine_config(tp: int, dtype: torch.dtype) -> Any:
    """Return what the worker extension reads of vLLM's configuration."""
    text_config = types.SimpleNamespace(tie_word_embeddings=True)
    model = types.SimpleNamespace(dtype=dtype, hf_text_config=text_config, quantization=None)
    model.word_embeddings_untied_by_checkpoint = False  # vLLM 0.29 and later ask for it
    return types.SimpleNamespace(
        model_config=model,
        parallel_config=types.SimpleNamespace(world_size=tp, tensor_parallel_size=tp),
        quant_config=None,
        lora_config=None,
        speculative_config=None,
    )


@ray.remote(num_cpus=0)
class Trainer:
    """One rank of a trainer, with verl's checkpoint engine."""

    async def join(self, store_name: str, is_master: bool = True, rollout_dtype: str = "auto") -> None:
        """Construct the engine as verl's worker does."""
        from verl.checkpoint_engine.base import CheckpointEngineRegistry

        from verl_rlhfless.live import weight_engine

        self.engine = CheckpointEngineRegistry.new(
            weight_engine.BACKEND,
            bucket_size=1 << 30,
            is_master=is_master,
            store_name=store_name,
            bucket_mib=1,
            timeout_s=WAIT_S,
            rollout_dtype=rollout_dtype,
        )

    async def split_above(self, num_bytes: int) -> None:
        """Lower the size above which a tensor is split over buckets."""
        from verl_rlhfless.live import weight_engine

        weight_engine._LARGEST_BUCKET_BYTES = num_bytes

    async def publish(self, version: int, fail_after: int | None = None) -> dict[str, Any]:
        """Publish ``state(version)``, or fail after some tensors."""

        def walk() -> Iterator[tuple[str, torch.Tensor]]:
            for index, item in enumerate(state(version).items()):
                if index == fail_after:
                    raise RuntimeError("the trainer failed in the middle")
                yield item

        report: dict[str, Any] = await self.engine.send_weights(walk(), global_steps=version)
        return report

    async def publish_this(self, version: int, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Publish other weights."""
        report: dict[str, Any] = await self.engine.send_weights(iter(weights.items()), global_steps=version)
        return report

    async def own_something(self) -> list[Any]:
        """Return a reference to an object that belongs to this process."""
        return [ray.put(torch.zeros(1 << 20).numpy())]

    async def receive(self, version: int) -> dict[str, torch.Tensor]:
        """Return what verl's CheckpointEngineWorker would load."""
        return {name: tensor.clone() async for name, tensor in self.engine.receive_weights(global_steps=version)}


@ray.remote(num_cpus=0)
class Server:
    """A server actor; its engine is our worker extension around a small model, without vLLM's processes."""

    async def start(self, tp: int = 1, dtype: torch.dtype = torch.float32) -> None:
        """Set the engine up anew."""
        os.environ["VERL_REPLICA_RANK"] = "7"
        os.environ["VERL_RAY_JOB_ID"] = ray.get_runtime_context().get_job_id()
        from verl_rlhfless.live.engine_worker import ElasticWorkerExtension

        class Worker(ElasticWorkerExtension):
            def __init__(self, rank: int) -> None:
                self.rank = self.local_rank = rank
                self.device = torch.device("cpu")
                self.model_runner = types.SimpleNamespace(model=Model(dtype), vllm_config=engine_config(tp, dtype))

        self.workers = [Worker.__new__(Worker) for _ in range(tp)]  # the extension's __new__ takes no rank
        for rank, worker in enumerate(self.workers):
            worker.__init__(rank)
        self.is_stuck = False

    async def collective_rpc(self, method: str, timeout: float, kwargs: dict[str, Any]) -> list[Any]:
        """Call every worker, as vLLM's engine does."""
        if self.is_stuck and method == "update_weights_from_ipc":
            await asyncio.Event().wait()
        calls = [asyncio.to_thread(getattr(worker, method), **kwargs) for worker in self.workers]
        return list(await asyncio.gather(*calls))

    async def pull(self, version: int, store_name: str, timeout_s: float) -> PullReport:
        from verl_rlhfless.live.weights import pull_into_engine

        return await pull_into_engine(self, version=version, store_name=store_name, timeout_s=timeout_s)

    async def paths_of_a_pull(self, version: int, store_name: str, timeout_s: float) -> list[str]:
        """Pull, and return the paths of the shared memory and the socket that it used."""
        from verl_rlhfless.live import weight_channel

        allocate, names = weight_channel.allocate, []

        def noted(num_bytes: int) -> Any:
            memory = allocate(num_bytes)
            names.append(memory.name)
            return memory

        weight_channel.allocate = noted
        try:
            with contextlib.suppress(WeightStoreError):
                await self.pull(version, store_name, timeout_s)
        finally:
            weight_channel.allocate = allocate
        handles = await self.collective_rpc("_get_zmq_handle", WAIT_S, {})
        return [f"/dev/shm/{name}" for name in names] + [handle.removeprefix("ipc://") for handle in handles]

    async def drop(self, name: str) -> None:
        """Make the model ignore a tensor without a word."""
        self.workers[0].model_runner.model.skipped.add(name)

    async def get_stuck(self) -> None:
        """Make the engine never answer."""
        self.is_stuck = True

    async def parameters(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.workers[0].model_runner.model.named_parameters()}

    async def checksums(self) -> list[EngineChecksum]:
        return [EngineChecksum(**worker.weights_checksum()) for worker in self.workers]
