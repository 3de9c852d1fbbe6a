"""The product's own weight path beside one engine: publish into a store in host memory, pull into the engine."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu.rows import Row
from verl_rlhfless.config import WeightsConfig
from verl_rlhfless.errors import WeightStoreError
from verl_rlhfless.live.variables import LEASE_VARIABLE
from verl_rlhfless.live.weight_engine import StoreCheckpointEngine
from verl_rlhfless.live.weight_store import create_store
from verl_rlhfless.live.weights import pull_into_engine

_STORE, _TIMEOUT_S = "gpu-kit", 300.0
_BUCKET_MIB = 256
_ROOM = 1.35  # of the weights: Ray spills above 80 %
_LEAST_BYTES = 2 * 10**9  # buckets in flight, however small the model is


async def pulled(engine: Any, model: Path, repeats: int) -> list[Row]:
    """Publish one version of the model's shape and return the rows of publishing and pulling it.

    Args:
        engine: vLLM's ``AsyncLLM`` with the elastic worker extension.
        model: Folder of the ``config.json``.
        repeats: How often the version is pulled.

    Raises:
        WeightStoreError: The weights do not fit into shared memory, or a pull failed.
    """
    shapes = _parameter_shapes(model)
    need = max(int(_ROOM * 2 * sum(map(math.prod, shapes.values()))), _LEAST_BYTES)
    free = shutil.disk_usage("/dev/shm").free
    if need > free:
        raise WeightStoreError(
            f"{need >> 20} MiB of /dev/shm needed, {free >> 20} MiB free. Enlarge it, and run again."
        )
    os.environ[LEASE_VARIABLE] = _STORE  # the replica's name in errors
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=need,
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        store = create_store(_STORE, WeightsConfig(name="store", bucket_mib=_BUCKET_MIB, max_versions=1))
        publisher = StoreCheckpointEngine(0, True, store_name=_STORE, bucket_mib=_BUCKET_MIB)
        sent = await publisher.send_weights(_random_weights(shapes), global_steps=1)
        reports = [
            await pull_into_engine(engine, version=1, store_name=_STORE, timeout_s=_TIMEOUT_S) for _ in range(repeats)
        ]
        ray.kill(store)
    finally:
        ray.shutdown()
    num_bytes = reports[0].num_bytes
    pulls = Row.of("pull", [report.seconds for report in reports], num_bytes=num_bytes)
    return [Row.of("publish", [sent["seconds"]], num_bytes=num_bytes), pulls]


def _parameter_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).named_parameters()  # a tied head is among them once
    return {name: tuple(parameter.shape) for name, parameter in parameters}


def _random_weights(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter as bfloat16; they share memory, because only the copies cost anything."""
    largest = torch.randn(max(map(math.prod, shapes.values())), dtype=torch.float32).to(torch.bfloat16) * 0.02
    for name, shape in shapes.items():
        yield name, largest[: math.prod(shape)].view(shape)
