"""A pure-CPU platform for verl, so that a whole RLHF run can be debugged and benchmarked without a GPU.

Chosen by ``VERL_PLATFORM=cpu``. Ray's resource stays ``GPU`` (declare fake ones with ``ray.init(num_gpus=N)``), so
placement, leases and cost are those of a GPU run; collectives are gloo; weights travel through shared memory, verl's
own fallback without IPC.
"""

from __future__ import annotations

import contextlib
import os
import resource
import types
from collections.abc import Iterator
from typing import Any

import torch
import wrapt
from verl.plugin.platform import PlatformBase, PlatformRegistry

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def _resident_bytes(*_: object) -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * _PAGE_BYTES


def _peak_resident_bytes(*_: object) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _nothing(*_: object, **__: object) -> None:
    """Stand in for a ``torch.cuda`` call that has no meaning on a CPU."""


class _CpuDeviceModule(types.ModuleType):
    """``torch.cpu`` with the names of ``torch.cuda`` that verl calls."""

    empty_cache = ipc_collect = set_device = synchronize = staticmethod(_nothing)
    manual_seed = manual_seed_all = reset_peak_memory_stats = reset_max_memory_allocated = staticmethod(_nothing)
    memory_allocated = memory_reserved = staticmethod(_resident_bytes)
    max_memory_allocated = max_memory_reserved = staticmethod(_peak_resident_bytes)
    get_rng_state = staticmethod(torch.get_rng_state)
    set_rng_state = staticmethod(torch.set_rng_state)

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def current_device() -> str:
        return "cpu"

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def get_device_name(*_: object) -> str:
        return "CPU"

    @staticmethod
    def mem_get_info(*_: object) -> tuple[int, int]:
        """Return free and total host memory [bytes]."""
        return os.sysconf("SC_AVPHYS_PAGES") * _PAGE_BYTES, os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)


class PlatformCPU(PlatformBase):
    """verl's platform interface on a host without accelerators. Never auto-detected."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _CpuDeviceModule("verl_cpu_device")

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False

    def current_device(self) -> str:
        return "cpu"  # so that tensor.to(get_device_id()) works

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None: ...

    def manual_seed_all(self, seed: int) -> None: ...

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"  # what Ray sets for its "GPU" resource

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


def register() -> None:
    """Register the platform, the FSDP engines for its device, and the patches that it needs."""
    from verl_rlhfless_patches import torch_gloo_backend, verl_reference_offload, vllm_cpu_experts, vllm_cpu_linear

    if PlatformRegistry.get("cpu") is None:
        PlatformRegistry.register(platform="cpu")(PlatformCPU)
    wrapt.register_post_import_hook(_register_fsdp_engines, "verl.workers.engine.fsdp.transformer_impl")
    torch_gloo_backend.apply()
    verl_reference_offload.apply()
    vllm_cpu_linear.apply()
    vllm_cpu_experts.apply()


def _register_fsdp_engines(fsdp: types.ModuleType) -> None:
    """Verl registers its FSDP engines for cuda and npu only; the same classes run on CPU with gloo."""
    for model_type, engine in (
        ("language_model", fsdp.FSDPEngineWithLMHead),
        ("value_model", fsdp.FSDPEngineWithValueHead),
    ):
        fsdp.EngineRegistry.register(model_type=model_type, backend=["fsdp", "fsdp2"], device="cpu")(engine)
