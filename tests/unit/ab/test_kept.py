"""A comparison that is taken up again keeps finished arms, and only those that would be run the same way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from verl_rlhfless.ab.kept import Kept
from verl_rlhfless.ab.training import ArmOutcome
from verl_rlhfless.errors import ConfigError

RECIPE = {"text": "run.sh", "digest": "d1"}


def kept(out: Path, digest: str = "d1", verl: str = "0.9.1") -> Kept:
    return Kept(out, {**RECIPE, "digest": digest}, {"verl": verl})


def ended(out: Path, exit_code: int | None = 0) -> ArmOutcome:
    return ArmOutcome(out / "stock", exit_code, ("psm_1",), None if exit_code == 0 else "it failed")


def test_a_finished_arm_is_kept_with_what_it_left_behind(tmp_path: Path) -> None:
    kept(tmp_path).claim()
    kept(tmp_path).keep("stock", ["a"], ended(tmp_path))
    assert kept(tmp_path).finished("stock", ["a"]) == ended(tmp_path)


def test_it_is_run_again_when_it_failed_or_would_be_run_in_another_way(tmp_path: Path) -> None:
    kept(tmp_path).keep("stock", ["a"], ended(tmp_path))
    assert kept(tmp_path).finished("stock", ["a", "b"]) is None
    assert kept(tmp_path, verl="0.9.2").finished("stock", ["a"]) is None
    assert kept(tmp_path).finished("elastic", ["a"]) is None
    for outcome in (ended(tmp_path, 1), ended(tmp_path, None), replace(ended(tmp_path), why="after 1 of 2 steps")):
        kept(tmp_path).keep("stock", ["a"], outcome)
        assert kept(tmp_path).finished("stock", ["a"]) is None


def test_a_record_that_a_killed_run_tore_is_none(tmp_path: Path) -> None:
    kept(tmp_path).keep("stock", ["a"], ended(tmp_path))
    path = tmp_path / "stock" / "outcome.json"
    path.write_text(path.read_text()[:20])
    assert kept(tmp_path).finished("stock", ["a"]) is None


def test_what_is_run_again_does_not_resume_from_old_checkpoints_or_count_old_samples(tmp_path: Path) -> None:
    kept(tmp_path).keep("stock", ["a"], ended(tmp_path))
    for name in ("checkpoints", "rollouts"):
        (tmp_path / "stock" / name).mkdir()
        (tmp_path / "stock" / name / "1").write_text("")
    (tmp_path / "stock" / "notes.txt").write_text("mine")
    kept(tmp_path).forget("stock")
    assert [path.name for path in (tmp_path / "stock").iterdir()] == ["notes.txt"]


def test_another_recipe_is_refused_and_the_same_one_is_not(tmp_path: Path) -> None:
    kept(tmp_path).check()
    kept(tmp_path).claim()
    kept(tmp_path).check()
    with pytest.raises(ConfigError, match=r"--out=.*comparison of another recipe, 'run.sh'.*Name another folder"):
        kept(tmp_path, digest="d2").check()


def test_arms_of_a_recipe_that_is_not_known_are_not_mixed_in(tmp_path: Path) -> None:
    kept(tmp_path).keep("stock", ["a"], ended(tmp_path))
    with pytest.raises(ConfigError, match="recipe that is not known"):
        kept(tmp_path).check()
