"""A folder of records becomes a report with its picture; another folder is refused with what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.observed_run import RunFolder, elastic_run, stock_run
from verl_rlhfless.ab.arms import Arm
from verl_rlhfless.ab.compare import Comparison, build_record
from verl_rlhfless.ab.training import ArmOutcome
from verl_rlhfless.errors import DataError
from verl_rlhfless.report.folder import write_report
from verl_rlhfless.report.guards import GuardLimits

PNG = b"\x89PNG"


@pytest.fixture
def compared(tmp_path: Path) -> Path:
    outcomes = {}
    for name, run in (("stock", stock_run), ("elastic", elastic_run)):
        (tmp_path / name).mkdir()
        folder = run(tmp_path / name)
        for step in (1, 2):
            folder.lengths(step, {0: [10, 20], 1: [30, 40]})
        outcomes[name] = ArmOutcome(folder.path, 0, ())
    outcomes["resident"] = ArmOutcome(tmp_path / "resident", 1, (), "verl ended with exit code 1: no memory")
    arms = (Arm("stock", ("a=1",)), Arm("elastic", ("b=2",), pulls_weights=True, is_ours=True), Arm("resident", ()))
    recipe = {"text": "bash run.sh", "digest": "d", "steps": 2}
    limits = GuardLimits(num_steps=2, num_samples=4, max_gpus=4)
    record = build_record(Comparison(tmp_path, arms, limits, 4, 7, recipe), outcomes)
    (tmp_path / "ab.json").write_text(json.dumps(record, allow_nan=False))
    return tmp_path


def row(text: str, *first: str) -> list[str]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return next(cells for cells in rows if cells[: len(first)] == list(first))


def test_the_report_holds_totals_steps_guards_failures_and_the_picture(compared: Path) -> None:
    text = write_report(compared).read_text()
    assert row(text, "stock")[1:6] == ["10.0", "4.0", "240.0", "44.0", "160.0"]
    assert row(text, "elastic", "2")[2:8] == ["10.0", "2.0", "33.0", "11.0", "15.0", "7.0"]
    assert row(text, "max_gpus/elastic")[1:] == ["4", "4", "ok"]
    assert "**resident failed:** verl ended with exit code 1: no memory" in text
    assert "bash run.sh" in text and "b=2" in text
    for picture in ("timeline.png", "timeline-steps.png"):
        assert f"]({picture})" in text
        assert (compared / picture).read_bytes().startswith(PNG)


def test_arms_are_compared_by_their_steps_after_the_first(compared: Path) -> None:
    text = write_report(compared).read_text()
    _, _, after = text.partition("divided by those of stock")
    assert row(after, "elastic") == ["elastic", "1", "1.00", f"{33 / 44:.2f}", f"{11 / 22:.2f}", f"{15 / 22:.2f}", "-"]


def test_an_arm_that_failed_is_compared_by_the_steps_that_both_did_and_hides_no_other(compared: Path) -> None:
    record = json.loads((compared / "ab.json").read_text())
    stock, elastic = record["arms"]["stock"], record["arms"]["elastic"]
    stock["steps"].append({**stock["steps"][1], "step": 3, "step_s": 90.0})
    record["arms"]["slow"] = {**elastic, "steps": elastic["steps"][:1]}
    (compared / "slow").symlink_to(compared / "elastic")
    (compared / "ab.json").write_text(json.dumps(record))
    _, _, after = write_report(compared).read_text().partition("divided by those of stock")
    assert row(after, "elastic")[1:3] == ["1", "1.00"]
    assert "| slow |" not in after.partition("##")[0]


def test_the_gpus_of_the_host_are_named(compared: Path) -> None:
    record = json.loads((compared / "ab.json").read_text())
    record["hardware"]["gpus"] = ["NVIDIA L40S", "NVIDIA L40S"]
    (compared / "ab.json").write_text(json.dumps(record))
    assert "4 GPUs (NVIDIA L40S); " in write_report(compared).read_text()


def test_what_was_planned_stands_beside_what_was_measured(compared: Path) -> None:
    planned = {"event": "planned", "t": 121.0, "step": 2, "reason": "tail", "predicted_step_s": 8.0}
    planned["forecast"] = {"rollout_s": 5.0, "static_step_s": 3.0}
    (compared / "elastic" / "events-2.jsonl").write_text(json.dumps(planned) + "\n")
    text = write_report(compared).read_text()
    assert row(text, "elastic", "2", "step_s") == ["elastic", "2", "step_s", "8.0", "10.0", "-20 %"]
    assert row(text, "elastic", "2", "rollout_s") == ["elastic", "2", "rollout_s", "5.0", "5.5", "-9 %"]
    assert row(text, "elastic", "2", "static_step_s")[3:] == ["3.0", "-", "-"]


def test_what_was_planned_of_a_step_is_not_measured_with_the_validation_after_it(compared: Path) -> None:
    planned = {"event": "planned", "t": 121.0, "step": 2, "reason": "tail", "forecast": {"gpu_s": 32.0}}
    (compared / "elastic" / "events-2.jsonl").write_text(json.dumps(planned) + "\n")
    # of the window's 11 s, in which the trainer holds 2 GPUs, verl's timer measures the first 10
    text = write_report(compared).read_text()
    assert row(text, "elastic", "2", "gpu_s") == ["elastic", "2", "gpu_s", "32.0", "31.0", "+3 %"]


def test_without_predictions_guards_or_a_comparison_one_run_has_a_report_too(tmp_path: Path) -> None:
    text = write_report(stock_run(tmp_path).path).read_text()
    assert text.startswith(f"# Run {tmp_path.name}")
    assert "Predicted" not in text and "Guards" not in text and "divided" not in text
    assert (tmp_path / "timeline.png").exists()


def test_a_run_that_never_trained_has_the_picture_of_its_leases_alone(tmp_path: Path) -> None:
    RunFolder(tmp_path).lease("pool", 2, 0.0, 30.0).host(0.0, 30.0)
    text = write_report(tmp_path).read_text()
    assert "(timeline.png)" in text and "timeline-steps.png" not in text


def test_an_asynchronous_arm_is_marked(compared: Path) -> None:
    record = json.loads((compared / "ab.json").read_text())
    record["arms"]["elastic"]["is_asynchronous"] = True
    (compared / "ab.json").write_text(json.dumps(record))
    text = write_report(compared).read_text()
    assert r"| elastic\* |" in text and "another algorithm" in text


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        write_report(tmp_path / "none")
    with pytest.raises(DataError, match=r"holds neither ab\.json nor leases\.jsonl. Give the --out of"):
        write_report(tmp_path)
    (tmp_path / "stock").mkdir()
    stock_run(tmp_path / "stock")
    with pytest.raises(DataError, match=r"unfinished comparison.*stock"):
        write_report(tmp_path)
    (tmp_path / "demo" / "unpaced").mkdir(parents=True)
    (tmp_path / "demo" / "unpaced" / "ab.json").write_text("{}")
    with pytest.raises(DataError, match=r"Give one of the demo's columns: \S+demo/unpaced\."):
        write_report(tmp_path / "demo")
    for content, says in [
        ("{", "is not JSON"),
        ('{"format": "x"}', "is not a record"),
        ('{"format": "rlhfless-ab/1"}', "`arms` is missing"),
        ('{"format": "rlhfless-ab/1", "arms": {}, "guards": 3}', "`guards` is missing or of another form"),
        ('{"format": "rlhfless-ab/1", "arms": {"stock": {"steps": []}}, "guards": []}', "has another form .*'total'"),
    ]:
        (tmp_path / "ab.json").write_text(content)
        with pytest.raises(DataError, match=says):
            write_report(tmp_path)
