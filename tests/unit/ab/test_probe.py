"""What Hydra printed of a recipe becomes facts, whatever the recipe's script prints around it."""

from __future__ import annotations

import pytest

from verl_rlhfless.ab.probe import _error_line, read_facts
from verl_rlhfless.errors import ConfigError

VALUES = {
    "gpus_per_node": "8", "nnodes": "2", "tp": "2", "prompts": "64", "samples": "8", "mini_batch": "32", "epochs": "3",
    "seed": "null", "mode": "sync", "use_v1": "true", "ours": "null", "rollout_dtype": "bfloat16", "switch": "false",
    "has_reward_pool": "false", "has_reward_model": "false", "reward_nnodes": "0", "reward_gpus_per_node": "8",
    "ray_num_cpus": "null", "ray_num_gpus": "null", "precision": "null", "strategy": "fsdp2",
}  # fmt: skip


def printed(**changes: str) -> str:
    lines = [f"{key}: {value}" for key, value in {**VALUES, **changes}.items()]
    return "\n".join(
        ["Mode: training", "# @package rlhfless_probe", *lines, "environment:", "  A: 'x'", "  B: null", "Done!", ""]
    )


def test_the_facts_are_those_that_hydra_resolved() -> None:
    facts = read_facts("run.sh", printed())
    assert (facts.trainer_gpus, facts.num_gpus, facts.tp, facts.seed) == (16, 16, 2, None)
    assert (facts.prompts, facts.samples, facts.mini_batch, facts.epochs) == (64, 8, 32, 3)
    assert (facts.is_fp32, facts.has_switch, facts.is_on_cpu, facts.ray_limits) == (False, True, False, ())
    assert facts.environment == {"A": "x"} and facts.can_leave
    assert not read_facts("run.sh", printed(strategy="megatron")).can_leave


def test_a_pool_of_its_own_for_the_reward_counts_and_what_a_running_cluster_refuses_is_known() -> None:
    facts = read_facts(
        "r", printed(has_reward_model="true", has_reward_pool="true", reward_nnodes="1", ray_num_cpus="16")
    )
    assert (facts.trainer_gpus, facts.num_gpus, facts.ray_limits) == (16, 24, ("num_cpus",))
    assert not read_facts("r", printed(switch="null")).has_switch
    assert read_facts("r", printed(rollout_dtype="float32", precision="fp32")).is_fp32


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("training...\n", "overrides do not reach verl"),
        (printed(use_v1="false"), "v0 trainer is not supported"),
        (printed(mode="separate_async"), "trainer_mode='separate_async'.*chooses a trainer mode"),
        (printed(ours="elastic"), "chooses parts of this plugin"),
        (printed(prompts="null"), r"data\.train_batch_size.*is not set"),
    ],
)
def test_a_recipe_that_cannot_be_compared_is_refused(out: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_facts("run.sh", out)


def test_hydras_own_words_are_shown_and_not_its_hints() -> None:
    lines = ["+ python -m x", "Could not override 'a.b'.", "Key 'a' is not in struct", "    full_key: a"]
    assert _error_line(lines) == "Could not override 'a.b'. Key 'a' is not in struct"
    assert _error_line(["Traceback", "  File", "ImportError: no x"]) == "ImportError: no x"
    assert _error_line([]) == "it ended without a word"
