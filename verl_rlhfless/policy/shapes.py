"""Model shapes from a Hugging Face ``config.json``, and the tensor-parallel sizes that vLLM accepts for them.

Invariant: a shape is of a bfloat16 decoder, dense or with experts; what the performance model needs follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from verl_rlhfless.errors import ConfigError, DataError

BYTES_PER_PARAM = 2
"""bfloat16 weights and KV cache."""


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture-of-experts layers of a model.

    Attributes:
        count: Routed experts of a layer.
        per_token: How many of them compute a token.
        intermediate: Width of each.
        shared: Summed width of a layer's experts that compute every token; 0 = none.
        layers: Layers that have experts; the others are dense.
    """

    count: int
    per_token: int
    intermediate: int
    shared: int
    layers: int

    def touched(self, tokens: int) -> float:
        """Return the expected experts of a layer that compute at least one of ``tokens``, if each is as likely."""
        return self.count * (1 - (1 - self.per_token / self.count) ** tokens)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of one decoder-only transformer.

    Attributes:
        experts: ``None`` where all of its layers are dense.
        vision: Heads and width of the encoder beside it that sees; vLLM splits them among the same GPUs.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    is_tied: bool
    experts: Experts | None = None
    vision: tuple[int, ...] = ()

    @cached_property
    def matmul_params(self) -> int:
        """Parameters that one token multiplies with (the input embedding is a look-up and not among them)."""
        return self._dense_params + (self._expert_params(self.experts.per_token) if self.experts else 0)

    def read_params(self, tokens: int) -> float:
        """Return the parameters that an iteration over ``tokens`` reads: of experts, those that any token goes to."""
        return self._dense_params + (self._expert_params(self.experts.touched(tokens)) if self.experts else 0)

    @cached_property
    def params(self) -> int:
        """All parameters that are stored."""
        stored = self._dense_params + (self._expert_params(self.experts.count) if self.experts else 0)
        return stored + (0 if self.is_tied else self.vocab * self.hidden)

    @cached_property
    def _dense_params(self) -> int:
        """Parameters that every token multiplies with: attention, dense and shared layers, routers, output."""
        attention = self.layers * self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        widths = (self.layers - (self.experts.layers if self.experts else 0)) * self.intermediate
        routers = 0
        if self.experts:
            widths += self.experts.layers * self.experts.shared
            routers = self.experts.layers * self.experts.count * self.hidden
        return attention + 3 * self.hidden * widths + routers + self.vocab * self.hidden

    def _expert_params(self, each: float) -> Any:
        """Return the parameters of ``each`` routed experts of every layer; an ``int`` of whole ones."""
        assert self.experts is not None
        return self.experts.layers * each * 3 * self.hidden * self.experts.intermediate

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

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths, in channels, of the layers that are split among GPUs."""
        if self.experts is None:
            return (self.intermediate,)
        dense = (self.intermediate,) if self.experts.layers < self.layers else ()
        shared = (self.experts.shared,) if self.experts.shared else ()
        return (*dense, self.experts.intermediate, *shared)

    def legal_tp(self, gpus_per_node: int) -> tuple[int, ...]:
        """Return the tensor-parallel sizes that vLLM accepts and that fill a node, smallest first."""
        return tuple(tp for tp in self.split_sizes(gpus_per_node) if gpus_per_node % tp == 0)

    def split_sizes(self, num_gpus: int) -> tuple[int, ...]:
        """Return the tensor-parallel sizes up to ``num_gpus`` that vLLM accepts, smallest first."""
        return tuple(
            tp
            for tp in range(1, num_gpus + 1)
            if all(each % tp == 0 for each in (self.heads, *self.widths, *self.vision))
            and (self.kv_heads % tp == 0 or tp % self.kv_heads == 0)
        )


_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")

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
        ConfigError: A key is not a positive integer, or the attention is not the usual one.
        DataError: A key is missing.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(name, type(values).__name__, "must be a JSON object", "Give the model's config.json.")
    vision = _vision(values, name)
    if isinstance(text := values.get("text_config"), Mapping):  # of a model that sees too, the part that generates
        tied = values.get("tie_word_embeddings", text.get("tie_word_embeddings"))
        values = {**text, "tie_word_embeddings": bool(tied)}
    if values.get("kv_lora_rank"):
        rule = "multi-head latent attention is not modelled"
        raise ConfigError(f"{name}: kv_lora_rank", values["kv_lora_rank"], rule, "Use a model with keys and values.")
    hidden, heads, kv_heads, head_dim = _attention(values, name)
    tied = values.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ConfigError(f"{name}: tie_word_embeddings", tied, "must be true or false", "Correct it.")
    layers = _positive(values, "num_hidden_layers", name)
    return ModelShape(
        name=name,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=_positive(values, "intermediate_size", name),
        vocab=_positive(values, "vocab_size", name),
        is_tied=tied,
        experts=_experts(values, layers, name),
        vision=vision,
    )


def _vision(values: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """Return heads and width of a vision encoder, those that its configuration names."""
    vision = values.get("vision_config")
    if not isinstance(vision, Mapping):
        return ()
    keys = ("num_heads", "num_attention_heads", "intermediate_size")
    return tuple(_positive(vision, key, f"{name}: vision_config") for key in keys if vision.get(key))


def _experts(values: Mapping[str, Any], layers: int, name: str) -> Experts | None:
    """Return the experts by the keys of Qwen-MoE, Mixtral, GLM-4-MoE and their likes; ``None`` of a dense model."""
    key = next((key for key in _EXPERT_KEYS if values.get(key)), None)
    if key is None:
        return None
    count, per_token = _positive(values, key, name), _positive(values, "num_experts_per_tok", name)
    if per_token > count:
        raise ConfigError(f"{name}: num_experts_per_tok", per_token, f"must be at most {key}={count}", "Correct it.")
    width = "moe_intermediate_size" if "moe_intermediate_size" in values else "intermediate_size"
    intermediate = _positive(values, width, name)
    shared = _optional(values, "shared_expert_intermediate_size", name)
    shared = shared or _optional(values, "n_shared_experts", name) * intermediate
    only = values.get("mlp_only_layers") or []
    if not isinstance(only, list):
        raise ConfigError(f"{name}: mlp_only_layers", only, "must be a list of layers", "Correct the model config.")
    period = _optional(values, "decoder_sparse_step", name) or 1
    begins = _optional(values, "first_k_dense_replace", name)
    sparse = sum(layer not in only and (layer + 1) % period == 0 for layer in range(begins, layers))
    return Experts(count, per_token, intermediate, shared, sparse) if sparse else None


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


def _optional(values: Mapping[str, Any], key: str, name: str) -> int:
    return _positive(values, key, name) if values.get(key) else 0


def _positive(values: Mapping[str, Any], key: str, name: str) -> int:
    if key not in values:
        raise DataError(f"{name}: {key}: is missing. Give a Hugging Face config.json of a decoder.")
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}: {key}", value, "must be an integer >= 1", "Correct the model config.")
    return value
