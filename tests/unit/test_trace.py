"""A good trace is read exactly; every broken rule is named with path and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from verl_rlhfless.errors import DataError
from verl_rlhfless.trace import TraceGroup, TraceHeader, TraceStep, read_header, read_trace

HEADER: dict[str, Any] = {
    "format": "rlhfless-trace/1",
    "name": "tiny",
    "unit": "tokens",
    "max_response_tokens": 100,
    "n": 2,
    "kind": "recorded",
    "source": "a run",
    "licence": "Apache-2.0",
    "note": "",
}
GROUP: dict[str, Any] = {"prompt_id": "p0", "prompt_tokens": 9, "response_tokens": [3, 100]}
STEP: dict[str, Any] = {"step": 1, "epoch": 1, "groups": [GROUP]}


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def error_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(read_trace(path))
    return str(caught.value)


def test_reads_header_and_steps_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", HEADER, STEP, STEP | {"step": 2, "epoch": 2})

    assert read_header(path) == TraceHeader("tiny", 100, 2, "recorded", "a run", "Apache-2.0", "")
    group = TraceGroup("p0", 9, (3, 100))
    assert list(read_trace(path)) == [TraceStep(1, 1, (group,)), TraceStep(2, 2, (group,))]


def test_optional_fields_of_a_group_are_read(tmp_path: Path) -> None:
    options = {"prefix_id": "sys", "prefix_tokens": 4, "turns": [[1, 2], [100]], "score_s": [0.5, 1], "min_start_s": 2}
    path = write(tmp_path / "t.jsonl", HEADER, STEP | {"groups": [GROUP | options]})

    (step,) = read_trace(path)

    assert step.groups == (TraceGroup("p0", 9, (3, 100), "sys", 4, ((1, 2), (100,)), (0.5, 1.0), 2.0),)


def test_one_score_time_holds_for_every_sample(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", HEADER, STEP | {"groups": [GROUP | {"score_s": 0.25}]})

    (step,) = read_trace(path)

    assert step.groups[0].score_s == (0.25, 0.25)


@pytest.mark.parametrize("name", ["t.jsonl.gz", "renamed.jsonl"])
def test_gzip_is_recognised_by_content(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(write(tmp_path / "plain", HEADER, STEP).read_bytes()))

    assert [step.step for step in read_trace(path)] == [1]


def test_streams_one_step_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(HEADER) + "\n" + json.dumps(STEP) + "\n" + "not read yet")

    steps = read_trace(path)

    assert next(steps).step == 1  # a reader that loads the whole file fails here
    with pytest.raises(DataError, match="line 3"):
        next(steps)


def test_missing_file_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl.*No such file"):
        read_trace(tmp_path / "absent.jsonl")


def test_directory_and_empty_file_and_header_alone_are_refused(tmp_path: Path) -> None:
    assert "cannot be read" in error_of(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    assert "empty" in error_of(tmp_path / "empty.jsonl")
    assert "no step" in error_of(write(tmp_path / "header.jsonl", HEADER))


def test_truncated_gzip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(
        gzip.compress(write(tmp_path / "plain", HEADER, *[STEP | {"step": i} for i in range(99)]).read_bytes())[:-9]
    )

    assert "cannot be read" in error_of(path)


@pytest.mark.parametrize(
    ("raw", "rule"),
    [
        (b"\xff\xfe\n", "not UTF-8"),
        (b"{\n", "not one JSON object"),
        (b"[" * 100_000 + b"\n", "not one JSON object"),
        (b'{"step": ' + b"9" * 5000 + b"}\n", "not one JSON object"),
        (b"\n", "not one JSON object"),
        (b"[]\n", "must be a JSON object"),
    ],
)
def test_lines_that_are_no_objects(tmp_path: Path, raw: bytes, rule: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(json.dumps(HEADER).encode() + b"\n" + raw)

    message = error_of(path)

    assert f"{path}, line 2" in message
    assert rule in message


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"format": "rlhfless-trace/2"}, "must be 'rlhfless-trace/1'"),
        ({"unit": "words"}, "unit='words': must be 'tokens'"),
        ({"kind": "guessed"}, "kind='guessed': must be one of recorded, composed"),
        ({"n": 0}, "n=0: must be between 1 and 4096"),
        ({"n": True}, "n=True: must be an integer >= 0"),
        ({"max_response_tokens": 1.5}, "max_response_tokens=1.5: must be an integer >= 0"),
        ({"name": 7}, "name=7: must be a string"),
        ({"licence": None}, "licence=None: must be a string"),
        ({"license": "MIT"}, "unknown key 'license'; did you mean 'licence'?"),
    ],
)
def test_header_rules(tmp_path: Path, change: dict[str, object], rule: str) -> None:
    message = error_of(write(tmp_path / "t.jsonl", HEADER | change, STEP))

    assert f"{tmp_path / 't.jsonl'}, line 1" in message
    assert rule in message


@pytest.mark.parametrize("key", [*HEADER])
def test_every_header_key_is_required(tmp_path: Path, key: str) -> None:
    message = error_of(write(tmp_path / "t.jsonl", {k: v for k, v in HEADER.items() if k != key}, STEP))

    assert f"lacks the key {key!r}" in message


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"step": -1}, "step=-1: must be an integer >= 0"),
        ({"epoch": "1"}, "epoch='1': must be an integer >= 0"),
        ({"groups": []}, "at least one group"),
        ({"groups": {}}, "at least one group"),
        ({"groups": [7]}, "groups[0]: must be a JSON object"),
        ({"groups": [GROUP, GROUP]}, "prompt_id='p0': must be unique in a step"),
        ({"group": [GROUP]}, "unknown key 'group'; did you mean 'groups'?"),
    ],
)
def test_step_rules(tmp_path: Path, change: dict[str, object], rule: str) -> None:
    message = error_of(write(tmp_path / "t.jsonl", HEADER, STEP, STEP | {"step": 2} | change))

    assert "line 3" in message
    assert rule in message


@pytest.mark.parametrize("second", [1, 0])
def test_steps_must_increase(tmp_path: Path, second: int) -> None:
    assert "steps must increase" in error_of(write(tmp_path / "t.jsonl", HEADER, STEP, STEP | {"step": second}))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"prompt_id": 3}, "prompt_id=3: must be a string"),
        ({"prompt_id": "\ud800"}, "surrogate"),
        ({"prompt_tokens": -3}, "prompt_tokens=-3: must be an integer >= 0"),
        ({"response_tokens": []}, "has 0 entries, must have 1 to 4096"),
        ({"response_tokens": [1] * 4097}, "has 4097 entries, must have 1 to 4096"),
        ({"response_tokens": [1, 101]}, "101 exceeds max_response_tokens=100"),
        ({"response_tokens": [1, -1]}, "response_tokens[1]=-1: must be an integer >= 0"),
        ({"response_tokens": [1, 2.0]}, "response_tokens[1]=2.0: must be an integer >= 0"),
        ({"response_tokens": [True, 2]}, "response_tokens[0]=True: must be an integer >= 0"),
        ({"response_tokens": "12"}, "must be a list of integers"),
        ({"prefix_tokens": 10}, "prefix_tokens=10: must be <= prompt_tokens=9"),
        ({"prefix_id": None}, "prefix_id=None: must be a string"),
        ({"turns": [[1]]}, "one entry for each of the 2 responses"),
        ({"turns": [[1], [-2]]}, "turns[1][0]=-2: must be an integer >= 0"),
        ({"turns": [[1, 2], [99]]}, "turns[1]: add up to 99, must be response_tokens[1]=100"),
        ({"score_s": [1.0]}, "one entry for each of the 2 responses"),
        ({"score_s": -1}, "must be a number of seconds >= 0"),
        ({"min_start_s": float("nan")}, "must be a number of seconds >= 0"),
        ({"min_start_s": float("inf")}, "must be a number of seconds >= 0"),
        ({"prefix_token": 1}, "did you mean 'prefix_tokens'?"),
    ],
)
def test_group_rules(tmp_path: Path, change: dict[str, object], rule: str) -> None:
    message = error_of(write(tmp_path / "t.jsonl", HEADER, STEP | {"groups": [GROUP | change]}))

    assert "line 2: groups[0]" in message
    assert rule in message


@pytest.mark.parametrize("key", [*GROUP])
def test_every_group_key_is_required(tmp_path: Path, key: str) -> None:
    group = {k: v for k, v in GROUP.items() if k != key}

    assert f"groups[0]: lacks the key {key!r}" in error_of(
        write(tmp_path / "t.jsonl", HEADER, STEP | {"groups": [group]})
    )


def test_a_huge_value_does_not_flood_the_message(tmp_path: Path) -> None:
    assert len(error_of(write(tmp_path / "t.jsonl", HEADER | {"kind": "x" * 10_000}))) < 500
