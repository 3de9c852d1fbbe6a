"""verl's own examples with ours appended: they start, or one line says why not and what to change."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from verl_rlhfless.errors import RlhflessError
from verl_rlhfless.live.startup import check_run

ELASTIC, RESIDENT = "+rlhfless=default", "+rlhfless=resident"


def read_examples() -> dict[str, list[str]]:
    """Return the overrides of each example by its name."""
    text = (Path(__file__).parent / "verl_examples.txt").read_text()
    blocks = [block.partition("]\n") for block in text.split("\n[")[1:]]
    return {name: overrides.strip().splitlines() for name, _, overrides in blocks}


EXAMPLES = read_examples()

CHANGED = {
    # example: what the line says when it is refused, and what then makes it start
    "grpo_trainer/run_qwen3_5_2b_openr1_fsdp": ("enable_prefix_caching=False", ["rlhfless/prefix_dedup=off"]),
    "rollout_correction/run_qwen2_5_7b_fsdp_multi_rs": ("bypass_mode=True", ["rlhfless/fusion=off"]),
    "tuning/lora/run_qwen3_8b_fsdp": ("model.lora_rank=64", ["actor_rollout_ref.model.lora.merge=True"]),
    "tuning/lora/run_qwen3_8b_from_adapter_fsdp": (
        "model.lora_adapter_path='/data/adapter'",
        ["actor_rollout_ref.model.lora_rank=64", "actor_rollout_ref.model.lora.merge=True"],
    ),
    "tuning/scaling/run_qwen2_5_72b_fsdp": (
        "rollout.tensor_model_parallel_size=16",
        ["actor_rollout_ref.rollout.tensor_model_parallel_size=8"],
    ),
    "grpo_trainer/run_mistral_nemo_12b_skyworkrm_fsdp": ("enable_resource_pool=False", [RESIDENT]),
    "on_policy_distillation_trainer/run_qwen3_0.6b_opd_veomni": ("actor.strategy='veomni'", [RESIDENT]),
}
REFUSED = {
    "grpo_trainer/run_qwen3_30b_veomni": "rollout.data_parallel_size=8",
    "profile/run_qwen2_5_vl_7b_torch_memory": "rollout.name='sglang'",
    "remax_trainer/run_qwen3_8b_fsdp": "algorithm.adv_estimator='remax'",
    "gdpo_trainer/run_qwen3_8b_fsdp": "algorithm.adv_estimator='gdpo'",
    "otb_trainer/run_qwen3_8b_fsdp": "algorithm.adv_estimator='optimal_token_baseline'",
}
RUN = sorted(EXAMPLES.keys() - CHANGED.keys() - REFUSED.keys())


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Return the overrides that name data files, which the scripts expect in the user's home."""
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1")
    return [f"data.train_files={path}", f"data.val_files={path}"]


def composed(name: str, data: list[str], *ours: str) -> DictConfig:
    """Return the configuration of an example; the group that ``ours`` names last, and the mode, come at the end."""
    group = [item for item in ours if item in (ELASTIC, RESIDENT)][-1]
    rest = [item for item in ours if item not in (ELASTIC, RESIDENT)]
    overrides = [*EXAMPLES[name], *data, group, *rest, "trainer.v1.trainer_mode=rlhfless_sync"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=overrides, return_hydra_config=True)


def test_the_page_on_compatibility_counts_them() -> None:
    page = (Path(__file__).parents[2] / "COMPATIBILITY.md").read_text()
    counts = (
        f"{len(RUN)} start as they are, {len(CHANGED)} once changed as their refusal says, {len(REFUSED)} are refused"
    )
    assert f"{len(EXAMPLES)} of verl's examples are composed with ours in the tests: {counts}." in page


@pytest.mark.parametrize("name", RUN)
def test_an_example_of_verl_starts_with_our_line_appended(name: str, data: list[str]) -> None:
    assert check_run(composed(name, data, ELASTIC), {}).startswith("active: pool=elastic")


@pytest.mark.parametrize("name", CHANGED)
def test_an_example_starts_once_it_is_changed_as_its_refusal_says(name: str, data: list[str]) -> None:
    text, change = CHANGED[name]
    with pytest.raises(RlhflessError) as caught:
        check_run(composed(name, data, ELASTIC), {})
    assert text in str(caught.value) and "\n" not in str(caught.value)
    assert check_run(composed(name, data, ELASTIC, *change), {}).startswith("active:")


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_part_of_ours_can_run_is_refused_in_one_line(name: str, data: list[str]) -> None:
    for group in (ELASTIC, RESIDENT):
        with pytest.raises(RlhflessError) as caught:
            check_run(composed(name, data, group), {})
        assert REFUSED[name] in str(caught.value) and "\n" not in str(caught.value)
