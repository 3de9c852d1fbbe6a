"""A tiny random reward model for recipes: it sorts texts, and learns nothing."""

from __future__ import annotations

from pathlib import Path

from verl_rlhfless.demo.assets import Assets


def build_reward_model(assets: Assets, folder: Path, seed: int = 1) -> Path:
    """Write a sequence classifier with one score, of the size and with the tokenizer of the demo's model (fp32).

    Its scores are logits of random weights: different for different texts, and the same in every run.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    AutoTokenizer.from_pretrained(assets.model).save_pretrained(folder)
    config = AutoConfig.from_pretrained(assets.model, num_labels=1, tie_word_embeddings=False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder
