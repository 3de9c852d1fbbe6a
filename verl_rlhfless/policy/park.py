"""Whether an engine that leaves the rollout is kept asleep for the next one, or ended.

A parked engine saves the time by which a start is longer than a wake. It costs host memory, and the device memory that
it can't free. It wakes only on the devices that it slept on. Where Ray grants a lease of other devices, the parked
engine is ended and another one starts on its server: a *relaunch*.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class ParkView:
    """What is known when an engine has finished its last request.

    Attributes:
        can_sleep: Whether the engine was started so that it can free its device.
        uses_ahead: Engines of its size that a later rollout is expected to need at the same time; 0 after the last one.
        num_parked: Engines of its size that are parked already.
        starts_s: Measured seconds of engine starts in this run, weights not included.
        wakes_s: Measured seconds of wakes, weights not included.
        relaunches_s: Measured seconds of relaunches, weights not included.
        same_device_wait_s: Most seconds that a lease may wait for the right devices.
        host_available_bytes: Memory that processes of the engine's node can still get.
        host_reserved_bytes: What of it the weight store needs for the next version.
    """

    can_sleep: bool
    uses_ahead: int
    num_parked: int
    starts_s: Sequence[float]
    wakes_s: Sequence[float]
    relaunches_s: Sequence[float]
    same_device_wait_s: float
    host_available_bytes: int
    host_reserved_bytes: int


@dataclass(frozen=True, slots=True)
class ParkDecision:
    """Whether to park, with the reason that is logged and recorded."""

    park: bool
    reason: str


def decide_park(mode: str, view: ParkView) -> ParkDecision:
    """Return whether to park, under ``rlhfless.pool.park=mode`` (``auto``, ``always`` or ``never``).

    Number and host memory bind ``always`` too: an engine that nobody wakes is a leak, and a host without memory ends
    the run.
    """
    if mode == "never":
        return ParkDecision(False, "rlhfless.pool.park=never")
    if not view.can_sleep:
        return ParkDecision(False, "the engine can't free its device: rollout.enable_sleep_mode=False")
    if not view.uses_ahead:
        return ParkDecision(False, "no further rollout is expected")
    if view.num_parked >= view.uses_ahead:
        return ParkDecision(False, f"{view.num_parked} are parked for {view.uses_ahead} expected uses")
    if view.host_available_bytes < view.host_reserved_bytes:
        return ParkDecision(
            False,
            f"the host has {view.host_available_bytes // _MIB} MiB left, and the next weight version needs "
            f"{view.host_reserved_bytes // _MIB} MiB",
        )
    if mode == "always":
        return ParkDecision(True, "rlhfless.pool.park=always")
    return _decide_by_gain(view)


def worth_waiting_s(view: ParkView) -> float:
    """Return how long a lease may wait for the devices of a parked engine before a relaunch is the faster way [s].

    Until a relaunch was measured there is no wait: the devices may never come, and the lease that is there can be used.
    """
    if not view.relaunches_s:
        return 0.0
    gain_s = statistics.median(view.relaunches_s) - _wake_s(view)
    return max(0.0, min(view.same_device_wait_s, gain_s))


def _decide_by_gain(view: ParkView) -> ParkDecision:
    if not view.wakes_s:
        return ParkDecision(True, "no wake is measured yet")
    tries = len(view.wakes_s) + len(view.relaunches_s)
    missed = len(view.relaunches_s) / tries  # the share of leases that had other devices
    start_s = statistics.median(view.starts_s)
    gain_s = (1 - missed) * (start_s - _wake_s(view)) - missed * worth_waiting_s(view)
    figures = (
        f"a wake takes {_wake_s(view):.2f} s, a start {start_s:.2f} s, "
        f"{len(view.relaunches_s)} of {tries} leases had other devices"
    )
    return ParkDecision(gain_s > 0, figures)


def _wake_s(view: ParkView) -> float:
    """Return the seconds of a wake; one that was never measured is taken as free."""
    return statistics.median(view.wakes_s) if view.wakes_s else 0.0
