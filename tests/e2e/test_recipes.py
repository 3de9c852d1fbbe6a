"""Recipes that people train with run on elastic replicas: complete, right, and doing what each is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.recipes import FAST, run_recipe
from verl_rlhfless.demo.assets import Assets

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]


@pytest.mark.parametrize("name", FAST)
def test_recipe_trains_on_elastic_replicas(name: str, assets: Assets, tmp_path: Path) -> None:
    outcome = run_recipe(name, assets, tmp_path, steps=2)
    assert outcome.exit_code == 0 and not outcome.failed
    assert len(outcome.step_s) == 2
