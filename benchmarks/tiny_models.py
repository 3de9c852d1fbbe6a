"""Tiny random models for recipes, of the size and with the tokenizer of the demo's model, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from verl_rlhfless.demo.assets import Assets

_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
    "windows": ("gemma3_text", {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}),
}
"""Model type and what is its own: experts in every layer, two of which compute a token; a window in one of two."""

_SHARED = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "tie_word_embeddings", "eos_token_id", "bos_token_id", "pad_token_id"),
    *("num_key_value_heads", "head_dim", "initializer_range"),
]


def build_model(family: str, assets: Assets, folder: Path, seed: int = 1) -> Path:
    """Write a model of a family, ``experts`` or ``windows``, and return its folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(assets.model).save_pretrained(folder)
    demo = AutoConfig.from_pretrained(assets.model)
    model_type, own = _FAMILIES[family]
    sizes = {key: getattr(demo, key) for key in _SHARED} | own
    config = AutoConfig.for_model(model_type, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(folder)
    return folder
