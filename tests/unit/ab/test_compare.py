"""Arms run one after another whatever becomes of each, and the record says what failed and why."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.unit.observed_run import elastic_run, stock_run
from verl_rlhfless.ab.arms import Arm
from verl_rlhfless.ab.compare import Comparison, compare, is_sound
from verl_rlhfless.ab.process import end_group
from verl_rlhfless.ab.training import ArmOutcome, Say, last_words
from verl_rlhfless.errors import RlhflessError
from verl_rlhfless.report.guards import GuardLimits

ARMS = (Arm("stock", ()), Arm("elastic", (), pulls_weights=True, is_ours=True))
LIMITS = GuardLimits(num_steps=2, num_samples=4, max_gpus=4)


def recorded(arm: Arm, out: Path) -> ArmOutcome:
    (out / arm.name).mkdir()
    run = {"stock": stock_run, "elastic": elastic_run}[arm.name](out / arm.name)
    for step in (1, 2):
        run.lengths(step, {0: [10, 20], 1: [30, 40]})
    return ArmOutcome(run.path, 0, ())


def run(out: Path, train: Callable[[Arm, Say], ArmOutcome], arms: tuple[Arm, ...] = ARMS) -> tuple[dict, list[str]]:
    said: list[str] = []
    record = compare(Comparison(out, arms, LIMITS, 4, 1), train, said.append)
    assert json.loads((out / "ab.json").read_text()) == json.loads(json.dumps(record))
    return record, said


def test_sound_arms_make_a_sound_record_with_stock_as_the_reference(tmp_path: Path) -> None:
    record, said = run(tmp_path, lambda arm, say: recorded(arm, tmp_path))
    assert is_sound(record), record["guards"]
    names = {guard["name"] for guard in record["guards"]}
    assert {"reward_shift/elastic", "length_shift/elastic", "weight_checksum/elastic", "left_behind/elastic"} <= names
    assert not names & {"reward_shift/stock", "left_behind/stock", "weight_version/stock"}
    assert any("arm 2 of 2" in line for line in said)


def test_an_arm_that_fails_does_not_keep_the_others_from_running(tmp_path: Path) -> None:
    def train(arm: Arm, say: Say) -> ArmOutcome:
        if arm.name == "stock":
            return ArmOutcome(tmp_path / "stock", 1, (), "verl ended with exit code 1: no memory")
        return recorded(arm, tmp_path)

    record, said = run(tmp_path, train)
    assert record["failed"] == {"stock": "verl ended with exit code 1: no memory"}
    assert list(record["arms"]) == ["elastic"] and not is_sound(record)
    assert "stock: FAILED: verl ended with exit code 1: no memory" in said[-1] or any("FAILED" in line for line in said)


def test_what_goes_wrong_around_an_arm_is_its_failure_too(tmp_path: Path) -> None:
    def train(arm: Arm, say: Say) -> ArmOutcome:
        if arm.name == "elastic":
            raise RlhflessError("the observer failed")
        return recorded(arm, tmp_path)

    record, _ = run(tmp_path, train)
    assert record["failed"] == {"elastic": "the observer failed"} and list(record["arms"]) == ["stock"]


def test_the_steps_of_an_arm_that_failed_late_are_shown_and_its_guards_fail(tmp_path: Path) -> None:
    def train(arm: Arm, say: Say) -> ArmOutcome:
        outcome = recorded(arm, tmp_path)
        metrics = outcome.folder / "metrics.jsonl"
        metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])
        return ArmOutcome(outcome.folder, 1, (), "lost a node")

    record, _ = run(tmp_path, train, ARMS[:1])
    assert len(record["arms"]["stock"]["steps"]) == 1
    assert [guard["ok"] for guard in record["guards"] if guard["name"] == "num_steps/stock"] == [False]


@pytest.mark.parametrize("pace", [None, {"base_ms": 120.0}])
def test_a_record_says_which_clock_its_seconds_are_of(tmp_path: Path, pace: dict[str, float] | None) -> None:
    comparison = Comparison(tmp_path, ARMS[:1], LIMITS, 4, 1, pace=pace)
    assert compare(comparison, lambda arm, say: recorded(arm, tmp_path), lambda line: None)["pace"] == pace


def test_an_asynchronous_arm_is_marked(tmp_path: Path) -> None:
    arm = Arm("elastic", (), is_asynchronous=True)
    record, _ = run(tmp_path, lambda a, say: recorded(a, tmp_path), (ARMS[0], arm))
    assert record["arms"]["elastic"]["is_asynchronous"] and not record["arms"]["stock"]["is_asynchronous"]


@pytest.mark.parametrize(
    ("log", "says"),
    [
        ("x\nrlhfless: error: too few GPUs\nTraceback\nValueError: y\n", "rlhfless: error: too few GPUs"),
        ("Traceback\nValueError: bad shape\nEngine stopped\n", "ValueError: bad shape"),
        ("starting\n\nkilled\n\n", "killed"),
        ("", "its log is empty"),
    ],
)
def test_the_last_words_of_a_log_say_why(tmp_path: Path, log: str, says: str) -> None:
    (tmp_path / "train.log").write_text(log)
    assert last_words(tmp_path / "train.log").startswith(says)


def test_no_log_means_that_nothing_was_started(tmp_path: Path) -> None:
    assert last_words(tmp_path / "train.log") == "nothing was started"


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_end_of_a_command_is_the_end_of_what_it_started(tmp_path: Path) -> None:
    deaf = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid(), flush=True); "
        "time.sleep(60)"
    )
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {deaf!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        end_group(process)
    deadline = time.monotonic() + 10
    while is_running(child):
        assert time.monotonic() < deadline, "the child of the command outlived it"
        time.sleep(0.01)
