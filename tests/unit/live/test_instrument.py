"""The instrument's keys become the environment of the run's processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from verl_rlhfless.config import InstrumentConfig
from verl_rlhfless.errors import ConfigError
from verl_rlhfless.live.instrument import instrument_environment
from verl_rlhfless.live.pacing import PaceModel


def test_nothing_is_set_when_it_is_off() -> None:
    assert instrument_environment(InstrumentConfig()) == {}


def test_pace_arrives_as_a_model_that_engines_can_read(tmp_path: Path) -> None:
    profile = tmp_path / "pace.json"
    profile.write_text(json.dumps({"base_ms": 40, "per_update_token_us": 3}))
    environment = instrument_environment(InstrumentConfig(pace=str(profile)))
    assert PaceModel.parse(environment["RLHFLESS_PACE"]) == PaceModel(base_ms=40, per_update_token_us=3)


def test_observer_folder_is_absolute_and_holds_verls_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    environment = instrument_environment(InstrumentConfig(observer="records"))
    assert environment == {
        "RLHFLESS_OBSERVER_DIR": str(tmp_path / "records"),
        "VERL_FILE_LOGGER_PATH": str(tmp_path / "records" / "metrics.jsonl"),
    }


def test_bad_profile_is_refused_by_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rlhfless\.instrument\.pace"):
        instrument_environment(InstrumentConfig(pace=str(tmp_path / "missing.json")))
