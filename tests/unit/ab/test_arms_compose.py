"""Every arm's overrides compose with verl's own recipe, and our start-up check lets the run begin."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from tests.unit.ab.test_arms import FACTS
from verl_rlhfless.ab.arms import build_arms
from verl_rlhfless.ab.cluster import _inherited
from verl_rlhfless.ab.run import AbOptions, common_overrides
from verl_rlhfless.live.startup import check_run

ARMS = (
    "stock",
    "colocate_async",
    "separate_async_switch",
    "elastic",
    "elastic-router-only",
    "elastic-no-fusion",
    "elastic-no-parking",
    "resident-no-dispatcher",
)
TWO_NODES = replace(FACTS, gpus_per_node=4, nnodes=2, tp=2)


def composed(arm: str, folder: Path, trainer_gpus: int | None = None) -> DictConfig:
    data = folder / "train.jsonl"
    data.write_text("{}\n")
    recipe = [
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=2",
        "actor_rollout_ref.rollout.n=8",
        "actor_rollout_ref.actor.ppo_mini_batch_size=32",
        "trainer.n_gpus_per_node=4",
        "trainer.nnodes=2",
        "data.train_batch_size=64",
        f"data.train_files={data}",
        f"data.val_files={data}",
        "trainer.default_hdfs_dir=hdfs://my/run",
        "trainer.validation_data_dir=/my/run",
    ]
    shared = common_overrides(TWO_NODES, AbOptions("", folder, arm, 5), folder / "a b,c")
    (built,) = build_arms([arm], TWO_NODES, trainer_gpus, [])
    with initialize_config_module("verl.trainer.config", version_base=None):
        overrides = [*recipe, *shared, *built.overrides, _inherited("X", "/a b,[c]")]
        return compose("ppo_trainer", overrides=overrides, return_hydra_config=True)


@pytest.mark.parametrize("arm", ARMS)
def test_the_run_may_begin_with_what_every_arm_shares(arm: str, tmp_path: Path) -> None:
    config = composed(arm, tmp_path)
    said = check_run(config, {"RAY_ADDRESS": "auto"})
    is_stock = arm.partition("-")[0] not in ("elastic", "resident")
    assert said.startswith("all plugins are off" if is_stock else "active: ")
    assert (config.trainer.total_training_steps, config.trainer.total_epochs) == (5, 5)
    assert config.trainer.rollout_data_dir == str(tmp_path / "a b,c" / "rollouts")
    assert config.trainer.default_hdfs_dir is None and config.trainer.validation_data_dir is None
    assert config.ray_kwargs.ray_init.runtime_env.env_vars.X == "/a b,[c]"


def test_the_elastic_trainer_may_have_every_gpu(tmp_path: Path) -> None:
    config = composed("elastic", tmp_path, trainer_gpus=8)
    assert check_run(config, {"RAY_ADDRESS": "auto"}).startswith("active: ")
    assert (config.trainer.n_gpus_per_node, config.trainer.nnodes) == (4, 2)
