"""``rlhfless`` answers every wrong call in one line that says what to do, with exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from verl_rlhfless.cli import app


def complaint(*args: str) -> str:
    """Return the one line that a wrong call prints."""
    result = CliRunner().invoke(app, list(args))
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and line.startswith("rlhfless: error: ")
    return line


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("--nosuch", "--nosuch"),
        ("simulte", "Did you mean 'simulate'?"),
        ("trace reccord", "Did you mean 'record'?"),
        ("simulate t.jsonl --cost-wieght 1", "--cost-weight"),
        ("simulate t.jsonl --seed 1.5", "'--seed'"),
        ("trace generate", "Missing argument 'path'"),
        ("ab run.sh --steps 3", "Missing option '--out'"),
    ],
)
def test_a_call_of_the_wrong_form_is_one_line_that_names_the_help(call: str, says: str) -> None:
    line = complaint(*call.split())
    assert says in line and line.endswith(" --help`.") and "?." not in line


@pytest.mark.parametrize(
    ("call", "meant"),
    [
        ("simulate t.jsonl --arms our", "ours"),
        ("simulate t.jsonl --cluster h100_16", "h100-16"),
        ("simulate t.jsonl --model Qwen2.5-7B", "qwen2.5-7b"),
        ("simulate t.jsonl --recipe GRPO", "grpo"),
        ("ab train.sh --out o --steps 3 --arms stock,elastc", "elastic"),
        ("demo --out o --arms Elastic", "elastic"),
        ("demo --out o --columns parkd", "parked"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_one_that_was_meant(call: str, meant: str) -> None:
    assert complaint(*call.split()).endswith(f"Did you mean {meant}?")


def test_a_missing_file_is_named_once_and_without_an_error_number() -> None:
    line = complaint("simulate", "gone.jsonl")
    assert line.count("gone.jsonl") == 1 and "No such file or directory" in line and "Errno" not in line


def test_a_broken_line_of_a_trace_says_where_the_format_stands(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("{}\n")
    assert complaint("trace", "stats", str(tmp_path / "t.jsonl")).endswith(
        "line 1: the header: lacks the key 'format'. FORMATS.md describes the format rlhfless-trace/1."
    )


def test_a_trace_that_no_memory_holds_is_refused_before_it_is_drawn(tmp_path: Path) -> None:
    line = complaint("trace", "generate", str(tmp_path / "t.jsonl"), "--groups", "1000000000000")
    assert "must be at most 10000000 responses" in line and line.endswith("Lower one of them.")


def test_without_a_command_the_help_is_shown() -> None:
    assert "simulate" in CliRunner().invoke(app, []).output
    assert "generate" in CliRunner().invoke(app, ["trace"]).output
