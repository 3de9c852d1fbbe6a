"""Iterations are measured from reports between which no request joined, those of large batches too."""

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


def report(meter: SpeedMeter, clock: Clock, tokens: int, requests: str = "ab", new: str = "") -> None:
    """Half a second later, each of the requests has so many more tokens; those that are new have their first."""
    clock.now_s += 0.5
    parts = tuple(Part(name, 0 if name in new else 9, [1] * tokens, []) for name in requests)
    meter.note("host", 2, Delta(parts, 0), 500)


def test_the_same_requests_give_the_iteration_time_of_their_batch(meter: SpeedMeter, clock: Clock) -> None:
    report(meter, clock, 8, new="ab")
    for _ in range(4):
        report(meter, clock, 8)
    (sample,) = meter.samples[2]
    assert (sample.decodes, sample.context_tokens, sample.prefill_tokens) == (2, 500, 0)
    assert sample.seconds == pytest.approx(0.5 / 8)


def test_while_requests_end_the_batch_is_the_mean(meter: SpeedMeter, clock: Clock) -> None:
    report(meter, clock, 4, "abcdefgh", new="abcdefgh")
    for running in ("abcdefgh", "abcdef", "abcd", "ab"):
        report(meter, clock, 4, running)
    (sample,) = meter.samples[2]
    assert (sample.decodes, sample.seconds) == (6, pytest.approx(0.125))


def test_reports_around_the_first_tokens_of_a_request_are_left_out(meter: SpeedMeter, clock: Clock) -> None:
    for _ in range(10):
        report(meter, clock, 8, "ab")
        report(meter, clock, 8, "abc", new="c")
    assert meter.samples == {}


def test_a_short_stretch_is_no_sample(meter: SpeedMeter, clock: Clock) -> None:
    report(meter, clock, 5, new="ab")
    for _ in range(3):
        report(meter, clock, 5)
    report(meter, clock, 5, "c", new="c")
    assert meter.samples == {}


def test_a_pause_between_rollouts_is_no_iteration(meter: SpeedMeter, clock: Clock) -> None:
    for _ in range(2):
        report(meter, clock, 8)
        clock.now_s += 60.0
        report(meter, clock, 0, "")
        report(meter, clock, 8, new="ab")
    for _ in range(4):
        report(meter, clock, 8)
    assert [sample.seconds for sample in meter.samples[2]] == pytest.approx([0.5 / 8] * len(meter.samples[2]))
