"""The ledger: leases and work become GPU-seconds by state, and money.

Every leased GPU-second has exactly one state: ``startup`` (grant -> first usable), ``busy`` (a trainer phase runs, or
an engine has at least one running request) or ``idle`` (the rest, drain included). Invariants: busy + idle + startup
== allocated; consecutive windows add up to the window they cover; the order of leases and spans does not matter.

Intervals are half-open. Times may be wall-clock or simulated seconds, one kind per call.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from verl_rlhfless.errors import DataError
from verl_rlhfless.types import BusySpan, GpuSeconds, LeaseSpan, ParkedSpan, ParkedUse, Window

_SECONDS_PER_HOUR = 3600.0


def account(leases: Sequence[LeaseSpan], busy: Iterable[BusySpan], window: Window) -> GpuSeconds:
    """Return the GPU-seconds of ``window`` by state and the most GPUs leased at any instant of it.

    Work that is reported before its lease is usable (a warm-up request, clocks of two processes) stays ``startup``.
    Where work of one lease overlaps (trainer phases, hybrid engines), at most the lease's GPUs are busy at an instant.

    Args:
        leases: Every lease of the run. One without ``released_s`` is held until the window's end, one without
            ``usable_s`` is starting all the time. Leases of one id must not overlap in time.
        busy: Work on those leases; parts outside a lease's hold don't count.
        window: What to account for.

    Raises:
        DataError: A busy span names a lease that is not among ``leases``.
    """
    work: dict[str, list[BusySpan]] = defaultdict(list)
    for span in busy:
        work[span.lease_id].append(span)
    if unknown := sorted(work.keys() - {lease.lease_id for lease in leases}):
        raise DataError(f"work is recorded on leases that were never granted: {', '.join(unknown)}")
    parts = [_account_lease(lease, work.get(lease.lease_id, ()), window) for lease in leases]
    return GpuSeconds(
        allocated=math.fsum(part[0] for part in parts),
        busy=math.fsum(part[1] for part in parts),
        idle=math.fsum(part[2] for part in parts),
        startup=math.fsum(part[3] for part in parts),
        max_gpus=_most_leased(leases, window),
    )


def whole_run(leases: Sequence[LeaseSpan], observed_until_s: float) -> Window:
    """Return the window from the first grant to the last release, or to ``observed_until_s`` while a lease is held."""
    if not leases:
        return Window(observed_until_s, observed_until_s)
    ends = [observed_until_s if lease.released_s is None else lease.released_s for lease in leases]
    return Window(min(lease.granted_s for lease in leases), max(ends))


def parked(spans: Iterable[ParkedSpan], window: Window) -> ParkedUse:
    """Return what engines took in ``window`` while they slept without a lease; ``end_s=None`` is its end.

    These GPU-seconds are nobody's cost and are never added to the leased ones: the GPU may be leased to someone else.
    """
    inside = [(span, _overlap_s(span, window)) for span in spans]
    inside = [(span, seconds) for span, seconds in inside if seconds > 0]
    return ParkedUse(
        gpu_s=math.fsum(span.num_gpus * seconds for span, seconds in inside),
        device_bytes=max((span.device_bytes for span, _ in inside), default=0),
    )


def usd(gpu_seconds: float, price_per_gpu_hour: float) -> float:
    """Return the price of ``gpu_seconds`` [GPU s] at ``price_per_gpu_hour`` [USD / (GPU h)]."""
    return gpu_seconds * price_per_gpu_hour / _SECONDS_PER_HOUR


def _overlap_s(span: ParkedSpan, window: Window) -> float:
    end_s = window.end_s if span.end_s is None else min(span.end_s, window.end_s)
    return max(0.0, end_s - max(span.start_s, window.start_s))


def _hold(lease: LeaseSpan, window: Window) -> Window:
    """Return the part of a lease inside the window; it is empty (end == start) where they don't overlap."""
    released_s = window.end_s if lease.released_s is None else lease.released_s
    start_s = max(lease.granted_s, window.start_s)
    return Window(start_s, max(start_s, min(released_s, window.end_s)))


def _account_lease(lease: LeaseSpan, work: Iterable[BusySpan], window: Window) -> tuple[float, float, float, float]:
    """Return (allocated, busy, idle, startup) of one lease [GPU s]."""
    hold = _hold(lease, window)
    usable_s = hold.end_s if lease.usable_s is None else min(max(lease.usable_s, hold.start_s), hold.end_s)
    allocated = (hold.end_s - hold.start_s) * lease.num_gpus
    startup = (usable_s - hold.start_s) * lease.num_gpus
    busy, idle = _busy_and_idle(work, Window(usable_s, hold.end_s), lease.num_gpus)
    return allocated, busy, idle, startup


def _busy_and_idle(work: Iterable[BusySpan], usable: Window, num_gpus: int) -> tuple[float, float]:
    """Return (busy, idle) [GPU s] of ``num_gpus`` GPUs while they are usable."""
    changes = []
    for span in work:
        start_s, end_s = max(span.start_s, usable.start_s), min(span.end_s, usable.end_s)
        if start_s < end_s:
            changes += [(start_s, span.num_gpus), (end_s, -span.num_gpus)]
    changes.sort()
    busy, idle = [], []
    running, now_s = 0, usable.start_s
    for at_s, change in [*changes, (usable.end_s, 0)]:
        busy.append(min(running, num_gpus) * (at_s - now_s))
        idle.append(max(num_gpus - running, 0) * (at_s - now_s))
        running, now_s = running + change, at_s
    return math.fsum(busy), math.fsum(idle)


def _most_leased(leases: Iterable[LeaseSpan], window: Window) -> int:
    changes = []
    for lease in leases:
        hold = _hold(lease, window)
        if hold.start_s < hold.end_s:
            changes += [(hold.start_s, lease.num_gpus), (hold.end_s, -lease.num_gpus)]
    most = leased = 0
    for _, change in sorted(changes):  # at one instant releases (negative) come before grants
        leased += change
        most = max(most, leased)
    return most
