"""What of verl's recipe enters the host-memory account, and what is refused from it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from verl_rlhfless.config import RlhflessConfig, parse_config
from verl_rlhfless.errors import HostMemoryError, WeightStoreError
from verl_rlhfless.live.host_memory import (
    check_host_memory,
    check_store,
    count_parameters,
    has_tied_embeddings,
    memory_of_run,
)
from verl_rlhfless.policy.host_memory import HostMemory, RunMemory, StoreMemory

GIB = 2**30
PARAMS = 10**9
SETTINGS = parse_config({
    "pool": {"name": "elastic"},
    "weights": {"name": "store", "bucket_mib": 64},
    "planner": {"name": "fixed", "schedule": [1, 3]},
})  # fmt: skip


def recipe(*overrides: str) -> DictConfig:
    needed = ("actor_rollout_ref.rollout.name=vllm", "actor_rollout_ref.rollout.tensor_model_parallel_size=2")
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=[*needed, *overrides])


_DEFAULTS = {"is_tied": False, "can_suspend": True, "num_gpus": 8}


def memory(*overrides: str, settings: RlhflessConfig = SETTINGS, **arguments: Any) -> RunMemory:
    return memory_of_run(recipe(*overrides), settings, PARAMS, **{**_DEFAULTS, **arguments})


@pytest.fixture(autouse=True)
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verl.utils.device.get_device_name", lambda: "cuda")


def test_the_trainers_roles_follow_from_the_recipe() -> None:
    grpo = memory("algorithm.adv_estimator=grpo")
    assert [role.name for role in grpo.trainer.roles] == ["actor"]
    full = memory("algorithm.adv_estimator=gae", "actor_rollout_ref.actor.use_kl_loss=True", "critic.enable=True")
    assert [role.name for role in full.trainer.roles] == ["actor", "reference", "critic"]


@pytest.mark.parametrize(("engine", "strategy", "copies"), [("dp", "fsdp", 2), ("dp", "fsdp2", 1), ("megatron", "", 1)])
def test_a_reference_has_no_moments_and_room_for_gradients_only_where_fsdp1_pins_it(
    engine: str, strategy: str, copies: int
) -> None:
    overrides = [f"model_engine={engine}", "actor_rollout_ref.actor.use_kl_loss=True", "algorithm.adv_estimator=gae"]
    chosen = [f"actor_rollout_ref.ref.strategy={strategy}"] if strategy else []
    actor, reference, critic = memory(*overrides, *chosen).trainer.roles
    assert reference.num_bytes == copies * reference.model_bytes
    assert [role.num_bytes for role in (actor, critic)] == [4 * actor.model_bytes] * 2


def test_the_trainers_weights_count_in_the_type_that_it_keeps_them_in() -> None:
    bf16 = memory("actor_rollout_ref.actor.fsdp_config.model_dtype=bf16")
    assert [run.trainer.roles[0].model_bytes for run in (memory(), bf16)] == [4 * PARAMS, 2 * PARAMS]


@pytest.mark.parametrize(("trained", "served", "num_bytes"), [
    ("fp32", "bfloat16", 2), ("fp32", "float32", 4), ("fp32", "auto", 4), ("bf16", "float32", 2),
])  # fmt: skip
def test_the_store_holds_weights_in_the_narrower_of_the_trainers_type_and_the_engines(
    trained: str, served: str, num_bytes: int
) -> None:
    dtypes = (
        f"actor_rollout_ref.actor.fsdp_config.model_dtype={trained}",
        f"actor_rollout_ref.rollout.dtype={served}",
    )
    assert memory(*dtypes).store.model_bytes == num_bytes * PARAMS


def test_megatron_keeps_and_publishes_what_it_computes_in() -> None:
    grpo = ("algorithm.adv_estimator=grpo", "actor_rollout_ref.actor.use_kl_loss=True")
    run = memory("model_engine=megatron", *grpo, can_suspend=False)
    assert [role.model_bytes for role in run.trainer.roles] == [2 * PARAMS, 2 * PARAMS]
    assert run.store.model_bytes == 2 * PARAMS


def test_nodes_replicas_and_servers_follow_from_the_recipe() -> None:
    run = memory("trainer.n_gpus_per_node=4", "trainer.nnodes=2")
    assert (run.trainer.num_ranks, run.trainer.ranks_per_node, run.trainer.num_nodes) == (8, 4, 2)
    assert (run.replicas.num_replicas, run.replicas.tp, run.replicas.num_warm) == (3, 2, 3)
    assert run.store.bucket_bytes == 64 << 20


def test_a_planned_fleet_may_be_as_large_as_the_budget() -> None:
    planned = parse_config(
        {
            "pool": {"name": "elastic"},
            "weights": {"name": "store"},
            "planner": {"name": "cost_aware"},
            "predictor": {"name": "history"},
        }
    )
    assert memory("trainer.n_gpus_per_node=4", settings=planned).replicas.num_replicas == 4
    stays = memory("trainer.n_gpus_per_node=4", settings=planned, can_suspend=False)
    assert stays.replicas.num_replicas == 2
    teacher = ("distillation.enabled=True", "distillation.n_gpus_per_node=4", "distillation.nnodes=1")
    assert memory(*teacher, settings=planned).replicas.num_replicas == 2, "of the four that the teacher leaves"


@pytest.mark.parametrize(("device", "can_suspend", "is_on_host"), [
    ("cuda", True, True), ("cuda", False, False), ("cpu", False, True),
])  # fmt: skip
def test_a_trainer_that_never_leaves_its_gpus_needs_no_host_memory_for_its_state(
    monkeypatch: pytest.MonkeyPatch, device: str, can_suspend: bool, is_on_host: bool
) -> None:
    monkeypatch.setattr("verl.utils.device.get_device_name", lambda: device)
    assert memory(can_suspend=can_suspend).trainer.is_on_host is is_on_host


def test_an_engine_keeps_weights_keys_and_values_on_a_host_that_is_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert memory().replicas.state_bytes == 0
    monkeypatch.setattr("verl.utils.device.get_device_name", lambda: "cpu")
    assert memory().replicas.state_bytes == 2 * PARAMS + 2 * 3 * GIB


def test_a_node_without_room_is_refused_with_node_holders_and_shortage() -> None:
    node = HostMemory("0123456789", object_store_bytes=10**12, available_bytes=20 * GIB, num_gpus=8)
    with pytest.raises(HostMemoryError, match=r"GiB for 8 trainer ranks.*free on node 01234567: .*GiB short"):
        check_host_memory(memory("trainer.n_gpus_per_node=8", "algorithm.adv_estimator=grpo"), [node])
    roomy = HostMemory("0123456789", object_store_bytes=10**12, available_bytes=10**12, num_gpus=8)
    (account,) = check_host_memory(memory("trainer.n_gpus_per_node=8"), [roomy])
    assert account.num_bytes > 4 * 4 * PARAMS


def test_weights_that_turn_out_too_large_are_refused_by_the_store() -> None:
    memory_of_node = HostMemory("node", object_store_bytes=10 * GIB, available_bytes=100 * GIB)
    check_store(StoreMemory(GIB, 2, GIB), memory_of_node)
    with pytest.raises(WeightStoreError, match=r"8\.00 GiB in memory"):
        check_store(StoreMemory(4 * GIB, 2, GIB), memory_of_node)


def test_parameters_are_counted_without_a_model() -> None:
    from transformers import Qwen3Config

    def count(is_tied: bool) -> int:
        config = Qwen3Config(
            vocab_size=100, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=4, tie_word_embeddings=is_tied, architectures=["Qwen3ForCausalLM"],
        )  # fmt: skip
        return count_parameters(SimpleNamespace(hf_config=config, trust_remote_code=False))

    layer = 8 * 8 + 2 * (8 * 4) + 8 * 8 + 3 * 8 * 16 + 2 * 8 + 2 * 4  # projections, MLP, norms
    assert count(is_tied=True) == 100 * 8 + layer + 8
    assert count(is_tied=False) == 2 * 100 * 8 + layer + 8


TINY: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "architecture", "values"), [
    ("Qwen2Config", "Qwen2ForCausalLM", TINY),
    ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", {"text_config": TINY, "vision_config": {"depth": 1}}),
])  # fmt: skip
def test_parameters_are_counted_where_the_runs_attention_needs_a_gpu(
    kind: str, architecture: str, values: dict[str, Any]
) -> None:
    import transformers

    config = getattr(transformers, kind)(**values, architectures=[architecture])
    config._attn_implementation = "flash_attention_2"  # verl's default, of nested configurations too
    layer = 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16
    assert count_parameters(SimpleNamespace(hf_config=config, trust_remote_code=False)) > 2 * 100 * 8 + layer
    assert config._attn_implementation == "flash_attention_2", "the run's own configuration is as it was"


@pytest.mark.parametrize(("kind", "is_tied"), [
    ("Qwen2AudioConfig", False), ("MllamaConfig", False), ("Qwen2_5OmniConfig", True), ("Gemma3Config", True),
])  # fmt: skip
def test_tied_embeddings_are_asked_of_the_text_model_where_the_whole_one_does_not_say(kind: str, is_tied: bool) -> None:
    import transformers

    assert has_tied_embeddings(getattr(transformers, kind)()) is is_tied


def test_every_rank_loads_a_whole_copy_of_a_model_with_tied_embeddings() -> None:
    per_node = "trainer.n_gpus_per_node=8"
    assert memory(per_node, is_tied=True).trainer.copies_at_load == 8
    assert memory(per_node, is_tied=False).trainer.copies_at_load == 1
    assert memory("model_engine=megatron", per_node, is_tied=True).trainer.copies_at_load == 1
