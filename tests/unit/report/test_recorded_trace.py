"""A trace written from a recorded run is in the format, and replays to the same token counts."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.observed_run import RunFolder
from verl_rlhfless.errors import DataError
from verl_rlhfless.live.replay import ReplayPlan
from verl_rlhfless.report.recorded_trace import record_trace
from verl_rlhfless.trace import read_header, read_trace

PROMPTS, SAMPLES, CAP = 3, 2, 64


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(
        st.lists(st.lists(st.integers(1, CAP), min_size=SAMPLES, max_size=SAMPLES), min_size=PROMPTS, max_size=PROMPTS),
        min_size=1,
        max_size=4,
    ),
    offset=st.integers(0, 5),
    order=st.randoms(use_true_random=False),
)
def test_what_is_replayed_is_what_was_recorded(
    lengths: list[list[list[int]]], offset: int, order: random.Random
) -> None:
    """Batches are consecutive rows, as an unshuffled recipe has them; workers finish samples in any order."""
    with tempfile.TemporaryDirectory() as name:
        run, trace = RunFolder(Path(name)), Path(name) / "trace.jsonl"
        recorded = {}
        for step, groups in enumerate(lengths, start=1):
            first = offset + (step - 1) * PROMPTS
            rows = {first + i: group for i, group in enumerate(groups)}
            recorded |= {(step, row, s): n for row, group in rows.items() for s, n in enumerate(group)}
            run.lengths(step, rows, (CAP, SAMPLES, False)).step(step, step, step=1)
        head, *samples = (run.path / "samples-1-a.jsonl").read_text().splitlines(keepends=True)
        order.shuffle(samples)
        (run.path / "samples-1-a.jsonl").write_text("".join([head, *samples]))
        written = record_trace(run.path, trace)
        plan = ReplayPlan(trace, 1.0, CAP)
        assert {key: plan.forced_tokens(*key) for key in recorded} == recorded
        assert written.response_tokens == sum(recorded.values()) and written.num_samples == len(recorded)


def test_prompts_that_come_again_keep_their_name_and_count_epochs(tmp_path: Path) -> None:
    run = RunFolder(tmp_path).lengths(1, {0: [5, 6], 1: [7, 8]}).lengths(2, {2: [1, 1], 3: [2, 2]})
    run.lengths(3, {0: [9, 10], 1: [11, 12]})
    for step in (1, 2, 3):
        run.step(step, step, step=1)
    record_trace(tmp_path, tmp_path / "t.jsonl.gz")
    steps = list(read_trace(tmp_path / "t.jsonl.gz"))
    assert [[group.prompt_id for group in step.groups] for step in steps] == [["p0", "p1"], ["p2", "p3"], ["p0", "p1"]]
    assert [step.epoch for step in steps] == [1, 1, 2]
    header = read_header(tmp_path / "t.jsonl.gz")
    assert (header.kind, header.n, header.max_response_tokens, header.name) == ("recorded", 2, 64, tmp_path.name)


def test_the_same_prompt_twice_in_a_step_a_repeated_sample_and_several_turns(tmp_path: Path) -> None:
    run = RunFolder(tmp_path).lengths(1, {0: [5, 6]}).step(1, 1, step=1)
    same = {"step": 1, "prompt": "p0", "row": 4, "prompt_tokens": 9}
    run.append("samples-1-a.jsonl", {**same, "uid": "twin", "session": 0, "turns": [3, 4]})
    run.append("samples-2-b.jsonl", {"max_response_tokens": 64, "n": 2, "is_replayed": False})
    run.append("samples-2-b.jsonl", {**same, "row": 0, "uid": "u1-0", "session": 1, "turns": [33]})
    written = record_trace(tmp_path, tmp_path / "t.jsonl")
    (step,) = read_trace(tmp_path / "t.jsonl")
    assert [(group.prompt_id, group.response_tokens) for group in step.groups] == [("p0", (5, 33)), ("p0#2", (7,))]
    assert step.groups[1].turns == ((3, 4),) and step.groups[0].turns is None
    assert (written.num_groups, written.num_samples) == (2, 3)


def test_forced_lengths_are_not_called_recorded(tmp_path: Path) -> None:
    RunFolder(tmp_path).lengths(1, {0: [5, 6]}, (64, 2, True)).step(1, 1, step=1)
    record_trace(tmp_path, tmp_path / "t.jsonl")
    header = read_header(tmp_path / "t.jsonl")
    assert header.kind == "composed" and "forced" in header.note


def test_folders_without_one_run_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        record_trace(tmp_path / "none", tmp_path / "t.jsonl")
    with pytest.raises(DataError, match=r"holds no samples-\*\.jsonl"):
        record_trace(tmp_path, tmp_path / "t.jsonl")
    for name in ("stock", "elastic"):
        (tmp_path / name).mkdir()
        RunFolder(tmp_path / name).lengths(1, {0: [5, 6]})
    with pytest.raises(DataError, match=r"holds several runs.*elastic"):
        record_trace(tmp_path, tmp_path / "t.jsonl")
    (tmp_path / "stock" / "samples-1-a.jsonl").write_text('{"max_response_tokens": 64, "n": 2, "is_replayed": false}\n')
    with pytest.raises(DataError, match="no step was finished"):
        record_trace(tmp_path / "stock", tmp_path / "t.jsonl")


def test_a_step_that_did_not_end_is_left_out_since_its_long_samples_are_missing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path).lengths(1, {0: [5, 60]}).step(0, 0).step(1, 1, step=1).lengths(2, {1: [7], 2: [8]})
    written = record_trace(tmp_path, tmp_path / "t.jsonl")
    assert (written.num_steps, written.num_left_out, written.response_tokens) == (1, 1, 65)
    assert [step.step for step in read_trace(tmp_path / "t.jsonl")] == [1]
    run.append("metrics.jsonl", {"step": 2})
    with pytest.raises(DataError, match=r"metrics\.jsonl: a line has another form"):
        record_trace(tmp_path, tmp_path / "t.jsonl")


def test_a_torn_last_line_is_left_out_and_a_broken_one_named(tmp_path: Path) -> None:
    RunFolder(tmp_path).lengths(1, {0: [5, 6]}).step(1, 1, step=1)
    path = tmp_path / "samples-1-a.jsonl"
    path.write_text(path.read_text()[:-20])
    assert record_trace(tmp_path, tmp_path / "t.jsonl").num_samples == 1
    path.write_text('{"max_response_tokens": 64, "n": 2, "is_replayed": false}\n{"step": 1}\n')
    with pytest.raises(DataError, match=r"samples-1-a\.jsonl, line 2: is not a sample"):
        record_trace(tmp_path, tmp_path / "t.jsonl")


@pytest.mark.parametrize("content", [b'{"a": 1}\n', b"[3]\n", b"\xff\n"])
def test_a_file_that_is_no_record_of_samples_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "samples-1-a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"samples-1-a\.jsonl, line 1: is not .* Run the arm again"):
        record_trace(tmp_path, tmp_path / "t.jsonl")
