"""What an engine still holds while it sleeps: nobody may take it for free."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

from verl_rlhfless.live.available_memory import available_bytes
from verl_rlhfless.processes import ProcessKey


@dataclass(frozen=True, slots=True)
class ParkedMemory:
    """Memory of an engine's processes and of its node.

    Attributes:
        device_bytes: Most memory in use on one of its devices; 0 where the device is the host. An upper bound: it
            holds what other parked processes left there, too.
        device_total_bytes: All memory of that device.
        host_bytes: Resident host memory of the engine's processes; shared pages count in each.
        host_available_bytes: Memory that processes of the node can still get.
    """

    device_bytes: int
    device_total_bytes: int
    host_bytes: int
    host_available_bytes: int


def measure_parked(devices: Iterable[tuple[int, int]], processes: Iterable[ProcessKey]) -> ParkedMemory:
    """Return the memory now, from what each worker says is in use on its device, and is there in all [bytes]."""
    host_bytes = 0
    for pid, _ in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            host_bytes += psutil.Process(pid).memory_info().rss
    in_use, total = max(devices)
    return ParkedMemory(in_use, total, host_bytes, available_bytes())
