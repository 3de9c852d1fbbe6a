"""The GPU kit without an engine: shapes, points, resumption, and what it makes of measured rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu.comparison import calibration_record, compared, fit, table
from benchmarks.gpu.device import data_sheet
from benchmarks.gpu.rows import Row
from benchmarks.gpu.session import Session
from benchmarks.gpu.workload import FULL, SHAPES, write_model
from verl_rlhfless.errors import ConfigError, DataError
from verl_rlhfless.policy.calibrate import parse_calibration
from verl_rlhfless.policy.gpus import GPUS
from verl_rlhfless.policy.perf import EnginePerf
from verl_rlhfless.policy.shapes import MODELS, parse_model_config

PERF = EnginePerf(MODELS["qwen2.5-7b"], GPUS["H100"], 1)
SUBJECT = {"device": "NVIDIA H100 80GB HBM3", "engine": "fake", "model": "qwen2.5-7b"}


@pytest.mark.parametrize("name", SHAPES)
def test_the_model_that_is_written_has_the_shape_that_is_simulated(name: str, tmp_path: Path) -> None:
    values = json.loads((write_model(tmp_path / name, SHAPES[name]) / "config.json").read_text())
    assert parse_model_config(values, name) == SHAPES[name]


@pytest.mark.parametrize("gpu", ["L40S", "H100"])
def test_every_point_fits_into_the_cache_of_every_model(gpu: str) -> None:
    for name in ("qwen2.5-3b", "qwen2.5-7b"):
        perf = EnginePerf(MODELS[name], GPUS[gpu], 1)
        points = FULL.decode_points(perf)
        assert {1, 8, 32} <= {batch for batch, _ in points}
        assert {context for _, context in points} == {256, 2048, 8192}
        assert all(batch * context < perf.kv_blocks * 16 for batch, context in points)


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100-80G"),
        ("NVIDIA L40S", "L40S"),
    ],
)
def test_a_gpu_is_known_by_its_drivers_name(name: str, gpu: str) -> None:
    assert data_sheet(name).name == gpu


@pytest.mark.parametrize("name", ["NVIDIA A100-SXM4-40GB", "NVIDIA L40", "Tesla T4"])
def test_a_gpu_without_a_data_sheet_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="device"):
        data_sheet(name)


def rows_of(perf: EnginePerf) -> list[Row]:
    """Return what a machine would measure that is exactly as ``perf`` says."""
    rows = []
    for batch, context in FULL.decode_points(perf):
        seconds = perf.iteration_s(batch, batch * context)
        rows.append(Row.of("decode", [seconds], decodes=batch, context_tokens=batch * context))
    for count in FULL.prompts:
        rows.append(Row.of("prefill", [perf.iteration_s(0, 0, count, count * (count + 1) // 2)], prefill_tokens=count))
    return [*rows, Row.of("load", [perf.load_s], num_bytes=perf.shape.weight_bytes), Row.of("abort", [0.1])]


def test_the_calibration_of_a_slower_machine_is_found_written_and_read() -> None:
    slow = replace(PERF, efficiencies=replace(PERF.efficiencies, hbm=0.6, prefill=0.4, launch_s=2.5e-3, host=0.3))
    fitted = fit(rows_of(slow), PERF)
    read = parse_calibration(json.loads(json.dumps(calibration_record(rows_of(slow), PERF, fitted))), "c.json")
    assert read.gpu == "H100"
    assert read.efficiencies.hbm == pytest.approx(0.6, rel=0.05)
    assert read.efficiencies.prefill == pytest.approx(0.4, rel=0.05)
    assert read.efficiencies.host == pytest.approx(0.3)


def test_the_table_shows_how_far_the_shipped_model_is_off_and_what_fitting_leaves() -> None:
    slow = replace(PERF, efficiencies=replace(PERF.efficiencies, hbm=0.4, launch_s=3e-3))
    lines = compared(rows_of(slow), PERF, fit(rows_of(slow), PERF).perf)
    decodes = [line for line in lines if line["what"] == "decode"]
    assert all(line["shipped_error"] < -0.3 and abs(line["fitted_error"]) < 0.05 for line in decodes)
    (abort,) = (line for line in lines if line["what"] == "abort")
    assert "shipped_s" not in abort, "the model has no figure for it"
    assert len(table(lines).splitlines()) == 1 + len(lines)


class Fake:
    """A subject that counts its measurements; some parts fail."""

    def __init__(self, *broken: str) -> None:
        self.measured: list[str] = []
        self._broken = broken

    @property
    def parts(self) -> dict[str, Callable[[], list[Row]]]:
        return {name: lambda name=name: self._measure(name) for name in ("start", "decode", "abort")}  # type: ignore[misc]

    def _measure(self, name: str) -> list[Row]:
        self.measured.append(name)
        if name in self._broken:
            raise RuntimeError("out of memory")
        return [Row.of(name, [0.25, 0.5, 1.0], decodes=4)]

    def close(self) -> None: ...


PARTS = ["start", "decode", "abort"]


def test_a_failed_part_ends_no_other_and_only_it_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "parts.json"
    first, second = Fake("decode"), Fake()
    session = Session.resume(path, SUBJECT)
    session.run(first, PARTS, lambda: True)
    assert session.failures == {"decode": "RuntimeError: out of memory"}
    again = Session.resume(path, SUBJECT)
    again.run(second, PARTS, lambda: True)
    assert (first.measured, second.measured) == (PARTS, ["decode"])
    assert again.rows == [Row(name, 0.5, 0.25, 1.0, decodes=4) for name in ("start", "abort", "decode")]


def test_no_part_begins_after_the_time_is_up_and_what_is_finished_is_kept(tmp_path: Path) -> None:
    path, fake = tmp_path / "parts.json", Fake()
    session = Session.resume(path, SUBJECT)
    session.run(fake, PARTS, lambda: not fake.measured)
    assert fake.measured == ["start"]
    assert set(session.failures) == {"decode", "abort"}
    assert set(Session.resume(path, SUBJECT).parts) == {"start"}


def test_figures_of_another_device_are_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "parts.json"
    Session.resume(path, SUBJECT).run(Fake(), PARTS, lambda: True)
    with pytest.raises(DataError, match="another --out"):
        Session.resume(path, SUBJECT | {"device": "NVIDIA H200"})
