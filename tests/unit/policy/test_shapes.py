"""Shapes of public models from what their files say: parameters as published, cache and states as vLLM keeps them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.policy.test_experts import config
from verl_rlhfless.errors import ConfigError
from verl_rlhfless.policy.layers import Window
from verl_rlhfless.policy.shapes import ModelShape, parse_model_config

_LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_V2 = _LATENT | {
    "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1, "q_lora_rank": None,
}  # fmt: skip
_DELTA = {
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
}  # fmt: skip
_NEMOTRON = {"n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4, "mlp_hidden_act": "relu2", "mamba_head_dim": 64}
_MAMBA = {"mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 128, "mamba_d_conv": 4, "mamba_expand": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    # sizes: hidden, layers, heads, KV heads, size of a head, vocabulary; in files without a head's size it is computed
    "Qwen2.5-7B": config("3584 28 28 4 128 152064", intermediate_size=18944, use_sliding_window=False),
    "Qwen2.5-VL-7B": config(
        "3584 28 28 4 128 152064", intermediate_size=18944, use_sliding_window=False, sliding_window=32768,
        max_window_layers=28, vision_config={
            "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        },
    ),
    "Qwen3-8B": config("4096 36 32 8 128 151936", intermediate_size=12288, use_sliding_window=False),
    "Qwen3-Next-80B-A3B": config(
        "2048 48 16 2 256 151936", model_type="qwen3_next", intermediate_size=5120, num_experts=512,
        num_experts_per_tok=10, full_attention_interval=4, decoder_sparse_step=1, mlp_only_layers=[], **_DELTA,
    ),
    "Qwen3.5-35B-A3B": config(
        "2048 40 16 2 256 248320", model_type="qwen3_5_moe_text", num_experts=256, num_experts_per_tok=8,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 10, **_DELTA,
    ),
    "Llama-3.1-8B": config("4096 32 32 8 128 128256", intermediate_size=14336),
    "Llama-3.1-70B": config("8192 80 64 8 128 128256", intermediate_size=28672),
    "Llama-4-Scout": {"text_config": config(
        "5120 48 40 8 128 202048", intermediate_size=8192, intermediate_size_mlp=16384, num_local_experts=16,
        num_experts_per_tok=1, interleave_moe_layer_step=1, attention_chunk_size=8192,
    )},
    "Mistral-7B": config("4096 32 32 8 128 32000", intermediate_size=14336, sliding_window=4096),
    "Phi-4": config("5120 40 40 10 128 100352", intermediate_size=17920, sliding_window=None),
    "Olmo-3-7B": config("4096 32 32 32 128 100278", model_type="olmo3", intermediate_size=11008, sliding_window=4096),
    "Gemma-2-9B": config(
        "3584 42 16 8 256 256000", model_type="gemma2", intermediate_size=14336, sliding_window=4096
    ),
    "Gemma-3-12B": {"text_config": {
        "model_type": "gemma3_text", "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48,
        "num_attention_heads": 16, "num_key_value_heads": 8, "sliding_window": 1024,
    }},
    "Gemma-3-27B": {"text_config": {
        "model_type": "gemma3_text", "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62,
        "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 1024,
    }},
    "gpt-oss-20b": config(
        "2880 24 64 8 64 201088", intermediate_size=2880, num_local_experts=32, num_experts_per_tok=4,
        sliding_window=128, layer_types=["sliding_attention", "full_attention"] * 12,
    ),
    "gpt-oss-120b": config(
        "2880 36 64 8 64 201088", model_type="gpt_oss", intermediate_size=2880, num_local_experts=128,
        num_experts_per_tok=4, sliding_window=128,
    ),
    "DeepSeek-V2-Lite": config(
        "2048 27 16 16 64 102400", model_type="deepseek_v2", intermediate_size=10944, **_V2
    ),
    "Moonlight-16B-A3B": config(
        "2048 27 16 16 64 163840", model_type="deepseek_v3", intermediate_size=11264, **_V2
    ),
    "DeepSeek-V3": config(
        "7168 61 128 128 64 129280", model_type="deepseek_v3", intermediate_size=18432, num_nextn_predict_layers=1,
        **_V2 | {"q_lora_rank": 1536, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
                 "moe_intermediate_size": 2048, "first_k_dense_replace": 3},
    ),
    "GLM-4.7-Flash": config(
        "2048 47 20 20 64 154880", model_type="glm4_moe_lite", intermediate_size=10240,
        mlp_layer_types=["dense"] + ["sparse"] * 46,
        **_V2 | {"q_lora_rank": 768, "qk_nope_head_dim": 192, "v_head_dim": 256, "n_shared_experts": 1,
                 "num_experts_per_tok": 4, "moe_intermediate_size": 1536},
    ),
    "Granite-4.0-H-Tiny": config(
        "1536 40 12 4 128 100352", intermediate_size=512, shared_intermediate_size=1024, num_local_experts=64,
        num_experts_per_tok=6, mamba_n_heads=48, tie_word_embeddings=True,
        layer_types=["attention" if layer in (5, 15, 25, 35) else "mamba" for layer in range(40)], **_MAMBA,
    ),
    "Bamba-9B": config(
        "4096 32 32 8 128 128256", intermediate_size=14336, mamba_n_heads=128, attn_layer_indices=[9, 18, 27], **_MAMBA
    ),
    "Nemotron-H-8B": config(
        "4096 52 32 8 128 131072", model_type="nemotron_h", intermediate_size=21504, mamba_num_heads=128,
        hybrid_override_pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-", **_NEMOTRON,
    ),
    "Nemotron-3-Nano-30B-A3B": config(
        "2688 52 32 2 128 131072", model_type="nemotron_h", intermediate_size=1856, mamba_num_heads=64,
        hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", n_routed_experts=128,
        n_shared_experts=1, moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712,
        num_experts_per_tok=6, **_NEMOTRON,
    ),
}  # fmt: skip
STORED = {
    "Qwen2.5-7B": 7.62, "Qwen2.5-VL-7B": 8.29, "Qwen3-8B": 8.19, "Qwen3-Next-80B-A3B": 80, "Qwen3.5-35B-A3B": 35,
    "Llama-3.1-8B": 8.03, "Llama-3.1-70B": 70.6, "Llama-4-Scout": 109, "Mistral-7B": 7.24, "Phi-4": 14.7,
    "Olmo-3-7B": 7.30, "Gemma-2-9B": 9.24, "Gemma-3-12B": 11.77, "Gemma-3-27B": 27.0, "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8, "DeepSeek-V2-Lite": 15.7, "Moonlight-16B-A3B": 16.0, "DeepSeek-V3": 671,
    "GLM-4.7-Flash": 30, "Granite-4.0-H-Tiny": 7, "Bamba-9B": 9.78, "Nemotron-H-8B": 8.1,
    "Nemotron-3-Nano-30B-A3B": 31.6,
}  # fmt: skip
ACTIVE = {
    "DeepSeek-V3": 37, "DeepSeek-V2-Lite": 2.4, "gpt-oss-20b": 3.6, "gpt-oss-120b": 5.1, "Llama-4-Scout": 17,
    "Nemotron-3-Nano-30B-A3B": 3.2, "Granite-4.0-H-Tiny": 1.5,
}  # fmt: skip


def shape(name: str, **change: Any) -> ModelShape:
    return parse_model_config(CONFIGS[name] | change, name)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_the_published_ones(name: str) -> None:
    assert shape(name).params / 1e9 == pytest.approx(STORED[name], rel=0.02)


@pytest.mark.parametrize("name", ACTIVE)
def test_a_token_multiplies_with_the_published_active_parameters(name: str) -> None:
    one = shape(name)
    embeddings = one.vocab * one.hidden / 1e9  # cards count them or leave them out
    assert one.matmul_params / 1e9 == pytest.approx(ACTIVE[name], rel=0.02, abs=embeddings)


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("DeepSeek-V3", 61 * 576),  # one latent, 512 wide, and one position, 64 wide, a layer
        ("GLM-4.7-Flash", 47 * 576),
        ("Qwen3-Next-80B-A3B", 12 * 2 * 2 * 256),  # every fourth layer has attention
        ("Nemotron-H-8B", 4 * 2 * 8 * 128),
        ("Granite-4.0-H-Tiny", 4 * 2 * 4 * 128),
        ("Gemma-3-27B", 62 * 2 * 16 * 128),  # of all layers, up to the window
        ("Llama-4-Scout", 48 * 2 * 8 * 128),  # vLLM keeps what chunked layers no longer read
    ],
)
def test_a_token_takes_the_cache_of_the_layers_with_attention(name: str, elements: int) -> None:
    assert shape(name).kv_bytes_per_token == 2 * elements


@pytest.mark.parametrize(
    ("name", "window"),
    [
        ("Gemma-2-9B", Window(4096, 21)),
        ("Gemma-3-12B", Window(1024, 40)),
        ("Gemma-3-27B", Window(1024, 52)),
        ("gpt-oss-20b", Window(128, 12)),
        ("gpt-oss-120b", Window(128, 18)),
        ("Olmo-3-7B", Window(4096, 24)),
        ("Mistral-7B", Window(4096, 32)),
        ("Qwen2.5-VL-7B", None),  # it names a window and does not use it
        ("Llama-4-Scout", None),
    ],
)
def test_layers_with_a_window_are_those_of_the_model(name: str, window: Window | None) -> None:
    assert shape(name).window == window


def test_a_pattern_of_windows_may_be_letters() -> None:
    assert shape("Mistral-7B", sliding_window_pattern="LLLG").window == Window(4096, 24)


def test_other_states_count_as_full_attention() -> None:
    plamo = {"mamba_num_heads": 64, "mamba_d_state": 64, "mamba_d_conv": 4}  # Mamba-1
    assert shape("Qwen3-8B", **plamo) == shape("Qwen3-8B")
    zamba = {"n_mamba_heads": 2, "layers_block_type": ["mamba", "hybrid"] * 18}
    assert shape("Qwen3-8B", **zamba) == shape("Qwen3-8B")


def test_a_window_may_begin_at_a_layer() -> None:
    assert shape("Qwen2.5-VL-7B", use_sliding_window=True, max_window_layers=20).window == Window(32768, 8)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("DeepSeek-V3", (1, 2, 4, 8, 16)),
        ("GLM-4.7-Flash", (1, 2, 4)),  # 20 heads
        ("Qwen3-Next-80B-A3B", (1, 2, 4, 8, 16)),
        ("Nemotron-H-8B", (1, 2, 4, 8)),  # 8 groups of states
        ("Granite-4.0-H-Tiny", (1, 2, 4)),
    ],
)
def test_a_size_divides_heads_and_states_but_not_latents(name: str, sizes: tuple[int, ...]) -> None:
    assert shape(name).split_sizes(16) == sizes


def test_a_state_has_the_shapes_of_vllm() -> None:
    convolved, state = 3 * (2 * 16 * 128 + 32 * 128), 32 * 128 * 128
    assert shape("Qwen3-Next-80B-A3B").state_bytes == 36 * 2 * (convolved + state)
    assert shape("Qwen3-Next-80B-A3B", mamba_ssm_dtype="float32").state_bytes == 36 * (2 * convolved + 4 * state)
    convolved, state = 3 * (128 * 64 + 2 * 8 * 128), 128 * 64 * 128
    assert shape("Nemotron-H-8B").state_bytes == 24 * (2 * convolved + 4 * state)  # vLLM keeps them in float32
    assert shape("Qwen3-8B").state_bytes == 0


def test_only_what_every_gpu_has_whole_is_replicated() -> None:
    assert shape("DeepSeek-V3").replicated_params == 61 * 7168 * (1536 + 512 + 64)
    assert shape("Qwen3-8B").replicated_params == 0


@pytest.mark.parametrize("model_type", ["deepseek_v32", "minicpm3", "kimi_linear", None])
def test_a_variant_of_latent_attention_is_refused(model_type: str | None) -> None:
    with pytest.raises(ConfigError, match=r"kv_lora_rank=512: multi-head latent attention of model_type.*Modelled are"):
        shape("DeepSeek-V3", model_type=model_type)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"layer_types": ["full_attention"] * 47}, "layer_types"),
        ({"layer_types": ["linear_attention"] * 48}, "layer_types"),
        ({"full_attention_interval": "4"}, "full_attention_interval"),
        ({"linear_value_head_dim": 0}, "linear_value_head_dim"),
        ({"moe_layers": 3}, "moe_layers"),
    ],
)
def test_a_bad_kind_of_layer_names_the_key(change: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        shape("Qwen3-Next-80B-A3B", **change)
    assert caught.value.key == f"Qwen3-Next-80B-A3B: {key}"


def test_a_vision_encoder_of_another_form_is_not_counted() -> None:
    seeing = {"hidden_size": 1152, "depth": 27, "mlp_ratio": 3.7, "num_heads": 16}
    assert shape("Qwen2.5-VL-7B", vision_config=seeing).params == shape("Qwen2.5-7B").params
