"""Recipes that people train with run on elastic replicas: complete, right, and doing what each is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.recipes import FAST, RECIPES, run_recipe
from verl_rlhfless.demo.assets import Assets

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NAMES = [name if name == FAST else pytest.param(name, marks=pytest.mark.long) for name in RECIPES]


@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains(name: str, assets: Assets, tmp_path: Path) -> None:
    outcome = run_recipe(name, assets, tmp_path, steps=2)
    assert outcome.exit_code == 0 and not outcome.failed
    assert len(outcome.step_s) == 2
