"""A lease of the devices that a live process is bound to, or a bounded number of tries."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from verl_rlhfless.live import same_devices
from verl_rlhfless.live.same_devices import lease_devices


class Ray:
    """Grants devices in a given order, and knows what is held; a try takes a second of a clock that tests read."""

    def __init__(self, *grants: str) -> None:
        self.grants = itertools.chain(grants, itertools.repeat(grants[-1]))
        self.held: list[str] = []
        self.now_s = 0.0

    def acquire(self, timeout_s: float) -> Any:
        assert timeout_s >= 1, "Ray's resolution"
        devices = next(self.grants)
        self.held.append(devices)
        self.now_s += 1
        return SimpleNamespace(device_key=lambda: devices)

    def release(self, lease: Any) -> None:
        self.held.remove(lease.device_key())


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(ray: Ray, wanted: Any, timeout_s: float = 100.0, wait_s: float = 10.0) -> Any:
        clock = SimpleNamespace(monotonic=lambda: ray.now_s, sleep=lambda _: None)
        monkeypatch.setattr(same_devices, "time", clock)
        ask = wanted if callable(wanted) else lambda: wanted
        return lease_devices(ray.acquire, ray.release, ask, timeout_s, wait_s)

    return run


def test_the_right_devices_at_once(search: Any) -> None:
    ray = Ray("b")
    found = search(ray, {"a", "b"})
    assert found.is_wanted and found.lease.device_key() == "b" and found.wrong == () and ray.held == ["b"]


def test_wrong_devices_are_given_back_before_the_next_try(search: Any) -> None:
    ray = Ray("x", "y", "a")
    found = search(ray, {"a"})
    assert found.is_wanted and [lease.device_key() for lease in found.wrong] == ["x", "y"]
    assert ray.held == ["a"]


def test_it_gives_up_after_the_wait_and_holds_what_it_has(search: Any) -> None:
    ray = Ray("x")
    found = search(ray, {"a"}, wait_s=3.0)
    assert not found.is_wanted and ray.held == ["x"]
    assert ray.now_s == 4, "one grant, and three seconds after it"


def test_the_bound_of_all_trying_holds_however_long_the_wait_may_be(search: Any) -> None:
    ray = Ray("x")
    assert not search(ray, {"a"}, timeout_s=5.0, wait_s=100.0).is_wanted
    assert ray.now_s == 5


def test_nobody_waits_for_devices_that_are_wanted_no_more(search: Any) -> None:
    ray = Ray("x")
    answers = iter([{"a"}, {"a"}, set()])
    found = search(ray, lambda: next(answers))
    assert not found.is_wanted and len(found.wrong) == 2 and ray.held == ["x"]
