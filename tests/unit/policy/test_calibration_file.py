"""A calibration file is read as it was written, and refused with key and rule when it says something impossible."""

from __future__ import annotations

from typing import Any

import pytest

from verl_rlhfless.errors import ConfigError
from verl_rlhfless.policy.calibrate import parse_calibration
from verl_rlhfless.policy.perf import Efficiencies

GOOD: dict[str, Any] = {"format": "rlhfless-calibration/1", "gpu": "H100", "efficiencies": {"hbm": 0.7, "host": 0.5}}


def test_what_a_file_does_not_mention_keeps_its_shipped_value() -> None:
    read = parse_calibration(GOOD, "c.json")
    assert (read.gpu, read.efficiencies.hbm, read.efficiencies.host) == ("H100", 0.7, 0.5)
    assert read.efficiencies.prefill == Efficiencies().prefill


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ([], "format"),
        ({}, "format"),
        (GOOD | {"format": "rlhfless-calibration/2"}, "format"),
        (GOOD | {"gpu": "CPU"}, "gpu"),
        (GOOD | {"gpu": ["H100"]}, "gpu"),
        (GOOD | {"efficiencies": None}, "efficiencies"),
        (GOOD | {"efficiencies": {"peer": 0.5}}, "efficiencies"),
        (GOOD | {"efficiencies": {"hbm": 1.2}}, "efficiencies.hbm"),
        (GOOD | {"efficiencies": {"launch_s": 0}}, "efficiencies.launch_s"),
        (GOOD | {"efficiencies": {"prefill": float("nan")}}, "efficiencies.prefill"),
        (GOOD | {"efficiencies": {"host": True}}, "efficiencies.host"),
    ],
)
def test_an_impossible_file_is_refused(values: object, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_calibration(values, "c.json")
    assert caught.value.key == f"c.json: {key}"
