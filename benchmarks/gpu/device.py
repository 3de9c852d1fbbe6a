"""The device of this machine, and its data sheet."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from verl_rlhfless.errors import ConfigError
from verl_rlhfless.policy.gpus import GPUS, GpuType

CPU = GpuType("CPU", 1e11, 2e10, 8e9, 1e10, 1e10, 1e9, False, 0.0)
"""Round figures, for the kit's check of itself: no error against them means anything."""

_QUERY = "name,memory.total,driver_version"


@dataclass(frozen=True, slots=True)
class Device:
    """Where the figures come from.

    Attributes:
        name: As the driver names it.
        driver: Version of the driver; empty on a CPU.
        gpu: Its data sheet.
    """

    name: str
    driver: str
    gpu: GpuType

    @property
    def is_gpu(self) -> bool:
        """Whether figures of this device are results."""
        return self.gpu is not CPU

    @property
    def torch_name(self) -> str:
        """What torch calls it."""
        return "cuda" if self.is_gpu else "cpu"


def find_device() -> Device:
    """Return the first GPU of this machine.

    Raises:
        ConfigError: There is none, or its data sheet is not among the shipped ones.
    """
    found = query_gpu(_QUERY)
    if not found:
        raise ConfigError("device", None, "nvidia-smi lists no GPU", "Use --check to try the kit on a CPU.")
    name, _, driver = (part.strip() for part in found.split(","))
    return Device(name, driver, data_sheet(name))


def data_sheet(name: str) -> GpuType:
    """Return the shipped type that a driver's name for a GPU means.

    Raises:
        ConfigError: None is.
    """
    for gpu in GPUS.values():
        family, _, memory = gpu.name.partition("-")
        if family in name.replace("-", " ").split() and memory.removesuffix("G") in name:
            return gpu
    raise ConfigError("device", name, f"must be among {', '.join(GPUS)}", "Add its data sheet to policy/gpus.py.")


def query_gpu(fields: str) -> str:
    """Return what nvidia-smi says of the first GPU, without units; empty where there is none."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def device_memory_bytes() -> int:
    """Return the device memory that is in use, by any process; 0 without a GPU."""
    used = query_gpu("memory.used")
    return int(used) << 20 if used else 0
