"""The demo takes GSM8K-style data, and says which line is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from verl_rlhfless.demo.assets import arithmetic_problems, read_problems
from verl_rlhfless.demo.reward import compute_score
from verl_rlhfless.errors import DataError


def test_reads_question_and_final_number(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"question": "How much?", "answer": "Much.\n#### 1,234"}) + "\n\n")
    (problem,) = read_problems(path)
    assert (problem.question, problem.answer) == ("How much?", "1234")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file"),
        ("", "empty"),
        ('{"question": "q", "answer": "#### 1"}\n{not json}\n', "line 2: not JSON"),
        ('{"question": "q"}\n', "line 1: needs the strings"),
        ("[1]\n", "line 1: needs the strings"),
        ('{"question": "q", "answer": "no number"}\n', "line 1: `answer` must end"),
        ("\xff\xfe\n", "line 1: not JSON"),
    ],
)
def test_bad_data_is_named_by_line(tmp_path: Path, content: str | None, says: str) -> None:
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=says):
        read_problems(path)


def test_arithmetic_is_right_and_seeded() -> None:
    problems = arithmetic_problems(50, seed=3)
    assert problems == arithmetic_problems(50, seed=3) != arithmetic_problems(50, seed=4)
    assert all(eval(p.question.removeprefix("What is ").rstrip("?")) == int(p.answer) for p in problems)


def test_right_answer_scores_more_than_wrong_one() -> None:
    right, wrong = compute_score("d", "so it is 42", "42"), compute_score("d", "so it is 41", "42")
    assert right - wrong == pytest.approx(1.0)
    assert compute_score("d", "", "42") == 0.0
