"""Each record says with which command it was made, and holds no path of a machine."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

import benchmarks
from benchmarks import coverage, paper_figures, sensitivity, simulate, sizes
from verl_rlhfless.sim.generate import TraceSpec, write_trace

RESULTS = Path(benchmarks.__file__).parent / "results"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.jsonl"
    write_trace(TraceSpec(2, 1, 8, 2, mean=60.0, tail=0.8, max_response_tokens=256), path)
    return path


def recorded(path: Path, name: str) -> Any:
    record = json.loads(path.read_text())
    assert record["format"] == "rlhfless-bench/1" and record["kind"] == "simulated"
    assert record["command"].startswith(f"python -m benchmarks.{name} tiny.jsonl ") and str(path.parent) not in str(
        record
    )
    assert {"commit", "versions", "hardware"} <= record.keys()
    return record["results"]


def test_a_comparison_keeps_the_arms_of_an_earlier_one(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "simulated.json"
    for arms, update in (("ours", False), ("rlhfuse", True)):
        simulate.main([trace], out, wake_s=3.0, arms=arms, clusters="l40s-16", models="qwen2.5-3b", update=update)
    results = recorded(out, "simulate")
    assert results["wake_s"] == 3.0 and {"headline", "targets"} <= results.keys()
    (cell,) = results["cells"]
    assert {"ours", "rlhfuse", "stock_sync"} <= cell["arms"].keys()


def test_the_papers_figures_are_recorded(trace: Path, tmp_path: Path) -> None:
    paper_figures.main([trace], tmp_path / "paper.json")
    results = recorded(tmp_path / "paper.json", "paper_figures")
    assert len(results["cells"]) == 4 and results["means"].keys() == paper_figures.ACCOUNTINGS.keys()


def test_coverage_is_recorded_before_and_while_a_step_runs(tmp_path: Path) -> None:
    path = tmp_path / "tiny.jsonl"
    write_trace(TraceSpec(2, 3, 16, 4, mean=60.0, tail=0.8, max_response_tokens=4096), path)
    coverage.main([path], tmp_path / "coverage.json")
    results = recorded(tmp_path / "coverage.json", "coverage")
    (row,) = results["traces"]
    assert row["steps"] == 4 and row["before"]["samples"] == 4 * 64 and row["before"]["first_visit_coverage"] is None
    assert 0.9 * 4 * 32 < row["running"]["samples"] <= 4 * 32
    for entry, when in zip(results["targets"], ("before", "running"), strict=True):
        is_inside = 0.75 <= row[when]["coverage"] <= 0.85
        assert entry["verdict"] == ("met" if is_inside else "missed") and bool(entry["missed"]) is not is_inside


def test_sizes_are_recorded(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "LONG_ROLLOUT_S", 0.0)
    sizes.main([trace], tmp_path / "sizes.json")
    results = recorded(tmp_path / "sizes.json", "sizes")
    assert len(results["cells"]) == 4 and results["wake_s"] == 2.0


def test_sensitivity_is_recorded_and_drawn(trace: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "sensitivity.json", tmp_path / "sensitivity.png"
    sensitivity.main([trace], out, plot, cells="tiny:l40s-16:qwen2.5-3b")
    (cell,) = recorded(out, "sensitivity")["cells"]
    assert cell["sweeps"].keys() == sensitivity.TITLES.keys() and plot.stat().st_size > 0


def test_every_result_is_listed_with_a_command_that_exists() -> None:
    rows = re.findall(r"^\| (`.+?) \| \w+ \| `(.+?)`", (RESULTS / "README.md").read_text(), re.MULTILINE)
    listed = {name: command for names, command in rows for name in re.findall(r"`(.+?)`", names)}
    assert listed.keys() == {path.name for path in RESULTS.iterdir()} - {"README.md"}
    modules = [command.split()[2] for command in listed.values() if command.startswith("python -m ")]
    assert len(modules) > 20 and all(importlib.util.find_spec(module) for module in modules)
    for path in RESULTS.glob("*.json"):
        record = json.loads(path.read_text())
        if "format" in record and record["format"] == "rlhfless-bench/1":
            assert record["command"].split()[:3] == listed[path.name].split()[:3]
