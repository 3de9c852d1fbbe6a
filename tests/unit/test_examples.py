"""Every example composes with verl's own configuration, in each arm, and our start-up check accepts it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from benchmarks.examples_savings import EXAMPLES
from benchmarks.examples_savings import Example as Simulated
from verl_rlhfless.config import parse_config
from verl_rlhfless.errors import RlhflessError
from verl_rlhfless.live.host_memory import memory_of_run
from verl_rlhfless.live.startup import check_run
from verl_rlhfless.live.suspendable import why_lease_is_kept

EXAMPLES_FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES_FOLDER.glob("*_*.sh"))
NAMES = [path.stem for path in SCRIPTS]
MEGATRON = EXAMPLES_FOLDER / "megatron_gsm8k_qwen2_5_7b.sh"


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an interpreter's stand-in that writes its arguments down, in a folder that has all data files."""
    folder = tmp_path_factory.mktemp("examples")
    for name in ("gsm8k/train", "gsm8k/test", "dapo-math-17k", "aime-2024"):
        path = folder / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"PAR1")
    python = folder / "python"
    python.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python


Example = Callable[..., DictConfig]


@pytest.fixture(scope="module")
def example(command: Path) -> Example:
    """Return ``example(script, arm, *overrides)``: what Hydra composes from the command that the script starts."""

    @cache  # a composition takes most of a second
    def composed(script: Path, arm: str, *overrides: str) -> DictConfig:
        environ = os.environ | {"PYTHON": str(command), "DATA": str(command.parent)}
        run = [str(script), arm, *overrides]
        done = subprocess.run(run, env=environ, capture_output=True, text=True, timeout=60, check=True)
        dash_m, module, *given = json.loads(done.stdout)
        assert (dash_m, module) == ("-m", "verl.trainer.main_ppo")
        with initialize_config_module("verl.trainer.config", version_base=None):
            return compose("ppo_trainer", overrides=given, return_hydra_config=True)

    return composed


def test_every_recipe_that_is_promised_is_there() -> None:
    kinds = {name.split("_")[0] for name in NAMES}
    assert kinds == {"grpo", "ppo", "dapo", "multiturn", "megatron"}
    assert {"grpo_gsm8k_qwen2_5_3b", "grpo_gsm8k_qwen2_5_7b"} <= set(NAMES)


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_the_stock_command_has_nothing_of_ours(example: Example, script: Path) -> None:
    config = example(script, "stock")
    assert "rlhfless" not in config
    assert config.trainer.v1.trainer_mode == "sync"
    assert config.trainer.experiment_name == script.stem


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_the_elastic_command_passes_the_start_up_check_within_the_gpus_of_stock(example: Example, script: Path) -> None:
    stock, elastic = (example(script, arm) for arm in ("stock", "elastic"))
    assert check_run(elastic, {}).startswith("active: pool=elastic weights=store")
    assert elastic.rlhfless.pool.max_gpus == stock.trainer.n_gpus_per_node * stock.trainer.nnodes


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_the_host_memory_of_the_elastic_command_is_known(
    example: Example, script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verl.utils.device.get_device_name", lambda: "cuda")
    elastic = example(script, "elastic")
    settings, params = parse_config(OmegaConf.to_container(elastic.rlhfless)), 7 * 10**9
    can_suspend = not why_lease_is_kept(elastic, settings.pool.suspend_trainer)
    run = memory_of_run(elastic, settings, params, is_tied=False, can_suspend=can_suspend, num_gpus=8)
    assert run.store.model_bytes == params * 2  # in the rollout's element type
    assert run.trainer.roles[0].model_bytes == params * (2 if script == MEGATRON else 4)
    assert run.trainer.is_on_host is not (script == MEGATRON)


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_the_resident_command_passes_the_start_up_check_on_the_gpus_of_stock(example: Example, script: Path) -> None:
    stock, resident = (example(script, arm) for arm in ("stock", "resident"))
    assert check_run(resident, {}).startswith("active: pool=resident predictor=history")
    for key in ("n_gpus_per_node", "nnodes"):
        assert resident.trainer[key] == stock.trainer[key]


@pytest.mark.parametrize("arm", ["elastic", "resident"])
@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_no_arm_changes_anything_that_is_learnt(example: Example, script: Path, arm: str) -> None:
    stock, ours = (OmegaConf.to_container(example(script, name)) for name in ("stock", arm))
    assert isinstance(stock, dict) and isinstance(ours, dict)
    for section in ("algorithm", "data", "critic", "reward"):
        assert ours[section] == stock[section]
    for values in (stock, ours):
        del values["actor_rollout_ref"]["rollout"]["gpu_memory_utilization"]
    assert ours["actor_rollout_ref"] == stock["actor_rollout_ref"]


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_every_override_of_ours_is_explained(script: Path) -> None:
    """A comment stands before the first override, and before each one that is not of the same matter."""
    text = script.read_text().partition("elastic=(\n")[2].partition("\n)")[0]
    assert sum(line.strip().startswith("#") for line in text.splitlines()) >= 3


def test_the_last_override_on_the_command_line_wins(example: Example) -> None:
    config = example(SCRIPTS[0], "elastic", "rlhfless.planner.schedule=[1,2]")
    assert config.rlhfless.planner.schedule == [1, 2]


def test_an_example_without_an_arm_says_how_it_is_used() -> None:
    done = subprocess.run([SCRIPTS[0]], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("simulated", EXAMPLES, ids=lambda one: one.name)
def test_the_expected_saving_is_that_of_the_recipe(example: Example, simulated: Simulated) -> None:
    config, elastic = (example(EXAMPLES_FOLDER / f"{simulated.name}.sh", arm) for arm in ("stock", "elastic"))
    trains, leases = elastic.trainer.n_gpus_per_node * elastic.trainer.nnodes, elastic.rlhfless.pool.max_gpus
    assert simulated.kept_gpus == (0 if trains == leases else trains)
    rollout, lengths = config.actor_rollout_ref.rollout, simulated.lengths
    assert (lengths.groups, lengths.n) == (config.data.train_batch_size, rollout.n)
    assert lengths.max_response_tokens == config.data.max_response_length
    assert (simulated.tp, simulated.nodes) == (rollout.tensor_model_parallel_size, config.trainer.nnodes)
    assert config.trainer.n_gpus_per_node == 8
    assert (simulated.recipe == "ppo") == (config.algorithm.adv_estimator == "gae")
    assert simulated.model.removeprefix("qwen2.5-") in config.actor_rollout_ref.model.path.lower()


REFUSED = [
    (["actor_rollout_ref.model.lora.rank=8"], "actor_rollout_ref.model.lora.rank=8"),
    (["actor_rollout_ref.rollout.name=sglang"], "actor_rollout_ref.rollout.name='sglang'"),
    (["actor_rollout_ref.rollout.pipeline_model_parallel_size=2"], "pipeline_model_parallel_size=2"),
    (["trainer.use_v1=False"], "trainer.use_v1=False"),
    (["rlhfless.prefix_dedup.training=prefix_grouper"], "prefix_dedup.training='prefix_grouper'"),
    (["trainer.n_gpus_per_node=8"], "only FSDP's state is known to leave its device and come back"),
]


@pytest.mark.parametrize(("overrides", "text"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_elastic_rollout_cannot_do_with_megatron_is_refused_in_one_line(
    example: Example, overrides: list[str], text: str
) -> None:
    with pytest.raises(RlhflessError) as caught:
        check_run(example(MEGATRON, "elastic", *overrides), {})
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_tool_calculates_and_answers_nonsense_with_an_error() -> None:
    from verl.tools.function_tool import load_function_tools_from_path

    (tool,) = load_function_tools_from_path(str(EXAMPLES_FOLDER / "gsm8k_tool.py"))
    assert tool.name == "calculate"
    assert "expression" in tool.tool_schema.function.parameters.properties
    assert tool.fn("(12 + 3) * -4 / 8") == "-7.5"
    for wrong in ("1 / 0", "import os", "__import__('os')", "2 +", "'a' * 9", "2 ** 99"):
        assert tool.fn(wrong).startswith("error: ")
