"""``rlhfless ab`` over a real recipe as a user has it: a script, two arms, lengths replayed and recorded again."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from verl_rlhfless.demo import recipe
from verl_rlhfless.demo.assets import Assets
from verl_rlhfless.trace import read_trace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 2
ARMS = ("stock", "elastic")
RLHFLESS = str(Path(sys.executable).with_name("rlhfless"))
_OURS = ("trainer.rollout_data_dir", "trainer.default_local_dir", "trainer.total_training_steps", "hydra.run.dir")


def _script(folder: Path, assets: Assets) -> Path:
    """The demo's recipe on two GPUs, written as users write them: exports first, one command, ``"$@"`` at its end."""
    overrides = [one for one in recipe.common_overrides(assets, folder, 100, seed=1) if not one.startswith(_OURS)]
    exports = [f"export {name}={value}" for name, value in recipe.CPU_ENVIRONMENT.items()]
    words = " \\\n    ".join(["trainer.n_gpus_per_node=$NUM_GPUS", *map(shlex.quote, overrides)])
    script = folder / "run.sh"
    script.write_text("\n".join([*exports, "NUM_GPUS=2", f'python3 -m verl.trainer.main_ppo {words} "$@"', ""]))
    return script


def _trace(path: Path) -> list[list[list[int]]]:
    """Lengths that no two samples of a group share."""
    lengths = [
        [[4 + (7 * step + 3 * row + 11 * s) % 60 for s in range(recipe.SAMPLES_PER_PROMPT)] for row in range(8)]
        for step in range(STEPS)
    ]
    header = {
        "format": "rlhfless-trace/1", "name": "t", "unit": "tokens", "n": recipe.SAMPLES_PER_PROMPT,
        "max_response_tokens": recipe.MAX_RESPONSE_TOKENS, "kind": "composed",
        "source": "s", "licence": "l", "note": "",
    }  # fmt: skip
    steps = [
        {"step": i + 1, "epoch": 1, "groups": [
            {"prompt_id": f"p{i}-{row}", "prompt_tokens": 9, "response_tokens": tokens}
            for row, tokens in enumerate(groups)
        ]}
        for i, groups in enumerate(lengths)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in [header, *steps]))
    return lengths


@pytest.fixture(scope="module")
def compared(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[list[list[int]]]]:
    folder = tmp_path_factory.mktemp("ab")
    lengths = _trace(folder / "trace.jsonl")
    _script(folder, assets)
    command = [RLHFLESS, "ab", "run.sh", "--out", "out", "--steps", str(STEPS), "--trace", "trace.jsonl"]
    command += ["--arms", ",".join(ARMS), "--plugin-override", "rlhfless.weights.bucket_mib=16"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, json.loads((folder / "out" / "ab.json").read_text()), lengths


def test_both_arms_trained_on_the_same_budget_and_passed_every_guard(compared: Any) -> None:
    _, record, _ = compared
    assert list(record["arms"]) == list(ARMS) and record["failed"] == {}
    assert all(guard["ok"] for guard in record["guards"])
    assert all(arm["total"]["max_gpus"] <= 2 and len(arm["steps"]) == STEPS for arm in record["arms"].values())


def test_the_report_and_its_picture_are_there(compared: Any) -> None:
    folder, _, _ = compared
    assert "## Guards" in (folder / "out" / "report.md").read_text()
    assert (folder / "out" / "timeline.png").stat().st_size > 10_000


@pytest.mark.parametrize("arm", ARMS)
def test_what_was_replayed_is_recorded_to_the_token(compared: Any, arm: str) -> None:
    folder, record, lengths = compared
    out = folder / f"{arm}.jsonl"
    command = [RLHFLESS, "trace", "record", str(folder / "out" / arm), "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    recorded = [[list(group.response_tokens) for group in step.groups] for step in read_trace(out)]
    assert recorded == lengths
    counted = [step["response_tokens"] for step in record["arms"][arm]["steps"]]
    assert counted == [sum(map(sum, groups)) for groups in lengths], "verl's own metrics count the same tokens"
