"""With every plugin off, verl is stock verl: the same greedy tokens with our group and without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from verl_rlhfless.demo import recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

_ONE_GPU_GREEDY = ("trainer.n_gpus_per_node=1", "actor_rollout_ref.rollout.top_k=1")


def _generations(folder: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in (folder / "rollouts" / "1.jsonl").read_text().splitlines()]
    return sorted((row["input"], row["output"]) for row in rows)


def test_same_greedy_tokens_as_without_the_plugin(train: Any, external_module: Any) -> None:
    off = train(recipe.Arm("off", ("+rlhfless=off",)), steps=1, overrides=_ONE_GPU_GREEDY)
    bare = train(
        recipe.Arm("bare", ()),
        steps=1,
        overrides=_ONE_GPU_GREEDY,
        environment={"VERL_USE_EXTERNAL_PLUGINS": "none", "VLLM_PLUGINS": "", **external_module("cpu_only")},
    )
    assert (off.exit_code, bare.exit_code) == (0, 0)
    generations = _generations(off.folder)
    assert len(generations) == recipe.PROMPTS_PER_STEP * recipe.SAMPLES_PER_PROMPT
    assert generations == _generations(bare.folder)
