"""The README shows what a recorded demo printed, and names only commands that exist."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from verl_rlhfless.cli import app
from verl_rlhfless.config import RlhflessConfig
from verl_rlhfless.report.table import render

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
_OPTION = r"--[a-z][a-z-]*"


def test_table_is_the_recorded_one() -> None:
    shown = re.search(r"<!-- demo-table:begin -->\n```text\n(.*?)\n```\n<!-- demo-table:end -->", README, re.DOTALL)
    assert shown is not None
    record = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    strip = [line.rstrip() for line in render(record).rstrip().splitlines()]
    assert shown.group(1).splitlines() == strip


def test_what_is_said_of_the_demo_is_what_was_recorded() -> None:
    arms = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())["arms"]
    gpu_s, step_s = (
        [statistics.median(step[key] for step in arms[arm]["steps"][1:]) for arm in ("elastic", "stock")]
        for key in ("gpu_s_allocated", "step_s")
    )
    totals = [arms[arm]["total"]["gpu_s_allocated"] for arm in ("elastic", "stock")]
    told = " ".join(README.split())
    assert f"{gpu_s[0] / gpu_s[1]:.2f} of stock's GPU-seconds at {step_s[0] / step_s[1]:.2f} of its step" in told
    assert f"takes {totals[0]:.0f} GPU-seconds against {totals[1]:.0f}." in told


def test_recorded_demo_passed_every_guard() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    assert record["format"] == "rlhfless-ab/1" and set(record["arms"]) == {"stock", "elastic"}
    assert all(len(arm["steps"]) >= 4 for arm in record["arms"].values())
    assert record["guards"] and all(guard["ok"] for guard in record["guards"])


def test_coverage_of_predicted_lengths_is_the_recorded_one() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "coverage.json").read_text())
    traces = record["results"]["traces"]
    of_steps = [trace["before"]["of_steps"] for trace in traces]
    figures = [
        [trace["before"]["coverage"] for trace in traces],
        [trace["running"]["coverage"] for trace in traces],
        [step["least"] for step in of_steps] + [step["most"] for step in of_steps],
    ]
    told = re.search(r"interval covers (\S+) % .*? and (\S+) % of those .*?; (\S+) % of the", " ".join(README.split()))
    assert told is not None
    assert list(told.groups()) == [f"{100 * min(of):.0f}-{100 * max(of):.0f}" for of in figures]


def test_simulated_means_over_long_cells_are_the_recorded_ones() -> None:
    results = ROOT / "benchmarks" / "results"
    records = [json.loads((results / f"simulate_wake_{wake}.json").read_text()) for wake in (1, 2, 5, 30)]
    long = [record["results"]["headline"]["long"] for record in records]
    rows = [
        [f"{arms['ours']['x_stock']:.2f}x, {arms['ours']['cost_stock']:.2f}" for arms in long],
        [f"{arms['ours']['run_cost_stock']:.2f}" for arms in long],
        *(
            [f"{arms[arm]['t_best']:.2f}, {arms[arm]['cost_best']:.2f}" for arms in long]
            for arm in ("ours", "rlhfuse", "oracle_prompts", "oracle")
        ),
    ]
    table = README.split("| Against | wake 1 s | 2 s | 5 s | 30 s |")[1].split("\n\n")[0].splitlines()[2:]
    assert [[cell.strip() for cell in line.split("|")[2:-1]] for line in table] == rows


def test_what_is_said_of_published_figures_is_what_was_recorded() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "published_figures.json").read_text())["results"]
    sources = json.loads((ROOT / "benchmarks" / "published_figures.json").read_text())["sources"]
    age, kinds = results["engine_by_age"], results["by_kind"]
    recent, old = age["recent"], age["old"]
    engine = [point for point in results["points"] if point["kind"] in ("decode", "batch", "prefill")]
    decoding = [point for point in engine if point["kind"] != "prefill"]
    batches = [point["batch"] for point in decoding if "is_old" not in sources[point["source"]]]
    starts = [kinds[kind]["range"][end] for kind, end in (("cold start", 0), ("wake", 1))]
    told = " ".join(README.split())
    assert recent["n"] + old["n"] == len(engine) and f"at most {max(batches)} decoding at once" in told
    answers = [point["ratio"] for point in engine if point["source"] in ("gpustack-14b-h100", "gpustack-32b-h100")]
    assert "{:.2f} and {:.2f} for a thousand four-token answers".format(*answers) in told
    assert f"{recent['n']} published figures of 16-bit engines from May 2025 on" in told
    assert f"are {recent['median']:.2f} of the published ones at the median ({span(recent)}" in told
    assert f"{results['engine_by_age_and_tp']['recent, TP 4']['median']:.2f} in the only one with several GPUs" in told
    assert f"Of {old['n']} of older engines they are {old['median']:.2f} ({span(old)})" in told
    decode, prefill = (
        results["by_kind_and_gpu"][f"{kind}, RTX 6000 Ada as L40S"]["median"] for kind in ("decode", "prefill")
    )
    assert f"decoding is {decode:.2f} and prefill is {prefill:.2f}." in told
    assert f"By the same ratio starts are {starts[0]:.1f}-{starts[1]:.1f}, FSDP steps {span(kinds['train'], 1)}" in told
    assert f"load of weights at TP 8 {kinds['weight load']['median']:.2f}" in told


def span(group: dict[str, Any], digits: int = 2) -> str:
    return "-".join(f"{end:.{digits}f}" for end in group["range"])


def test_every_command_is_one_that_the_command_line_has() -> None:
    calls = re.findall(
        r"rlhfless ((?:trace )?(?:demo|ab|simulate|report|doctor|generate|record|stats)\b)([^`\n]*)", README
    )
    assert {name for name, _ in calls} >= {"demo", "ab", "report", "simulate", "doctor", "trace record"}
    for name, rest in calls:
        shown = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, name
        used = re.findall(_OPTION, re.sub('".*?"', "", rest.split("#")[0]))
        assert set(used) <= set(re.findall(_OPTION, shown.output)), name


def test_every_group_and_choice_in_the_table_can_be_chosen() -> None:
    groups = ROOT / "hydra_configs" / "rlhfless"
    rows = re.findall(r"^\| `rlhfless/(\w+)` \|([^|]*)\|", README, re.MULTILINE)
    assert {group for group, _ in rows} == {folder.name for folder in groups.iterdir() if folder.is_dir()}
    for group, choices in rows:
        for choice in re.findall(r"`(\w+)`", choices):
            assert (groups / group / f"{choice}.yaml").is_file(), f"{group}={choice}"


def test_every_key_of_ours_is_in_the_schema() -> None:
    for section, key in re.findall(r"rlhfless\.(\w+)\.(\w+)", README):
        assert hasattr(getattr(RlhflessConfig(), section), key), f"rlhfless.{section}.{key}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make (\w+)", README)) <= targets
