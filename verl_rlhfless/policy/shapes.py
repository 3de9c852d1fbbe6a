"""Model shapes from a Hugging Face ``config.json``, and the tensor-parallel sizes that vLLM accepts for them.

Invariant: a shape is of a bfloat16 decoder, dense or with experts; what the performance model needs follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from verl_rlhfless.errors import ConfigError
from verl_rlhfless.policy.layer_config import (
    DEFAULTS,
    layer_kinds,
    parse_experts,
    parse_latent,
    parse_recurrent,
    parse_vision,
    parse_window,
    positive,
)
from verl_rlhfless.policy.layers import BYTES_PER_PARAM, Experts, Latent, Recurrent, Vision, Window


@dataclass(frozen=True)
class ModelShape:
    """The sizes of one decoder-only transformer.

    Attributes:
        layers: Those that mix tokens, each of them with or without channels behind it.
        kv_heads: 1 of latent attention, in whose cache all heads read the same.
        head_dim: Of latent attention the width of what is cached.
        dense: Layers whose channels are dense; ``None`` = all that have no experts.
        matrices: Of an expert or of dense channels: gate, up and down, or the last two.
        has_query_gate: Whether queries are projected together with a gate of the same width.
        experts: ``None`` where all of its layers are dense.
        latent: ``None`` where keys and values are cached.
        window: ``None`` where all attention is full.
        recurrent: Layers with a state instead of attention, or beside it; ``None`` without.
        attention: Layers with attention; ``None`` = all.
        vision: ``None`` where it does not see.
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
    vision: Vision | None = None
    latent: Latent | None = None
    window: Window | None = None
    recurrent: Recurrent | None = None
    attention: int | None = None
    dense: int | None = None
    matrices: int = 3
    has_query_gate: bool = False

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
        stored += self.vision.params if self.vision else 0
        return stored + (0 if self.is_tied else self.vocab * self.hidden)

    @cached_property
    def _dense_params(self) -> int:
        """Parameters that every token multiplies with: attention, states, dense and shared layers, routers, output."""
        widths, routers = self._dense_layers * self.intermediate, 0
        if self.experts:
            widths += self.experts.layers * self.experts.shared
            routers = self.experts.layers * self.experts.count * self.hidden
        recurrent = self.recurrent.layers * self.recurrent.params if self.recurrent else 0
        channels = self.matrices * self.hidden * widths
        return self._attention_params + recurrent + channels + routers + self.vocab * self.hidden

    @property
    def _attention_params(self) -> int:
        if self.latent:
            return self._attention_layers * self.latent.params(self.hidden, self.heads)
        queries = (2 + int(self.has_query_gate)) * self.heads
        return self._attention_layers * self.hidden * self.head_dim * (queries + 2 * self.kv_heads)

    @cached_property
    def replicated_params(self) -> int:
        """Parameters that every GPU of a replica has whole, of latent attention."""
        return self._attention_layers * self.latent.replicated(self.hidden) if self.latent else 0

    @property
    def _attention_layers(self) -> int:
        return self.layers if self.attention is None else self.attention

    @property
    def _dense_layers(self) -> int:
        if self.dense is not None:
            return self.dense
        return self.layers - (self.experts.layers if self.experts else 0)

    def _expert_params(self, each: float) -> Any:
        """Return the parameters of ``each`` routed experts of every layer; an ``int`` of whole ones."""
        assert self.experts is not None
        return self.experts.layers * each * self.matrices * self.hidden * self.experts.intermediate

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of one bfloat16 copy of the weights."""
        return self.params * BYTES_PER_PARAM

    @cached_property
    def kv_bytes_per_token(self) -> int:
        """Bytes of cache for one token over all layers that have attention to it, without replication."""
        vectors = 1 if self.latent else 2  # a latent, or a key and a value
        return vectors * self._attention_layers * self.kv_heads * self.head_dim * BYTES_PER_PARAM

    @cached_property
    def state_bytes(self) -> int:
        """Bytes that one sequence has whatever its length, over all layers."""
        return self.recurrent.layers * self.recurrent.state_bytes if self.recurrent else 0

    @cached_property
    def window_share(self) -> float:
        """Share of ``kv_bytes_per_token`` that only the last tokens of a window have."""
        return self.window.layers / self._attention_layers if self.window else 0.0

    def attended(self, context: Any) -> Any:
        """Return the tokens, of all layers, that are as many bytes of cache as ``context`` tokens of a sequence are.

        Args:
            context: A number, or an array of any shape.
        """
        if self.window is None:
            return context
        return context - self.window_share * np.maximum(context - self.window.tokens, 0.0)

    @cached_property
    def attention_flops(self) -> int:
        """FLOPs of one token for each token that it attends to in prefill; in windows at most."""
        each = self.latent.attended_flops if self.latent else 4 * self.head_dim
        return self._attention_layers * self.heads * each

    def kv_shards(self, tp: int) -> int:
        """GPUs among which the KV heads are split; beyond their number vLLM replicates them."""
        return min(tp, self.kv_heads)

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths, in channels, of the layers that are split among GPUs."""
        dense = (self.intermediate,) if self._dense_layers else ()
        if self.experts is None:
            return dense
        shared = (self.experts.shared,) if self.experts.shared else ()
        return (*dense, self.experts.intermediate, *shared)

    @property
    def state_heads(self) -> tuple[int, ...]:
        """Heads of the layers with a state, which are split too."""
        return self.recurrent.heads if self.recurrent else ()

    @property
    def seeing(self) -> tuple[int, ...]:
        """Heads and width of the encoder that sees, which are split too."""
        return self.vision.split if self.vision else ()

    def legal_tp(self, gpus_per_node: int) -> tuple[int, ...]:
        """Return the tensor-parallel sizes that vLLM accepts and that fill a node, smallest first."""
        return tuple(tp for tp in self.split_sizes(gpus_per_node) if gpus_per_node % tp == 0)

    def split_sizes(self, num_gpus: int) -> tuple[int, ...]:
        """Return the tensor-parallel sizes up to ``num_gpus`` that vLLM accepts, smallest first."""
        return tuple(
            tp
            for tp in range(1, num_gpus + 1)
            if all(each % tp == 0 for each in (self.heads, *self.state_heads, *self.widths, *self.seeing))
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
        ConfigError: A key is not a positive integer, or the attention is not the usual one.
        DataError: A key is missing.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(name, type(values).__name__, "must be a JSON object", "Give the model's config.json.")
    text = values.get("text_config")  # of a model that sees too, the part that generates
    decoder = text if isinstance(text, Mapping) else values
    decoder = {**DEFAULTS.get(decoder.get("model_type", ""), {}), **decoder}
    tied = values.get("tie_word_embeddings", decoder.get("tie_word_embeddings"))
    if not isinstance(tied, bool | None):
        raise ConfigError(f"{name}: tie_word_embeddings", tied, "must be true or false", "Correct it.")
    kinds = layer_kinds(decoder, name)
    latent, experts = parse_latent(decoder, name), parse_experts(decoder, kinds, name)
    recurrent = parse_recurrent(decoder, kinds, name)
    hidden, heads, kv_heads, head_dim = _attention(decoder, latent, name)
    attention = _attention_layers(decoder, kinds, recurrent, name)
    dense = kinds.count("mlp") if {"mlp", "moe"} & set(kinds) else None  # layers of their own
    return ModelShape(
        name=name,
        hidden=hidden,
        layers=len(kinds) - kinds.count("mlp") - kinds.count("moe"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=_intermediate(decoder, experts, name),
        vocab=positive(decoder, "vocab_size", name),
        is_tied=bool(tied),
        experts=experts,
        vision=parse_vision(values, name),
        latent=latent,
        window=parse_window(decoder, kinds, name),
        recurrent=recurrent,
        attention=attention,
        dense=dense,
        matrices=2 if "relu2" in (decoder.get("hidden_act"), decoder.get("mlp_hidden_act")) else 3,
        has_query_gate=bool(decoder.get("attn_output_gate", "linear_num_value_heads" in decoder)),
    )


def _attention_layers(
    values: Mapping[str, Any], kinds: list[str], recurrent: Recurrent | None, name: str
) -> int | None:
    """Return how many layers have attention; ``None`` where none has a state instead."""
    if recurrent is None or "mamba_d_ssm" in values:
        return None
    layers = len(kinds) - recurrent.layers - kinds.count("mlp") - kinds.count("moe")
    if layers < 1:
        rule = "must have a layer with attention: a cache without keys and values is not modelled"
        raise ConfigError(f"{name}: layer_types", sorted(set(kinds)), rule, "Use a model with attention.")
    return layers


def _intermediate(values: Mapping[str, Any], experts: Experts | None, name: str) -> int:
    """Return the width of dense channels; of experts where the file says none."""
    if experts and not values.get("intermediate_size"):
        return experts.intermediate
    keys = ["intermediate_size_mlp"] if experts else ["shared_intermediate_size"]
    return positive(values, next((key for key in keys if values.get(key)), "intermediate_size"), name)


def _attention(values: Mapping[str, Any], latent: Latent | None, name: str) -> tuple[int, int, int, int]:
    """Return hidden size, heads, KV heads (as many as heads if not given) and the size of a head."""
    heads = positive(values, "num_attention_heads", name)
    hidden = positive(values, "hidden_size", name)
    if latent:
        return hidden, heads, 1, latent.cached
    kv_heads = positive(values, "num_key_value_heads", name) if "num_key_value_heads" in values else heads
    if heads % kv_heads:
        raise ConfigError(
            f"{name}: num_key_value_heads", kv_heads, f"must divide num_attention_heads={heads}", "Correct it."
        )
    if values.get("head_dim") is None and hidden % heads:
        raise ConfigError(
            f"{name}: hidden_size", hidden, f"must be a multiple of num_attention_heads={heads}", "Or give head_dim."
        )
    head_dim = positive(values, "head_dim", name) if values.get("head_dim") is not None else hidden // heads
    return hidden, heads, kv_heads, head_dim
