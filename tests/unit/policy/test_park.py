"""An engine sleeps when that is expected to save time, and never where nobody will wake it or memory is short."""

from __future__ import annotations

import dataclasses

import pytest

from verl_rlhfless.policy.park import ParkView, decide_park, worth_waiting_s

GIB = 2**30
VIEW = ParkView(
    can_sleep=True,
    uses_ahead=2,
    num_parked=0,
    starts_s=(33.0, 1.4, 1.5),
    wakes_s=(0.2, 0.1, 0.3),
    relaunches_s=(),
    same_device_wait_s=30.0,
    host_available_bytes=8 * GIB,
    host_reserved_bytes=2 * GIB,
)


def view(**changes: object) -> ParkView:
    return dataclasses.replace(VIEW, **changes)


def test_it_parks_when_a_wake_is_faster_than_a_start_and_says_by_how_much() -> None:
    decision = decide_park("auto", VIEW)
    assert decision.park
    assert "0.20 s" in decision.reason and "1.50 s" in decision.reason, "medians, not the cold start"


def test_the_first_engine_is_parked_to_find_out() -> None:
    assert decide_park("auto", view(wakes_s=())).park


@pytest.mark.parametrize("mode", ["auto", "always"])
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"can_sleep": False}, "enable_sleep_mode"),
        ({"uses_ahead": 0}, "no further rollout"),
        ({"num_parked": 2}, "2 are parked"),
        ({"host_available_bytes": GIB}, "1024 MiB left"),
    ],
)
def test_nobody_waits_for_it_or_the_host_is_full(mode: str, changes: dict[str, int], why: str) -> None:
    decision = decide_park(mode, view(**changes))
    assert not decision.park and why in decision.reason


def test_slow_wakes_do_not_pay_and_only_always_parks_then() -> None:
    slow = view(wakes_s=(3.0,))
    assert not decide_park("auto", slow).park
    assert decide_park("always", slow).park


def test_never_is_never() -> None:
    assert not decide_park("never", VIEW).park


def test_devices_that_seldom_come_back_make_parking_lose() -> None:
    slow = view(starts_s=(3.0,), relaunches_s=(3.0,) * 2)
    assert decide_park("auto", slow).park
    assert not decide_park("auto", view(starts_s=(3.0,), relaunches_s=(3.0,) * 3)).park


def test_a_lease_never_waits_longer_for_the_right_devices_than_a_wake_saves() -> None:
    measured = view(relaunches_s=(1.4, 33.0, 1.5))
    assert worth_waiting_s(measured) == pytest.approx(1.3)
    assert worth_waiting_s(dataclasses.replace(measured, same_device_wait_s=0.5)) == 0.5
    assert worth_waiting_s(dataclasses.replace(measured, wakes_s=(9.0,))) == 0


def test_a_lease_that_is_there_is_used_until_it_is_known_what_that_costs() -> None:
    assert worth_waiting_s(VIEW) == 0
