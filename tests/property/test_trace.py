"""Whatever bytes a file holds, the reader answers with a valid trace or with one clear error."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_rlhfless.errors import DataError
from verl_rlhfless.trace import TraceStep, read_header, read_trace

CAP = 50
HEADER = {
    "format": "rlhfless-trace/1",
    "name": "tiny",
    "unit": "tokens",
    "max_response_tokens": CAP,
    "n": 2,
    "kind": "composed",
    "source": "s",
    "licence": "l",
    "note": "n",
}

lengths = st.lists(st.integers(0, CAP), min_size=1, max_size=5)
groups = st.fixed_dictionaries({"prompt_tokens": st.integers(0, 99), "response_tokens": lengths})
steps = st.lists(st.lists(groups, min_size=1, max_size=4), min_size=1, max_size=4)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def as_records(drawn: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [
        {"step": i, "epoch": 1, "groups": [{"prompt_id": f"p{j}", **group} for j, group in enumerate(step)]}
        for i, step in enumerate(drawn)
    ]


def as_bytes(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces") / "trace.jsonl"


def valid_or_error(path: Path, content: bytes) -> list[TraceStep]:
    path.write_bytes(content)
    try:
        read = list(read_trace(path))
    except DataError as error:
        assert str(path) in str(error)
        return []
    cap = read_header(path).max_response_tokens
    assert all(0 <= tokens <= cap for step in read for group in step.groups for tokens in group.response_tokens)
    assert all(len({group.prompt_id for group in step.groups}) == len(step.groups) > 0 for step in read)
    return read


@given(drawn=steps, packed=st.booleans())
def test_every_length_of_a_valid_trace_comes_back(path: Path, drawn: list[list[dict[str, Any]]], packed: bool) -> None:
    content = as_bytes(HEADER, *as_records(drawn))

    read = valid_or_error(path, gzip.compress(content) if packed else content)

    assert [[list(group.response_tokens) for group in step.groups] for step in read] == [
        [group["response_tokens"] for group in step] for step in drawn
    ]


@given(content=st.binary(max_size=300))
def test_arbitrary_bytes(path: Path, content: bytes) -> None:
    valid_or_error(path, content)


@given(content=st.binary(max_size=300))
def test_arbitrary_bytes_after_a_good_header(path: Path, content: bytes) -> None:
    valid_or_error(path, as_bytes(HEADER) + content)


@given(drawn=steps, at=st.integers(0), byte=st.integers(0, 255))
def test_one_flipped_byte(path: Path, drawn: list[list[dict[str, Any]]], at: int, byte: int) -> None:
    content = bytearray(as_bytes(HEADER, *as_records(drawn)))
    content[at % len(content)] = byte

    valid_or_error(path, bytes(content))


@given(drawn=steps, at=st.integers(0), byte=st.integers(0, 255), cut=st.integers(0))
def test_damaged_gzip(path: Path, drawn: list[list[dict[str, Any]]], at: int, byte: int, cut: int) -> None:
    content = bytearray(gzip.compress(as_bytes(HEADER, *as_records(drawn))))
    content[at % len(content)] = byte

    valid_or_error(path, bytes(content[: 2 + cut % len(content)]))


@given(
    key=st.sampled_from(["prompt_tokens", "response_tokens", "prompt_id", "turns", "score_s", "prefix_id"]),
    value=json_values,
)
def test_arbitrary_json_in_a_group(path: Path, key: str, value: object) -> None:
    group = {"prompt_id": "p", "prompt_tokens": 1, "response_tokens": [1], key: value}

    valid_or_error(path, as_bytes(HEADER, {"step": 1, "epoch": 1, "groups": [group]}))


@given(key=st.sampled_from(sorted(HEADER)), value=json_values)
def test_arbitrary_json_in_the_header(path: Path, key: str, value: object) -> None:
    valid_or_error(path, as_bytes(HEADER | {key: value}, *as_records([[{"prompt_tokens": 1, "response_tokens": [1]}]])))
