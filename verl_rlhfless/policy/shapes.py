"""Model shapes from a Hugging Face ``config.json``, and the tensor-parallel sizes that vLLM accepts for them.

Invariant: a shape is dense bfloat16 decoder-only; everything the performance model needs follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from verl_rlhfless.errors import ConfigError, DataError

BYTES_PER_PARAM = 2
"""bfloat16 weights and KV cache."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of one dense decoder-only transformer."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    is_tied: bool

    @cached_property
    def matmul_params(self) -> int:
        """Parameters that every token multiplies with (the input embedding is a look-up and not among them)."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.vocab * self.hidden

    @cached_property
    def params(self) -> int:
        """All parameters that are stored."""
        return self.matmul_params + (0 if self.is_tied else self.vocab * self.hidden)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of one bfloat16 copy of the weights."""
        return self.params * BYTES_PER_PARAM

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of key and value cache for one token over all layers, without replication."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BYTES_PER_PARAM

    def kv_shards(self, tp: int) -> int:
        """GPUs among which the KV heads are split; beyond their number vLLM replicates them."""
        return min(tp, self.kv_heads)

    def legal_tp(self, gpus_per_node: int) -> tuple[int, ...]:
        """Return the tensor-parallel sizes that vLLM accepts and that fill a node, smallest first."""
        return tuple(tp for tp in self.split_sizes(gpus_per_node) if gpus_per_node % tp == 0)

    def split_sizes(self, num_gpus: int) -> tuple[int, ...]:
        """Return the tensor-parallel sizes up to ``num_gpus`` that vLLM accepts, smallest first."""
        return tuple(
            tp
            for tp in range(1, num_gpus + 1)
            if self.heads % tp == 0
            and self.intermediate % tp == 0
            and (self.kv_heads % tp == 0 or tp % self.kv_heads == 0)
        )


MODELS = {
    shape.name: shape
    for shape in (
        # name, hidden, layers, heads, kv_heads, head_dim, intermediate, vocab, tied: the models' own config.json
        ModelShape("qwen2.5-3b", 2048, 36, 16, 2, 128, 11008, 151936, True),
        ModelShape("qwen2.5-7b", 3584, 28, 28, 4, 128, 18944, 152064, False),
        ModelShape("qwen2.5-32b", 5120, 64, 40, 8, 128, 27648, 152064, False),
        ModelShape("llama2-70b", 8192, 80, 64, 8, 128, 28672, 32000, False),
    )
}
"""Shipped shapes by name."""


def parse_model_config(values: Mapping[str, Any], name: str) -> ModelShape:
    """Return the shape that a Hugging Face ``config.json`` describes; of a vision-language model, its decoder's.

    Args:
        values: The parsed JSON object.
        name: What to call the model, and the prefix of keys in errors (the file's path).

    Raises:
        ConfigError: A key is not a positive integer, or the model is not a dense decoder.
        DataError: A key is missing.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(name, type(values).__name__, "must be a JSON object", "Give the model's config.json.")
    if isinstance(text := values.get("text_config"), Mapping):  # of a model that sees too, the part that generates
        tied = values.get("tie_word_embeddings", text.get("tie_word_embeddings"))
        values = {**text, "tie_word_embeddings": bool(tied)}
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if values.get(key):
            raise ConfigError(
                f"{name}: {key}", values[key], "mixture-of-experts models are not modelled", "Use a dense model."
            )
    hidden, heads, kv_heads, head_dim = _attention(values, name)
    tied = values.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ConfigError(f"{name}: tie_word_embeddings", tied, "must be true or false", "Correct it.")
    return ModelShape(
        name=name,
        hidden=hidden,
        layers=_positive(values, "num_hidden_layers", name),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=_positive(values, "intermediate_size", name),
        vocab=_positive(values, "vocab_size", name),
        is_tied=tied,
    )


def _attention(values: Mapping[str, Any], name: str) -> tuple[int, int, int, int]:
    """Return hidden size, heads, KV heads (as many as heads if not given) and the size of a head."""
    heads = _positive(values, "num_attention_heads", name)
    hidden = _positive(values, "hidden_size", name)
    kv_heads = _positive(values, "num_key_value_heads", name) if "num_key_value_heads" in values else heads
    if heads % kv_heads:
        raise ConfigError(
            f"{name}: num_key_value_heads", kv_heads, f"must divide num_attention_heads={heads}", "Correct it."
        )
    if values.get("head_dim") is None and hidden % heads:
        raise ConfigError(
            f"{name}: hidden_size", hidden, f"must be a multiple of num_attention_heads={heads}", "Or give head_dim."
        )
    head_dim = _positive(values, "head_dim", name) if values.get("head_dim") is not None else hidden // heads
    return hidden, heads, kv_heads, head_dim


def _positive(values: Mapping[str, Any], key: str, name: str) -> int:
    if key not in values:
        raise DataError(f"{name}: {key}: is missing. Give a Hugging Face config.json of a dense decoder.")
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}: {key}", value, "must be an integer >= 1", "Correct the model config.")
    return value
