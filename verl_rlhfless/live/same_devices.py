"""Leases of certain devices, for live processes: these can't change their devices, and Ray grants any that are free.

One mechanism for a suspended trainer and for parked engines: lease, look at what came, give back what nobody can use,
and try again for a bounded time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from verl_rlhfless.live.lease import Lease
from verl_rlhfless.types import DeviceKey

_RETRY_S = 0.25  # between two grants of the wrong devices


@dataclass(frozen=True, slots=True)
class DeviceSearch:
    """How a search for devices ended.

    Attributes:
        lease: The lease that is held now.
        is_wanted: Whether it has wanted devices; else the search was given up.
        wrong: Ended leases of other devices that were tried before; they cost too.
    """

    lease: Lease
    is_wanted: bool
    wrong: tuple[Lease, ...]


def lease_devices(
    acquire: Callable[[float], Lease],
    release: Callable[[Lease], object],
    wanted: Callable[[], Collection[DeviceKey]],
    timeout_s: float,
    wait_s: float,
) -> DeviceSearch:
    """Return a lease of wanted devices, or of other ones when those did not come in time or are wanted no more.

    Args:
        acquire: Leases GPUs within the given seconds.
        release: Gives a lease of other devices back.
        wanted: Returns the devices that live processes are bound to; asked again after each grant.
        timeout_s: Bound of all trying [s].
        wait_s: Bound of the trying after the first grant of other devices [s].

    Raises:
        LeaseTimeoutError: No GPUs in time. Nothing is leased.
    """
    deadline_s = time.monotonic() + timeout_s
    wrong: list[Lease] = []
    give_up_s = deadline_s
    while True:
        lease = acquire(max(1.0, deadline_s - time.monotonic()))
        keys = wanted()
        if lease.device_key() in keys:
            return DeviceSearch(lease, True, tuple(wrong))
        if not wrong:
            give_up_s = min(deadline_s, time.monotonic() + wait_s)
        if not keys or time.monotonic() >= give_up_s:
            return DeviceSearch(lease, False, tuple(wrong))
        release(lease)
        wrong.append(lease)
        time.sleep(_RETRY_S)


def describe_devices(key: DeviceKey) -> str:
    """Return the devices as they stand in errors."""
    return "; ".join(f"node {node_id[:8]} devices {sorted(ids)}" for node_id, ids in key)
