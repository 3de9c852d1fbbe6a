"""Kinds of layers from the keys of a Hugging Face ``config.json``.

A published file leaves out what its model type has by default, a configuration that transformers completed has all of
it: both are read. Kinds of layers that are not known here (chunked attention, short convolutions, Mamba-1) count as
full attention, which holds and reads more than they do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verl_rlhfless.errors import ConfigError, DataError
from verl_rlhfless.policy.layers import BYTES_PER_PARAM, Experts, Latent, Recurrent, Vision, Window

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")

_LATENT_TYPES = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k2")
"""Model types whose layers all have latent attention, for which vLLM caches latents and no more (as of 0.28)."""

_FULL_EVERY = {"gemma2": 2, "gemma3_text": 6, "gpt_oss": 2, "cohere2": 4, "olmo3": 4}
"""Of so many layers one has full attention, the others a window, where the file does not say."""

_PATTERN = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
"""Letters of Nemotron-H's pattern."""

_GEMMA = {"head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": _GEMMA,
    "gemma3_text": {**_GEMMA, "vocab_size": 262208},
    "cohere2": {"tie_word_embeddings": True},
}
"""What published files leave out and their model type defines."""


def layer_kinds(values: Mapping[str, Any], name: str) -> list[str]:
    """Return the kind of every layer, in the words of transformers."""
    layers = optional(values, "num_hidden_layers", name)
    kinds, pattern = values.get("layer_types") or values.get("layers_block_type"), values.get("hybrid_override_pattern")
    if kinds is None and isinstance(pattern, str):
        kinds = [_PATTERN.get(letter, letter) for letter in pattern]
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) < layers:
            rule = f"must be a list of num_hidden_layers={layers} kinds"
            raise ConfigError(f"{name}: layer_types", kinds, rule, "Correct the model config.")
        return kinds[:layers] if layers else kinds
    layers = positive(values, "num_hidden_layers", name)
    if isinstance(attending := values.get("attn_layer_indices"), list):
        return ["attention" if layer in attending else "mamba" for layer in range(layers)]
    every = values.get("sliding_window_pattern")  # a number, or letters as LLLG
    kind = "sliding_attention"
    period = len(every) if isinstance(every, str) else optional(values, "sliding_window_pattern", name)
    if "linear_num_value_heads" in values:
        kind, period = "linear_attention", optional(values, "full_attention_interval", name) or 4
    period = period or _FULL_EVERY.get(values.get("model_type", ""), layers + 1)
    first = optional(values, "max_window_layers", name) if kind == "sliding_attention" else 0
    return [kind if layer >= first and (layer + 1) % period else "full_attention" for layer in range(layers)]


def parse_window(values: Mapping[str, Any], kinds: list[str], name: str) -> Window | None:
    """Return the layers with a sliding window; ``None`` without."""
    layers = kinds.count("sliding_attention")
    if not layers or not values.get("sliding_window") or values.get("use_sliding_window") is False:
        return None
    return Window(positive(values, "sliding_window", name), layers)


def parse_vision(values: Mapping[str, Any], name: str) -> Vision | None:
    """Return the encoder that sees beside a decoder; ``None`` without."""
    vision, name = values.get("vision_config"), f"{name}: vision_config"
    if not isinstance(vision, Mapping) or not vision:
        return None
    keys = ("num_heads", "num_attention_heads", "intermediate_size")
    split = tuple(positive(vision, key, name) for key in keys if vision.get(key))
    names = (("embed_dim", "hidden_size"), ("depth", "num_hidden_layers"), ("intermediate_size", "mlp_ratio"))
    found = [next((vision[key] for key in pair if vision.get(key)), 0) for pair in names]
    if not all(isinstance(size, int) for size in found):  # an encoder of another form
        return Vision(split, 0)
    hidden, layers, width = found  # hidden: Qwen2-VL's hidden_size is the decoder's
    width *= 1 if vision.get("intermediate_size") else hidden
    matrices = 3 if vision.get("hidden_act") == "silu" else 2  # with a gate, or without
    return Vision(split, layers * hidden * (4 * hidden + matrices * width))


def parse_latent(values: Mapping[str, Any], name: str) -> Latent | None:
    """Return the sizes of latent attention; ``None`` without.

    Raises:
        ConfigError: A variant of it that has no price here.
    """
    if not values.get("kv_lora_rank"):
        return None
    if values.get("model_type") not in _LATENT_TYPES:
        rule = f"multi-head latent attention of model_type={values.get('model_type')!r} is not modelled"
        action = f"Modelled are {', '.join(_LATENT_TYPES)}."
        raise ConfigError(f"{name}: kv_lora_rank", values["kv_lora_rank"], rule, action)
    keys = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    nope, rope, value = (positive(values, key, name) for key in keys)
    return Latent(positive(values, "kv_lora_rank", name), optional(values, "q_lora_rank", name), nope, rope, value)


def parse_recurrent(values: Mapping[str, Any], kinds: list[str], name: str) -> Recurrent | None:
    """Return the layers with a state: gated delta nets (Qwen3-Next) or Mamba-2; ``None`` without."""
    is_delta = "linear_num_value_heads" in values
    layers = kinds.count("linear_attention" if is_delta else "mamba")
    if "mamba_d_ssm" in values:  # Falcon-H1: beside attention
        layers = len(kinds)
    if not layers or not (is_delta or {"mamba_n_heads", "ssm_state_size"} & set(values)):
        return None
    sizes = _delta_sizes(values, name) if is_delta else _mamba_sizes(values, name)
    hidden, kernel = positive(values, "hidden_size", name), sizes["kernel"]
    params = hidden * sizes["projected"] + sizes["inner"] * hidden + kernel * sizes["convolved"]
    is_fp32 = "float32" in (values.get("mamba_ssm_dtype"), values.get("mamba_ssm_cache_dtype"))
    of_state = 4 if is_fp32 or values.get("model_type") == "nemotron_h" else BYTES_PER_PARAM
    state_bytes = (kernel - 1) * sizes["convolved"] * BYTES_PER_PARAM + sizes["state"] * of_state
    return Recurrent(layers, params, state_bytes, sizes["heads"])


def _delta_sizes(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    keys = ("num_key_heads", "key_head_dim", "num_value_heads", "value_head_dim", "conv_kernel_dim")
    key_heads, key_dim, heads, dim, kernel = (positive(values, f"linear_{key}", name) for key in keys)
    inner, convolved = heads * dim, 2 * key_heads * key_dim + heads * dim
    return {
        "inner": inner,
        "convolved": convolved,
        "projected": convolved + inner + 2 * heads,  # and an output gate, and two numbers a head
        "state": heads * dim * key_dim,
        "kernel": kernel,
        "heads": (key_heads, heads),
    }


def _mamba_sizes(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    is_nemotron = "ssm_state_size" in values
    keys = ("mamba_num_heads", "n_groups", "ssm_state_size", "conv_kernel")
    keys = keys if is_nemotron else ("mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_conv")
    heads, groups, state, kernel = (positive(values, key, name) for key in keys)
    key = "mamba_head_dim" if is_nemotron else "mamba_d_head"
    if values.get(key) in (None, "auto"):
        dim = optional(values, "mamba_expand", name) * positive(values, "hidden_size", name) // heads
    else:
        dim = positive(values, key, name)
    inner, convolved = heads * dim, heads * dim + 2 * groups * state
    return {
        "inner": inner,
        "convolved": convolved,
        "projected": convolved + inner + heads,
        "state": heads * dim * state,
        "kernel": kernel,
        "heads": (heads, groups) if groups > 1 else (heads,),  # one group is copied to every GPU
    }


def parse_experts(values: Mapping[str, Any], kinds: list[str], name: str) -> Experts | None:
    """Return the experts by the keys of Qwen-MoE, Mixtral, GLM-4-MoE and their likes; ``None`` of a dense model."""
    key = next((key for key in _EXPERT_KEYS if values.get(key)), None)
    sparse = _sparse_layers(values, kinds, name) if key else 0
    if key is None or not sparse:
        return None
    count, per_token = positive(values, key, name), positive(values, "num_experts_per_tok", name)
    if per_token > count:
        raise ConfigError(f"{name}: num_experts_per_tok", per_token, f"must be at most {key}={count}", "Correct it.")
    width = "moe_intermediate_size" if "moe_intermediate_size" in values else "intermediate_size"
    intermediate = positive(values, width, name)
    summed = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size")
    shared = next((positive(values, key, name) for key in summed if values.get(key)), 0)
    if not shared:  # Llama 4 has one, which it does not count
        shared = (optional(values, "n_shared_experts", name) or int("intermediate_size_mlp" in values)) * intermediate
    return Experts(count, per_token, intermediate, shared, sparse)


def _sparse_layers(values: Mapping[str, Any], kinds: list[str], name: str) -> int:
    """Return how many layers have experts."""
    if {"mlp", "moe"} & set(kinds):
        return kinds.count("moe")
    for key in ("mlp_layer_types", "moe_layers", "mlp_only_layers"):
        if not isinstance(values.get(key) or [], list):
            raise ConfigError(f"{name}: {key}", values[key], "must be a list of layers", "Correct the model config.")
    if listed := values.get("mlp_layer_types"):
        return int(listed.count("sparse"))
    if listed := values.get("moe_layers"):
        return len(listed)
    only = values.get("mlp_only_layers") or []
    steps = ("decoder_sparse_step", "interleave_moe_layer_step")
    period = next((positive(values, key, name) for key in steps if values.get(key)), 1)
    begins = optional(values, "first_k_dense_replace", name)
    return sum(layer not in only and (layer + 1) % period == 0 for layer in range(begins, len(kinds)))


def optional(values: Mapping[str, Any], key: str, name: str) -> int:
    """Return a positive integer, or 0 where there is none."""
    return positive(values, key, name) if values.get(key) else 0


def positive(values: Mapping[str, Any], key: str, name: str) -> int:
    """Return a positive integer.

    Raises:
        ConfigError: It is something else.
        DataError: It is missing.
    """
    if key not in values:
        raise DataError(f"{name}: {key}: is missing. Give a Hugging Face config.json of a decoder.")
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}: {key}", value, "must be an integer >= 1", "Correct the model config.")
    return value
