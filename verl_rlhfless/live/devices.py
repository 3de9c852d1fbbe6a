"""How fast the replicas of a run are, as the ``PoolSnapshot`` that policies read.

On a GPU the figures are those of its data sheet. A paced replica is exactly as fast as its pace declares, so its
performance model has to reproduce ``PaceModel.iteration_s``. A CPU that is not paced counts as the one on which the
demo's model was measured.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace

from verl_rlhfless.live.pacing import PaceModel
from verl_rlhfless.policy.gpus import GPUS, GpuType
from verl_rlhfless.policy.perf import BLOCK_TOKENS, Efficiencies, EngineLimits, EnginePerf
from verl_rlhfless.policy.shapes import ModelShape
from verl_rlhfless.policy.snapshot import PoolSnapshot
from verl_rlhfless.policy.transitions import TrainerPerf

logger = logging.getLogger(__name__)

UNPACED_CPU = PaceModel(base_ms=8.0, per_request_ms=0.3, per_prefill_token_ms=0.05)
"""One vLLM-CPU engine of the demo's model on one core."""

_ACCELERATOR_RESOURCE = "accelerator_type:"  # Ray's resource that names a node's GPU
_NEVER = 1e-9  # seconds per token of what costs nothing: the model divides by it
_FAST_LINK = 1e15  # bytes per second: a declared device says nothing of copies
_KV_HEADS = 10**6  # so many that reading the declared model's weights takes as long as one token's keys and values


@dataclass(frozen=True, slots=True)
class PoolBounds:
    """What bounds the replicas of a run.

    Attributes:
        tps: Tensor-parallel sizes.
        num_gpus: GPUs that all replicas together may hold.
        gpus_per_node: GPUs of a node.
        limits: Of every engine.
        kv_tokens: Tokens of keys and values that a replica on a declared device holds; a GPU's follow from its memory.
    """

    tps: tuple[int, ...]
    num_gpus: int
    gpus_per_node: int
    limits: EngineLimits
    kv_tokens: int


def declared_pool(bounds: PoolBounds, pace: PaceModel) -> PoolSnapshot:
    """Return a pool of replicas whose iterations take exactly what ``pace`` declares."""
    perf = {tp: _declared_perf(bounds, pace, tp) for tp in bounds.tps}
    any_perf = next(iter(perf.values()))
    trainer = TrainerPerf(any_perf.shape, any_perf.gpu, bounds.num_gpus, bounds.gpus_per_node)
    return PoolSnapshot(bounds.num_gpus, bounds.gpus_per_node, perf, trainer)


def gpu_pool(bounds: PoolBounds, shape: ModelShape, gpu: GpuType) -> PoolSnapshot:
    """Return a pool of replicas of a model on one type of GPU."""
    perf = {tp: EnginePerf(shape, gpu, tp, limits=bounds.limits) for tp in bounds.tps}
    trainer = TrainerPerf(shape, gpu, bounds.num_gpus, bounds.gpus_per_node)
    return PoolSnapshot(bounds.num_gpus, bounds.gpus_per_node, perf, trainer)


def gpu_types(resources: Iterable[str]) -> list[str]:
    """Return the types of GPU that Ray's cluster resources name."""
    found = {name.removeprefix(_ACCELERATOR_RESOURCE) for name in resources if name.startswith(_ACCELERATOR_RESOURCE)}
    return sorted(found)


def warn_of_several_types(resources: Iterable[str]) -> None:
    """Tell the user that a lease may be of a type that the recipe was not made for: Ray grants GPUs of any."""
    types = gpu_types(resources)
    if len(types) > 1:
        logger.warning(
            "rlhfless: the cluster has GPUs of several types (%s). Replicas and trainer may be granted any, and "
            "plans count with %s. Give the run a cluster whose nodes have one type of GPU.",
            ", ".join(types),
            types[0],
        )


def find_gpu(resources: Iterable[str], device_bytes: int = 0) -> GpuType | None:
    """Return the type of GPU that Ray's cluster resources name; ``None`` when they name none.

    A type without a data sheet here is taken for the slowest one: prices of moves are then too high, never too low.

    Args:
        resources: Their names. An A100 of 40 GB and one of 80 GB are both ``A100``.
        device_bytes: Measured memory of a device, which counts instead of the data sheet's; in a cluster of several
            types the smaller of the two does. 0 = none was measured.
    """
    names = gpu_types(resources)
    if not names:
        return None
    kinds = [name.split("-")[0] for name in names]
    gpu = next((gpu for gpu in GPUS.values() if gpu.name.split("-")[0] == kinds[0]), None)
    if gpu is None:
        gpu = min(GPUS.values(), key=lambda gpu: gpu.hbm_bytes_per_s)
        logger.warning("rlhfless: no figures for GPU type %s: decisions assume %s", names[0], gpu.name)
    if not device_bytes:
        return gpu
    is_mixed = len(set(kinds)) > 1  # the device that was measured may be of another type
    return replace(gpu, memory_bytes=min(gpu.memory_bytes, device_bytes) if is_mixed else device_bytes)


def _declared_perf(bounds: PoolBounds, pace: PaceModel, tp: int) -> EnginePerf:
    """Return the performance model of a declared replica.

    Its model has next to no weights: an iteration is a fixed part, a part per request and one per token of context.
    """
    shape = ModelShape("declared", 1, 1, 1, _KV_HEADS, 1, 1, 1, is_tied=True)
    speed = pace.tp_speedup.get(tp, 1.0)
    prefill_s = max(pace.per_prefill_token_ms / 1e3 / speed, _NEVER)
    request_s = pace.per_request_ms / 1e3 / speed
    context_s = max(pace.per_context_token_us / 1e6 / speed, _NEVER)
    kv_bytes = shape.kv_bytes_per_token / shape.kv_shards(tp)
    gpu = GpuType(
        name="declared",
        flops=2 * shape.matmul_params / (tp * prefill_s),
        hbm_bytes_per_s=kv_bytes / context_s,
        memory_bytes=shape.weight_bytes / tp + (bounds.kv_tokens // BLOCK_TOKENS + 1) * BLOCK_TOKENS * kv_bytes,
        peer_bytes_per_s=_FAST_LINK,
        network_bytes_per_s=_FAST_LINK,
        host_bytes_per_s=_FAST_LINK,
        has_nvlink=True,
        usd_per_h=0.0,
    )
    efficiencies = Efficiencies(
        hbm=1.0,
        prefill=1.0,
        launch_s=pace.base_ms / 1e3 / speed,
        per_seq_s=request_s - prefill_s,  # the model charges a decode the price of a prefill token as well
        peer=1.0,
        host=1.0,
        allreduce_s=(0.0, 0.0),
        allreduce_hop_s=(0.0, 0.0),
    )
    limits = EngineLimits(bounds.limits.max_num_seqs, bounds.limits.max_batched_tokens, 1.0, 0.0)
    return EnginePerf(shape, gpu, tp, efficiencies, limits)
