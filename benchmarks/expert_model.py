"""A tiny random mixture of experts for recipes, of the size and with the tokenizer of the demo's model."""

from __future__ import annotations

from pathlib import Path

from verl_rlhfless.demo.assets import Assets

_EXPERTS, _PER_TOKEN, _WIDTH = 4, 2, 64


def build_expert_model(assets: Assets, folder: Path, seed: int = 1) -> Path:
    """Write a Qwen3-MoE in fp32: in every layer four experts, two of which compute a token."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    AutoTokenizer.from_pretrained(assets.model).save_pretrained(folder)
    sizes = AutoConfig.from_pretrained(assets.model).to_diff_dict()
    own = {"num_experts": _EXPERTS, "num_experts_per_tok": _PER_TOKEN, "moe_intermediate_size": _WIDTH}
    for key in ("model_type", "architectures", "layer_types"):
        sizes.pop(key, None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **own)).to(torch.float32)
    model.save_pretrained(folder)
    return folder
