"""A pace model keeps what was declared; a bad one is refused with its key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from verl_rlhfless.errors import ConfigError
from verl_rlhfless.live.iteration import Iteration
from verl_rlhfless.live.pacing import PacedTime, PaceModel, Pacer

MODEL = PaceModel(
    base_ms=40, per_request_ms=0.5, per_prefill_token_ms=0.02, per_context_token_us=2, tp_speedup={2: 1.6}
)


def iteration(requests: int = 1, continued: int = 0, prefill: int = 0, context: int = 0) -> Iteration:
    return Iteration(requests, continued, requests, 0, prefill, context, requests)


class FakeTime:
    """A clock that only moves when told, or when someone sleeps."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now_s += seconds


@pytest.fixture
def time() -> FakeTime:
    return FakeTime()


def pacer(time: FakeTime, base_ms: float = 40) -> Pacer:
    return Pacer(PaceModel(base_ms), tp=1, clock=time.clock, sleep=time.sleep)


def test_every_term_counts_and_tp_divides() -> None:
    alone = MODEL.iteration_s(tp=1, batch=10, context=5000, prefill=100)

    assert alone == pytest.approx((40 + 5 + 2 + 10) / 1e3)
    assert MODEL.iteration_s(tp=2, batch=10, context=5000, prefill=100) == pytest.approx(alone / 1.6)


def test_text_and_file_and_environment_agree(tmp_path: Path) -> None:
    text = (
        '{"base_ms": 40, "per_request_ms": 0.5, "per_prefill_token_ms": 0.02, "per_context_token_us": 2,'
        ' "tp_speedup": {"2": 1.6}}'
    )
    (tmp_path / "pace.json").write_text(text)

    assert PaceModel.parse(text) == MODEL
    assert PaceModel.parse(str(tmp_path / "pace.json")) == MODEL
    assert PaceModel.parse(MODEL.to_json()) == MODEL


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ({}, "base_ms"),
        ({"base_ms": 0}, "base_ms"),
        ({"base_ms": -1}, "base_ms"),
        ({"base_ms": "40"}, "base_ms"),
        ({"base_ms": True}, "base_ms"),
        ({"base_ms": 10**400}, "base_ms"),
        ({"base_ms": float("nan")}, "base_ms"),
        ({"base_ms": 40, "per_request_ms": -0.1}, "per_request_ms"),
        ({"base_ms": 40, "per_context_token_us": None}, "per_context_token_us"),
        ({"base_ms": 40, "per_reqest_ms": 1}, "per_reqest_ms"),
        ({"base_ms": 40, "tp_speedup": [1.6]}, "tp_speedup"),
        ({"base_ms": 40, "tp_speedup": {"two": 1.6}}, "tp_speedup"),
        ({"base_ms": 40, "tp_speedup": {"0": 1.6}}, "tp_speedup"),
        ({"base_ms": 40, "tp_speedup": {"2": 0}}, "tp_speedup.2"),
    ],
)
def test_a_bad_value_is_named(record: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PaceModel.parse(json.dumps(record))

    assert caught.value.key == f"rlhfless.instrument.pace.{key}"
    assert caught.value.action


def test_a_typo_gets_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean per_request_ms\?"):
        PaceModel.parse('{"base_ms": 40, "per_reqest_ms": 1}')


@pytest.mark.parametrize("value", ["absent.json", "{", "{" * 9999, "40", "\0"])
def test_neither_json_nor_a_file(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PaceModel.parse(value)

    assert caught.value.key == "rlhfless.instrument.pace"


def test_a_file_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "pace.json").write_text("[40]")

    with pytest.raises(ConfigError, match="must be a JSON object"):
        PaceModel.parse(str(tmp_path / "pace.json"))


def test_an_undeclared_tensor_parallel_size_is_refused() -> None:
    Pacer(MODEL, tp=1)
    Pacer(MODEL, tp=2)

    with pytest.raises(ConfigError, match="no entry for tensor-parallel size 4"):
        Pacer(MODEL, tp=4)


def test_waits_for_the_rest_of_the_declared_time(time: FakeTime) -> None:
    paced = pacer(time)
    paced.begin(iteration())
    time.now_s += 0.008  # the real computation

    assert paced.wait() == PacedTime(0.04, 0.0)
    assert time.now_s == pytest.approx(100.04)


def test_gaps_between_iterations_do_not_add_up(time: FakeTime) -> None:
    paced = pacer(time)
    for step in range(100):
        paced.begin(iteration(continued=int(step > 0)))
        time.now_s += 0.008
        paced.wait()
        time.now_s += 0.003  # scheduler, and a sleep that ended late

    assert time.now_s - 0.003 == pytest.approx(100 + 100 * 0.04)


def test_a_new_batch_starts_its_own_clock(time: FakeTime) -> None:
    paced = pacer(time)
    paced.begin(iteration())
    paced.wait()
    time.now_s += 0.01  # idle

    paced.begin(iteration())
    paced.wait()

    assert time.now_s == pytest.approx(100 + 0.04 + 0.01 + 0.04)


def test_an_overrun_is_counted_once_and_not_caught_up(time: FakeTime) -> None:
    paced = pacer(time)
    paced.begin(iteration())
    time.now_s += 0.05

    assert paced.wait().overrun_s == pytest.approx(0.01)

    paced.begin(iteration(continued=1))
    assert paced.wait().overrun_s == 0
    assert time.now_s == pytest.approx(100 + 0.05 + 0.04)


def test_a_starved_scheduler_is_an_overrun_too(time: FakeTime) -> None:
    paced = pacer(time)
    paced.begin(iteration())
    paced.wait()
    time.now_s += 0.1
    paced.begin(iteration(continued=1))
    time.now_s += 0.008

    assert paced.wait().overrun_s == pytest.approx(0.1 + 0.008 - 0.04)
