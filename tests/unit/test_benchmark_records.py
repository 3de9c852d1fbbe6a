"""Each record says with which command and by which code it was made, and holds no path of a machine."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import benchmarks
from benchmarks import coverage, fusion, paper_figures, record, routing, scaling, sensitivity, simulate, sizes
from benchmarks.record import Part, keep, parts_of, write_result
from verl_rlhfless.demo import ablation
from verl_rlhfless.sim.generate import TraceSpec, write_trace

RESULTS = Path(benchmarks.__file__).parent / "results"
OLD = {"commit": "0ld", "has_uncommitted_changes": False}
NOW = {"commit": "n0w", "has_uncommitted_changes": False}
FORMATS = {"rlhfless-bench/1", "rlhfless-ab/1", "rlhfless-columns/1"}
OF_UNKNOWN_CODE = {
    "columns_cold.json": "hours of paced runs, made before tables were stamped",
    "columns_rl_math.json": "hours of paced runs, made before tables were stamped",
    "faults.json": "its commit is in no history; half an hour of faults on real engines",
}
"""Records that wait to be made again. Their figures were measured; by which code is no longer known."""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.jsonl"
    write_trace(TraceSpec(2, 1, 8, 2, mean=60.0, tail=0.8, max_response_tokens=256), path)
    return path


def recorded(path: Path, name: str) -> Any:
    found = json.loads(path.read_text())
    assert found["format"] == "rlhfless-bench/1" and found["kind"] == "simulated"
    assert found["command"].startswith(f"python -m benchmarks.{name} tiny.jsonl ") and str(path.parent) not in str(
        found
    )
    assert {"commit", "has_uncommitted_changes", "versions", "hardware"} <= found.keys()
    return found["results"]


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def run_simulate(trace: Path, out: Path, arms: str, update: bool) -> None:
    simulate.main([trace], out, wake_s=3.0, arms=arms, clusters="l40s-16", models="qwen2.5-3b", update=update)


def test_a_comparison_keeps_the_arms_of_an_earlier_one(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "simulated.json"
    run_simulate(trace, out, "ours", update=False)
    change(out, parts={"ours": OLD})
    run_simulate(trace, out, "rlhfuse", update=True)
    written = json.loads(out.read_text())
    assert written["parts"]["ours"] == OLD and written["parts"]["rlhfuse"] != OLD and written["commit"] is None
    results = recorded(out, "simulate")
    assert results["wake_s"] == 3.0 and {"headline", "targets"} <= results.keys()
    (cell,) = results["cells"]
    assert {"ours", "rlhfuse", "stock_sync"} <= cell["arms"].keys()


def test_kept_arms_are_not_held_against_another_stock(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "simulated.json"
    run_simulate(trace, out, "ours", update=False)
    results = json.loads(out.read_text())["results"]
    results["cells"][0]["arms"]["stock_sync"]["step_s"] += 1
    change(out, results=results)
    with pytest.raises(SystemExit, match="stock"):
        run_simulate(trace, out, "rlhfuse", update=True)


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
    for name, found in kept_records().items():
        assert found["format"] in FORMATS, name
        if found["format"] == "rlhfless-bench/1":
            assert found["command"].split()[:3] == listed[name].split()[:3]


def kept_records() -> dict[str, dict[str, Any]]:
    return {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=RESULTS, capture_output=True, text=True, timeout=60)
    return done.stdout.strip() if done.returncode == 0 else None


def test_every_record_is_of_code_that_this_history_has() -> None:
    try:
        top, is_shallow = git("rev-parse", "--show-toplevel"), git("rev-parse", "--is-shallow-repository")
    except FileNotFoundError:
        pytest.skip("git is not there")
    if top is None or Path(top) != RESULTS.parents[1] or is_shallow != "false":
        pytest.skip("not a whole clone")
    unknown = set()
    for name, found in kept_records().items():
        made_by = (
            [found, *found.get("parts", {}).values()] if found.get("commit") else list(found.get("parts", {}).values())
        )
        assert not any(one.get("has_uncommitted_changes") for one in made_by), f"{name}: made by code that nobody has"
        commits = {one.get("commit") for one in made_by}
        if not commits or any(c is None or git("merge-base", "--is-ancestor", c, "HEAD") is None for c in commits):
            unknown.add(name)
    assert unknown == OF_UNKNOWN_CODE.keys()


def test_a_part_that_is_kept_keeps_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, runs = tmp_path / "out" / "on" / "figures.json", itertools.count(1)
    for now in (OLD, NOW):
        monkeypatch.setattr(record, "code", lambda now=now: now)
        part = keep(path, {"steps": 7}, lambda: {"run": next(runs)})
    assert part == Part({"run": 1}, OLD)
    new = keep(tmp_path / "off.json", {"steps": 7}, lambda: {})
    written = write_result("r", {}, command="c", folder=tmp_path, parts={"on": part.code, "off": new.code})
    assert json.loads(written.read_text())["commit"] is None
    assert parts_of(json.loads(written.read_text()), ["on", "off", "lost"]) == {
        "on": OLD,
        "off": NOW,
        "lost": record.UNKNOWN,
    }
    agreed = json.loads(write_result("r", {}, command="c", folder=tmp_path, parts={"on": OLD, "off": OLD}).read_text())
    assert agreed["commit"] == "0ld"


@pytest.mark.parametrize("kept", [[0.1, 0.2], {"step_s": 3.0}, {"settings": {"steps": 4}}])
def test_a_part_of_other_or_unknown_settings_is_refused(kept: Any, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text(json.dumps(kept))
    with pytest.raises(SystemExit, match="other settings"):
        keep(path, {"steps": 7}, lambda: pytest.fail("it ran"))


FIGURES = {"step_s": 1.0, "rollout_s": 1.0, "host_cpu_percent": 9.0, "rollout_probs_diff_max": 0.0, "is_complete": True}


@pytest.mark.parametrize(("module", "arms"), [(fusion, "off,on"), (routing, "stock,all")])
def test_the_command_names_the_trace_and_every_arm_its_commit(
    module: ModuleType, arms: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = {name: {"commit": name, "has_uncommitted_changes": False} for name in arms.split(",")}
    figures = {**FIGURES, "response_tokens": [1]}
    monkeypatch.setattr(module, "measure", lambda name, *_: Part(dict(figures), code[name]))
    monkeypatch.setattr(ablation, "prepare", lambda *_: None)
    monkeypatch.setattr(record, "_RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["", "--out", str(tmp_path), "--arms", arms, "--trace", "/data/mine.jsonl.gz"])
    module.main()
    name = module.__name__.rpartition(".")[2]
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["command"] == f"python -m benchmarks.{name} --out OUT --arms {arms} --trace mine.jsonl.gz"
    assert found["parts"] == code and found["commit"] is None


def test_a_simulated_step_takes_the_median_of_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 2.0, 10.0, 14.0, 20.0, 40.0])  # runs of 2, 4 and 20 s, of two steps each
    monkeypatch.setattr(scaling.time, "process_time", lambda: next(ticks))
    point = scaling.simulated(4, 2, "h100-16", repeats=3)
    assert (point["s_per_step"], point["worst_s_per_step"]) == (2.0, 10.0)


@pytest.mark.parametrize(("step_s", "peak_gib", "is_met"), [(0.1, 2.0, True), (0.101, 0.1, False), (0.1, 2.01, False)])
def test_a_size_is_held_against_its_time_and_its_memory(step_s: float, peak_gib: float, is_met: bool) -> None:
    assert scaling.judged({"s_per_step": step_s, "peak_gib": peak_gib}, 0.1)["is_met"] is is_met
