"""The pages for users say what the records say, and name only commands, keys and files that exist."""

from __future__ import annotations

import importlib.util
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from verl_rlhfless.cli import app
from verl_rlhfless.config import RlhflessConfig
from verl_rlhfless.demo.columns import Summary, render_columns
from verl_rlhfless.report.table import render

ROOT = Path(__file__).parents[2]
README, EVIDENCE = ((ROOT / name).read_text() for name in ("README.md", "EVIDENCE.md"))
PAGES = README + EVIDENCE + (ROOT / "COMPATIBILITY.md").read_text()
FILES = sorted(path.name for path in ROOT.glob("*.md"))
_OPTION = r"--[a-z][a-z-]*"


def record_of(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def flat(text: str) -> str:
    """Return the text without its line breaks."""
    return " ".join(text.split())


def rows_of(text: str, head: str) -> list[list[str]]:
    """Return the cells below the head of a table, without its first column."""
    lines = text.split(head)[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("*") for cell in line.split("|")[2:-1]] for line in lines]


def table_of(name: str) -> str:
    """Return the text table between its marks."""
    shown = re.search(rf"<!-- {name}:begin -->\n```text\n(.*?)\n```\n<!-- {name}:end -->", EVIDENCE, re.DOTALL)
    assert shown is not None
    return shown.group(1)


def test_table_is_the_recorded_one() -> None:
    shown = table_of("demo-table")
    strip = [line.rstrip() for line in render(record_of("demo")).rstrip().splitlines()]
    assert shown.splitlines() == strip


def test_table_of_the_paced_demo_is_the_recorded_one() -> None:
    summaries = [Summary(**arm) for arm in record_of("columns")["arms"]]
    shown = render_columns(summaries).rstrip().splitlines()
    assert table_of("columns-table").splitlines() == [line.rstrip() for line in shown]


def test_what_is_said_of_the_demo_is_what_was_recorded() -> None:
    arms = record_of("demo")["arms"]
    gpu_s, step_s = (
        [statistics.median(step[key] for step in arms[arm]["steps"][1:]) for arm in ("elastic", "stock")]
        for key in ("gpu_s_allocated", "step_s")
    )
    totals = [arms[arm]["total"]["gpu_s_allocated"] for arm in ("elastic", "stock")]
    told = flat(README)
    assert f"{gpu_s[0] / gpu_s[1]:.2f} of stock's GPU-seconds at {step_s[0] / step_s[1]:.2f} of its step" in told
    assert f"takes {totals[0]:.0f} GPU-seconds against {totals[1]:.0f}." in told


def test_recorded_demo_passed_every_guard() -> None:
    record = record_of("demo")
    assert record["format"] == "rlhfless-ab/1" and set(record["arms"]) == {"stock", "elastic"}
    assert all(len(arm["steps"]) >= 4 for arm in record["arms"].values())
    assert record["guards"] and all(guard["ok"] for guard in record["guards"])


def test_coverage_of_predicted_lengths_is_the_recorded_one() -> None:
    traces = record_of("coverage")["results"]["traces"]
    of_steps = [trace["before"]["of_steps"] for trace in traces]
    figures = [
        [trace["before"]["coverage"] for trace in traces],
        [trace["running"]["coverage"] for trace in traces],
        [step["least"] for step in of_steps] + [step["most"] for step in of_steps],
    ]
    told = re.search(r"interval covers (\S+) % .*? and (\S+) % of those .*?; (\S+) % of the", flat(EVIDENCE))
    assert told is not None
    assert list(told.groups()) == [f"{100 * min(of):.0f}-{100 * max(of):.0f}" for of in figures]


def test_simulated_means_over_long_cells_are_the_recorded_ones() -> None:
    long = [record_of(f"simulate_wake_{wake}")["results"]["headline"]["long"] for wake in (1, 2, 5, 30)]
    rows = [
        [f"{arms['ours']['x_stock']:.2f}x, {arms['ours']['cost_stock']:.2f}" for arms in long],
        [f"{arms['ours']['run_cost_stock']:.2f}" for arms in long],
        *(
            [f"{arms[arm]['t_best']:.2f}, {arms[arm]['cost_best']:.2f}" for arms in long]
            for arm in ("ours", "rlhfuse", "oracle_prompts", "oracle")
        ),
    ]
    assert rows_of(EVIDENCE, "| Against | wake 1 s | 2 s | 5 s | 30 s |") == rows
    wake_2, wake_30 = long[1], long[3]
    ours, last = wake_2["ours"], wake_30["ours"]
    told = flat(README)
    assert (
        f"a step costs {ours['cost_stock']:.2f} of stock's if stock has the smallest tensor-parallel size that fits, "
        f"and {ours['cost_best']:.2f} (at {ours['t_best']:.2f} of the time) if it has the best one"
    ) in told
    assert (
        f"{ours['x_stock']:.2f}x the speed of stock at {ours['cost_stock']:.2f} of its cost, if it has the smallest "
        f"tensor-parallel size that fits; {ours['t_best']:.2f} of its step at {ours['cost_best']:.2f}, if it has the "
        f"best one. With wakes of 30 s the latter are {last['t_best']:.2f} and {last['cost_best']:.2f}. A step no "
        f"slower than the best size's costs {wake_2['ours_notslower']['cost_best']:.2f} of it"
    ) in told
    assert (
        f"costs {wake_2['ours_notslower']['cost_best']:.2f} of it (wake 2 s); with true lengths "
        f"{wake_2['oracle_notslower']['cost_best']:.2f}"
    ) in flat(EVIDENCE)


def test_what_the_paced_runs_showed_is_what_was_recorded() -> None:
    arms = {arm["arm"]: arm for arm in record_of("control_arms")["results"]["arms"]}
    stock, elastic = ({arm["arm"]: arm for arm in record_of("columns")["arms"]}[name] for name in ("stock", "elastic"))
    ratios = {name: (f"{arm['step_over_stock']:.2f}", f"{arm['gpu_over_stock']:.2f}") for name, arm in arms.items()}
    assert ratios["elastic"] == (f"{elastic['step_over_stock']:.2f}", f"{elastic['gpu_over_stock']:.2f}")
    routing = record_of("routing")["results"]["arms"]
    resident = f"{routing['all']['over_stock']:.2f}"
    rows = [[*ratios[name]] for name in ("elastic", "oracle", "fixed", "random")]
    assert rows_of(README, "| | Step | GPU-seconds |") == [*rows, [resident, ""]]
    order = ("elastic", "fixed", "random", "oracle")
    assert rows_of(EVIDENCE, "| | elastic | fixed fleets of the same mean |")[0] == [
        f"{step}, {gpu_s}" for step, gpu_s in map(ratios.__getitem__, order)
    ]
    routed = [routing[name] for name in ("stock", "all", "true-lengths", "no-prediction", "random")]
    assert rows_of(EVIDENCE, "| Rollout | stock | resident |") == [
        [f"{arm['rollout_s']:.1f}" for arm in routed],
        [f"{arm['over_stock']:.2f}" for arm in routed],
    ]
    (cold,) = record_of("columns_cold")["arms"]
    slower, cheaper = cold["step_s"] / stock["step_s"], cold["gpu_s"] / stock["gpu_s"]
    assert f"take {ratios['elastic'][1]} of the GPU-seconds of *stock* (verl without this plugin) at" in flat(README)
    assert f"at {ratios['elastic'][0]} of its step time" in flat(README)
    assert f"elastic takes {slower:.1f} times stock's step and {cheaper:.2f} of its GPU-seconds" in flat(README)
    assert f"{slower:.1f} times the step of stock above, at {cheaper:.2f} of its GPU-seconds" in flat(EVIDENCE)
    grown, saved = 100 * (elastic["step_over_stock"] - 1), 100 * (1 - elastic["gpu_over_stock"])
    assert f"lets a step grow by {grown:.0f} % to save {saved:.0f} % of the cost" in flat(EVIDENCE)
    fused = record_of("fusion")["results"]["arms"]
    off, on = fused["off"], fused["on"]
    shown = f"takes {on['step_s']:.1f} s instead of {off['step_s']:.1f} s ({on['over_off']:.2f})"
    assert shown in flat(EVIDENCE) and f"Fusion alone shortens a step to {on['over_off']:.2f}" in flat(README)


def test_time_and_cost_by_weight_are_the_recorded_ones() -> None:
    sweeps = [cell["sweeps"]["cost_weight"] for cell in record_of("sensitivity")["results"]["cells"]]
    assert {tuple(point["value"] for point in sweep) for sweep in sweeps} == {(0.0, 0.25, 0.5, 0.75, 1.0)}
    rows = [[f"{point['t_best']:.2f}, {point['cost_best']:.2f}" for point in sweep] for sweep in sweeps]
    assert rows_of(EVIDENCE, "| `cost_weight` | 0 | 0.25 | 0.5 (default) | 0.75 | 1 |") == rows


def test_how_near_the_simulator_comes_to_live_runs_is_what_was_recorded() -> None:
    told = []
    for prediction in record_of("sim_vs_live")["results"]["predictions"]:
        errors = [max(arm["median_error"].values()) for arm in prediction["arms"].values()]
        ratios = prediction["elastic_over_stock"]
        told.append([*(100 * error for error in errors), *(ratios[key]["error_points"] for key in ("step_s", "gpu_s"))])
    there, back = told
    text = flat(EVIDENCE)
    assert f"errors of {there[0]:.0f} % (stock) and {there[1]:.0f} % (elastic)" in text
    assert f"within {there[2]:.1f} points of the step and {there[3]:.1f} of the GPU-seconds" in text
    assert f"errors are {back[0]:.0f} % and {back[1]:.0f} %, {back[2]:.1f} and {back[3]:.1f} points" in text
    assert f"median errors of up to {max(*there[:2], *back[:2]):.0f} %" in flat(README)


def test_what_is_said_of_single_records_is_what_was_recorded() -> None:
    text = flat(EVIDENCE)
    start = record_of("engine_start")["results"]["median_s"]
    cold, recycled, parked = start["cold"], start["recycled"], start["parked"]
    warm = f"a start in a warm server {recycled:.1f} s and a wake {parked:.2f} s"
    assert f"a cold start takes {cold:.0f} s, {warm}" in text
    paper = record_of("paper_figures")["results"]["means"]
    free, paid = (paper[name]["rlhfless_paper"] for name in ("starts for nothing", "starts as they are"))
    assert f"has {free['speed_up']:.2f}x and {100 * (free['cost'] - 1):.0f} % when starts cost nothing" in text
    assert f"and {paid['speed_up']:.2f}x and {100 * (paid['cost'] - 1):.0f} % when starts are paid" in text
    sizes = record_of("sizes")["results"]["means"]
    assert f"every size has {sizes['every size']} of the best static fleet's objective" in text
    assert f"knows the best size beforehand {sizes['the best one, known beforehand']}" in text
    assert f"with the best static size {sizes['the best static one']}" in text
    faults = record_of("faults")["results"]
    assert f"{faults['faults']} deaths" in text and f"none of {faults['samples']} samples" in text
    over = [100 * (1 / run["computed_to_measured"] - 1) for run in record_of("host_memory")["results"].values()]
    assert f"peaked {over[0]:.0f} and {over[1]:.0f} % above" in text
    learnt = record_of("learning")["results"]["arms"]
    low, middle, high = sorted(learnt["stock"]["last"].values())
    (end,) = {f"{reward:.2f}" for reward in learnt["elastic"]["last"].values()}
    assert f"end at {low:.2f}, {middle:.2f} and {high:.2f}, and all of elastic's end at {end}" in text
    assert f"means, {learnt['stock']['mean_last']:.2f} and {learnt['elastic']['mean_last']:.2f}, are closer" in text


def test_what_is_said_of_gsm8k_is_what_was_simulated() -> None:
    text = (ROOT / "examples" / "README.md").read_text()
    with_fsdp = re.findall(r"^\| `(?!megatron)\w*gsm8k\w*` \|(.*)\|$", text, re.MULTILINE)
    more = [int(figure) for row in with_fsdp for figure in re.findall(r"([+-]?\d+)%", row.split("|")[2])]
    assert len(more) == 16 and f"with FSDP steps take and cost {min(more)}-{max(more)} % more" in flat(README)


def test_what_is_said_of_published_figures_is_what_was_recorded() -> None:
    results = record_of("published_figures")["results"]
    sources = json.loads((ROOT / "benchmarks" / "published_figures.json").read_text())["sources"]
    age, kinds = results["engine_by_age"], results["by_kind"]
    recent, old = age["recent"], age["old"]
    engine = [point for point in results["points"] if point["kind"] in ("decode", "batch", "prefill")]
    decoding = [point for point in engine if point["kind"] != "prefill"]
    batches = [point["batch"] for point in decoding if "is_old" not in sources[point["source"]]]
    starts = [kinds[kind]["range"][end] for kind, end in (("cold start", 0), ("wake", 1))]
    told = flat(EVIDENCE)
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
    in_short = f"{recent['median']:.2f} of published seconds at the median ({span(recent)}; {recent['n']} figures of"
    assert in_short in flat(README)


def span(group: dict[str, Any], digits: int = 2) -> str:
    return "-".join(f"{end:.{digits}f}" for end in group["range"])


def test_every_command_is_one_that_the_command_line_has() -> None:
    calls = re.findall(
        r"rlhfless ((?:trace )?(?:demo|ab|simulate|report|doctor|generate|record|stats)\b)([^`\n]*)", PAGES
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
    for section, key in re.findall(r"rlhfless\.(\w+)\.(\w+)", PAGES):
        assert hasattr(getattr(RlhflessConfig(), section), key), f"rlhfless.{section}.{key}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`|\()make\s([\w-]+)", PAGES, re.MULTILINE))
    assert {"demo", "test", "test-long"} <= named <= targets


def test_every_benchmark_exists() -> None:
    names = set(re.findall(r"python -m\s+(benchmarks\.[a-z_]+)", PAGES))
    assert len(names) > 10 and all(importlib.util.find_spec(name) for name in names)


@pytest.mark.parametrize("name", [*FILES, "examples/README.md", "benchmarks/results/README.md"])
def test_every_link_leads_to_a_file_and_a_heading(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors_of(found), target


def anchors_of(path: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_source_distribution_has_every_page() -> None:
    included = (ROOT / "pyproject.toml").read_text()
    assert all(f'    "/{name}",\n' in included for name in FILES)
