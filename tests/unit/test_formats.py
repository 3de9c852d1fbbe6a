"""What FORMATS.md shows is what readers take and commands write."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from verl_rlhfless.cli import app
from verl_rlhfless.demo.assets import read_problems
from verl_rlhfless.live.pacing import PaceModel
from verl_rlhfless.policy.calibrate import parse_calibration
from verl_rlhfless.sim.cluster import _KEYS, parse_cluster
from verl_rlhfless.sim.generate import TraceSpec, write_trace
from verl_rlhfless.trace import _GROUP_OPTIONS, read_header, read_trace

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "FORMATS.md").read_text()
BLOCKS = re.findall(r"```jsonl?\n(.*?)```", TEXT, re.DOTALL)


def block(mark: str) -> str:
    (found,) = [text for text in BLOCKS if mark in text]
    return found


def assert_has_keys(shown: Any, written: Any) -> None:
    """Check that every key that is shown is written, at its place."""
    if isinstance(shown, dict):
        assert shown.keys() <= written.keys()
        for key in shown:
            assert_has_keys(shown[key], written[key])
    elif isinstance(shown, list):
        assert_has_keys(shown[0], written[0])


def test_the_trace_is_read_and_shows_every_key(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(block("rlhfless-trace/1"))
    steps = list(read_trace(path))
    assert read_header(path).n == 2 and [step.step for step in steps] == [1, 2]
    assert steps[1].groups[0].turns == ((100, 200), (512,))
    assert all(f'"{key}"' in block("rlhfless-trace/1") for key in _GROUP_OPTIONS)


def test_the_cluster_is_read_and_shows_every_key() -> None:
    values = json.loads(block("rlhfless-cluster/1"))
    assert parse_cluster(values, "lab.json").num_gpus == 16 and values.keys() == set(_KEYS)
    needed = {key: values[key] for key in ("format", "gpu", "num_nodes", "gpus_per_node")}
    assert parse_cluster(needed, "lab.json").usd_per_gpu_h == 6.88


def test_the_calibration_is_read() -> None:
    measured = parse_calibration(json.loads(block("rlhfless-calibration/1")), "calibration.json")
    assert measured.gpu == "H100" and measured.efficiencies.host == 0.65


def test_the_pacing_profile_is_read_and_shows_every_key() -> None:
    text = block("base_ms")
    assert PaceModel.parse(text).tp_speedup[2] == 1.6
    assert json.loads(text).keys() == {key.name for key in fields(PaceModel)}


def test_the_problem_is_read(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(block("question"))
    (problem,) = read_problems(path)
    assert problem.question == "What is 40 + 2?"


def test_a_comparison_holds_what_is_shown() -> None:
    recorded = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    assert_has_keys(json.loads(block("rlhfless-ab/1")), recorded)


def test_a_simulation_holds_what_is_shown(tmp_path: Path) -> None:
    write_trace(TraceSpec(1, 1, 8, 2, mean=60.0, tail=0.8, max_response_tokens=256), tmp_path / "trace.jsonl")
    arguments = ["simulate", str(tmp_path / "trace.jsonl"), "--arms", "ours", "--json", str(tmp_path / "out.json")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert_has_keys(json.loads(block("rlhfless-sim/1")), json.loads((tmp_path / "out.json").read_text()))
