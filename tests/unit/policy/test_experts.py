"""Mixtures of experts: their sizes are those of the model cards, and an iteration reads what its tokens go to."""

from __future__ import annotations

from typing import Any

import pytest

from verl_rlhfless.policy.gpus import GPUS
from verl_rlhfless.policy.perf import EnginePerf
from verl_rlhfless.policy.shapes import parse_model_config


def config(sizes: str, **more: Any) -> dict[str, Any]:
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    return dict(zip(keys, map(int, sizes.split()), strict=True)) | more


QWEN3_30B_A3B = config(
    "2048 48 32 4 128 151936", intermediate_size=6144, moe_intermediate_size=768, num_experts=128,
    num_experts_per_tok=8, decoder_sparse_step=1, mlp_only_layers=[],
)  # fmt: skip
MIXTRAL_8X7B = config(
    "4096 32 32 8 128 32000", intermediate_size=14336, num_local_experts=8, num_experts_per_tok=2
)  # fmt: skip
QWEN15_MOE = config(
    "2048 24 16 16 128 151936", intermediate_size=5632, moe_intermediate_size=1408, num_experts=60,
    shared_expert_intermediate_size=5632, num_experts_per_tok=4, decoder_sparse_step=1,
)  # fmt: skip
GLM45_AIR = config(
    "4096 46 96 8 128 151552", intermediate_size=10944, moe_intermediate_size=1408, n_routed_experts=128,
    n_shared_experts=1, num_experts_per_tok=8, first_k_dense_replace=1,
)  # fmt: skip
PERF = EnginePerf(parse_model_config(QWEN3_30B_A3B, "a3b"), GPUS["H100"], 2)


@pytest.mark.parametrize(
    ("values", "stored", "active"),
    [(QWEN3_30B_A3B, 30.5, 3.3), (MIXTRAL_8X7B, 46.7, 12.9), (QWEN15_MOE, 14.3, 2.7), (GLM45_AIR, 106, 12.0)],
)
def test_parameters_are_those_of_the_model_cards(values: dict[str, Any], stored: float, active: float) -> None:
    shape = parse_model_config(values, "m")
    assert shape.params / 1e9 == pytest.approx(stored, rel=0.01)
    tokens = shape.vocab * shape.hidden / 1e9  # cards count the embeddings or leave them out
    assert shape.matmul_params / 1e9 - tokens <= active * 1.03 <= (shape.matmul_params / 1e9 + tokens) * 1.06


def test_dense_layers_among_sparse_ones_have_no_experts() -> None:
    every_other = parse_model_config(QWEN3_30B_A3B | {"decoder_sparse_step": 2}, "m")
    named = parse_model_config(QWEN3_30B_A3B | {"mlp_only_layers": list(range(0, 48, 2))}, "m")
    assert every_other == named and named.experts is not None and named.experts.layers == 24
    assert parse_model_config(QWEN3_30B_A3B | {"mlp_only_layers": list(range(48))}, "m").experts is None


def test_more_tokens_go_to_more_experts_until_all_are_read() -> None:
    read = [PERF.shape.read_params(tokens) for tokens in (1, 2, 16, 256, 8192)]
    assert read[0] == PERF.shape.matmul_params and read == sorted(read)
    stored = PERF.shape.params - PERF.shape.vocab * PERF.shape.hidden
    assert read[1] < 2 * read[0] and read[-1] == pytest.approx(stored)


def test_a_batch_of_one_decodes_as_fast_as_its_active_parameters_and_a_large_one_as_all() -> None:
    per_param_s = 2 / PERF.tp / (PERF.gpu.hbm_bytes_per_s * PERF.efficiencies.hbm)
    fixed_s = PERF.efficiencies.launch_s
    for batch in (1, 128):
        rest_s = PERF.allreduce_s(batch) + batch * PERF.efficiencies.per_seq_s
        weights_s = PERF.iteration_s(batch, 0) - fixed_s - rest_s
        assert weights_s == pytest.approx(PERF.shape.read_params(batch) * per_param_s)
    assert PERF.iteration_s(128, 0) > 3 * PERF.iteration_s(1, 0)


def test_all_experts_are_loaded_and_take_memory() -> None:
    dense = parse_model_config({key: value for key, value in QWEN3_30B_A3B.items() if "expert" not in key}, "m")
    assert PERF.load_s > 1.5 * EnginePerf(dense, PERF.gpu, PERF.tp).load_s
    assert PERF.kv_blocks < EnginePerf(dense, PERF.gpu, PERF.tp).kv_blocks


def test_a_size_must_divide_what_is_split() -> None:
    assert PERF.shape.split_sizes(8) == (1, 2, 4, 8)
    assert parse_model_config(QWEN15_MOE | {"moe_intermediate_size": 1404}, "m").split_sizes(8) == (1, 2, 4)
    assert parse_model_config(GLM45_AIR, "m").widths == (10944, 1408, 1408)
