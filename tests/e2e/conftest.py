"""End to end: real verl, vLLM and Ray on CPU, through the demo's own machinery. One heavy run at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from verl_rlhfless.demo import recipe
from verl_rlhfless.demo.assets import Assets, arithmetic_problems, build_assets
from verl_rlhfless.demo.run import ArmOutcome, DemoOptions, run_arm

RunArm = Callable[..., ArmOutcome]


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    """A tiny model, tokenizer and data set."""
    return build_assets(tmp_path_factory.mktemp("assets"), arithmetic_problems(64, seed=1), seed=1)


@pytest.fixture(scope="session")
def train(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunArm]:
    """Train one arm with extra overrides and environment, and return how it ended."""

    def run(
        arm: recipe.Arm, steps: int, overrides: tuple[str, ...] = (), environment: Mapping[str, str] = {}
    ) -> ArmOutcome:
        out: Path = tmp_path_factory.mktemp(arm.name)
        changed = recipe.Arm(arm.name, (*arm.overrides, *overrides))
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            return run_arm(changed, assets, DemoOptions(out=out, steps=steps, arms=("elastic",)), say=print)

    yield run


@pytest.fixture(scope="session")
def external_module() -> Callable[[str], dict[str, str]]:
    """Return the environment that loads a module of this folder in every process of a run."""

    def environment(name: str) -> dict[str, str]:
        here = Path(__file__).parent
        return {"VERL_USE_EXTERNAL_MODULES": name, "PYTHONPATH": f"{here}:{here.parents[1]}"}

    return environment
