"""How the ranks of a worker group leave their devices and come back. Every method runs inside a rank's own process.

Not yet measured on a GPU: moving the state, the memory that stays reserved, and the pinned host memory were run on
CPU only.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any, Protocol

from verl_rlhfless.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class RankMemory:
    """What a rank holds after its state went to the host.

    Attributes:
        device_reserved_bytes: Device memory that torch's allocator still holds. The CUDA context and NCCL's buffers
            are not in it.
        pinned_host_bytes: Page-locked host memory of torch's allocator: the offloaded state, kept for the way back.
    """

    device_reserved_bytes: int
    pinned_host_bytes: int


class DeviceResidency(Protocol):
    """Moves one rank's state. The instance is pickled into the rank, so it holds values only."""

    def offload(self, worker: Any) -> None:
        """Move every role's state from the device to the host; return when the copies are complete."""

    def memory(self, worker: Any) -> RankMemory:
        """Give cached device memory back and return what is still held."""

    def onload(self, worker: Any) -> None:
        """Undo :meth:`offload`; return when the copies are complete."""

    def free_share(self, worker: Any) -> float:
        """Give cached device memory back and return the share of the device that is free."""

    def stay(self, worker: Any) -> None:
        """Prepare for a checkpoint that is saved from the host, after which the rank ends."""


@dataclass(frozen=True, slots=True)
class VerlResidency:
    """Moves verl's training engines (actor, reference, critic), also those of colocated and fused workers."""

    def offload(self, worker: Any) -> None:
        """Move model, gradients and optimizer state to the host.

        Buffers of a model that FSDP2 offloads stay: they are small, and nothing would bring them back.

        Raises:
            UnsupportedError: The worker has no training engine that this class knows.
        """
        for engine in _engines(worker):
            _free_unsharded(engine.module)
            moves = not _is_offloaded_by_fsdp2(engine)
            engine.to("cpu", model=moves, optimizer=moves, grad=moves)
        _synchronize()  # verl copies to pinned memory without waiting; the device may be someone else's in a moment

    def memory(self, worker: Any) -> RankMemory:
        """Empty torch's device cache and return what it still holds; zeros on a platform whose device is the host."""
        if _device_name() == "cpu":
            return RankMemory(device_reserved_bytes=0, pinned_host_bytes=0)
        device = _device()
        gc.collect()
        device.empty_cache()
        device.synchronize()
        return RankMemory(int(device.memory_reserved()), _pinned_host_bytes(device))

    def onload(self, worker: Any) -> None:
        """Put back on the device what verl keeps there between two phases: nothing that it offloads by itself."""
        for engine in _engines(worker):
            moves = not _is_offloaded_by_fsdp2(engine)
            model = moves and not engine.is_param_offload_enabled
            optimizer = moves and not engine.is_optimizer_offload_enabled
            engine.to(_device_name(), model=model, optimizer=optimizer, grad=model)
        _synchronize()

    def free_share(self, worker: Any) -> float:
        """Empty torch's device cache and return the share of the device that is free; 1 where it is the host."""
        if _device_name() == "cpu":
            return 1.0
        device = _device()
        gc.collect()
        device.empty_cache()
        free_bytes, total_bytes = device.mem_get_info()
        return float(free_bytes / total_bytes)

    def stay(self, worker: Any) -> None:
        """Make verl save a checkpoint from where the state is: its own way moves a model on the host to the device.

        Engines that only infer are not saved.

        Saving FSDP2's shards then needs no device memory beyond the context that the rank kept, which its barriers and
        the random state of the device use. The worker can't be trained any more.

        Raises:
            UnsupportedError: An engine that is saved is not FSDP2, and its shards can't be read on the host.
        """
        for engine in _engines(worker):
            if engine.engine_config.forward_only:
                continue
            strategy = engine.engine_config.strategy
            if strategy != "fsdp2" and _device_name() != "cpu":
                raise UnsupportedError(f"a suspended {strategy} model can't be saved without its device")
            engine._uses_fsdp2_cpu_offload_policy = True  # what verl's save_checkpoint asks before it moves the model


def device_bytes(worker: Any) -> int:
    """Return the memory of a rank's device; 0 where the device is the host."""
    return 0 if _device_name() == "cpu" else int(_device().mem_get_info()[1])


def expand_segments(worker: Any) -> None:
    """Let the allocator of a rank's device grow its segments, which fragment less; nothing where it is the host."""
    from verl.utils.device import set_expandable_segments

    set_expandable_segments(True)


def _is_offloaded_by_fsdp2(engine: Any) -> bool:
    """Return whether the engine has a ``CPUOffloadPolicy``: such a model must never be moved as a whole.

    Its parameters and optimizer state are on the host between two phases, its buffers never.
    """
    return bool(getattr(engine, "_uses_fsdp2_cpu_offload_policy", False))


def _free_unsharded(module: Any) -> None:
    """Free the gathered weights that FSDP keeps between two phases, even those of a model that only infers.

    FSDP1 keeps the root's after every forward pass without a backward pass, and both versions keep all where nothing is
    resharded after forward passes. verl frees the root's alone, and only with ``fsdp_size`` > 1. A move reshards FSDP2,
    but what only infers or is offloaded by FSDP2 is not moved.
    """
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if isinstance(module, FSDPModule):
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
    if not isinstance(module, FullyShardedDataParallel) or module._is_root is None:  # None: it never ran
        return
    for handle in module._all_handles:
        if handle.uses_sharded_strategy:
            handle.reshard(free_unsharded_flat_param=True)


def _engines(worker: Any) -> list[Any]:
    """Return the training engines of a rank: of the worker itself, or of each role that shares its process."""
    roles = getattr(worker, "worker_dict", None) or getattr(worker, "fused_worker_dict", None) or {"": worker}
    parts: list[Any] = [
        part for role in roles.values() for part in (role, getattr(role, "actor", None), getattr(role, "ref", None))
    ]
    engines = [part.engine for part in parts if getattr(part, "engine", None) is not None]
    if not engines:
        kinds = ", ".join(type(role).__name__ for role in roles.values())
        raise UnsupportedError(
            f"no training engine in worker {kinds}: can't suspend it. Suspend after init_model(), or hold the lease."
        )
    return engines


def _device() -> Any:
    from verl.utils.device import get_torch_device

    return get_torch_device()


def _device_name() -> str:
    from verl.utils.device import get_device_name

    return str(get_device_name())


def _synchronize() -> None:
    if _device_name() != "cpu":
        _device().synchronize()


def _pinned_host_bytes(device: Any) -> int:
    stats = getattr(device, "host_memory_stats", None)  # CUDA only
    return int(stats().get("allocated_bytes.current", 0)) if stats else 0
