"""Iterations are measured from reports while the same requests run, and from nothing else."""

from __future__ import annotations

import pytest

from verl_rlhfless.live.speed import SpeedMeter
from verl_rlhfless.live.tickets import Delta, Part


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def meter(clock: Clock) -> SpeedMeter:
    return SpeedMeter(clock)


def report(meter: SpeedMeter, clock: Clock, tokens: int, requests: str = "ab", running: int | None = None) -> None:
    """Half a second later, each of the requests has so many more tokens."""
    clock.now_s += 0.5
    parts = tuple(Part(name, 0, [1] * tokens, []) for name in requests)
    meter.note("host", 2, Delta(parts, 0), (len(requests) if running is None else running, 500))


def test_a_stretch_of_the_same_requests_is_one_iteration_time(meter: SpeedMeter, clock: Clock) -> None:
    for _ in range(5):
        report(meter, clock, 8)
    report(meter, clock, 8, "a")  # one of them ended
    (sample,) = meter.samples[2]
    assert (sample.decodes, sample.context_tokens, sample.prefill_tokens) == (2, 500, 0)
    assert sample.seconds == pytest.approx(0.5 / 8)


def test_a_long_stretch_is_several_samples(meter: SpeedMeter, clock: Clock) -> None:
    for _ in range(20):
        report(meter, clock, 8)
    assert len(meter.samples[2]) == 2


def test_while_requests_come_and_go_or_wait_for_their_prefill_nothing_is_measured(
    meter: SpeedMeter, clock: Clock
) -> None:
    for number in range(10):
        report(meter, clock, 8, "ab" if number % 2 else "bc")
    for _ in range(10):
        report(meter, clock, 8, running=3)
    assert meter.samples == {}


def test_a_short_stretch_is_no_sample(meter: SpeedMeter, clock: Clock) -> None:
    for _ in range(2):
        report(meter, clock, 8)
    report(meter, clock, 8, "c")
    assert meter.samples == {}
