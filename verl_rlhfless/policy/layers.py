"""Kinds of layers beside plain attention and dense channels: what each stores, computes and keeps of a sequence.

Invariant: pure arithmetic on sizes that ``layer_config`` has checked.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2): the cache has one latent vector a token and layer, whole on every GPU.

    Attributes:
        kv_rank: Width of the latent that keys and values are projected from.
        q_rank: The same of queries; 0 = they are projected at once.
        nope: Width of a head's queries and keys without positions.
        rope: Width of those with positions, common to all heads' keys.
        value: Width of a head's values.
    """

    kv_rank: int
    q_rank: int
    nope: int
    rope: int
    value: int

    @property
    def cached(self) -> int:
        """Elements of the cache for one token."""
        return self.kv_rank + self.rope

    def params(self, hidden: int, heads: int) -> int:
        """Return the parameters of a layer's projections."""
        width = heads * (self.nope + self.rope)
        queries = self.q_rank * (hidden + width) if self.q_rank else hidden * width
        return (
            queries + self.kv_rank * heads * (self.nope + self.value) + self._down(hidden) + heads * self.value * hidden
        )

    def replicated(self, hidden: int) -> int:
        """Return the parameters of a layer that vLLM keeps whole on every GPU: projections down to the latents."""
        return self._down(hidden) + hidden * self.q_rank

    def _down(self, hidden: int) -> int:
        return hidden * self.cached

    @property
    def attended_flops(self) -> int:
        """FLOPs of a head in prefill for each token that it attends to: keys and values are projected up first."""
        return 2 * (self.nope + self.rope + self.value)


@dataclass(frozen=True, slots=True)
class Window:
    """Layers that attend to the last tokens alone.

    Attributes:
        tokens: How many.
        layers: Layers that do so.
    """

    tokens: int
    layers: int


@dataclass(frozen=True, slots=True)
class Recurrent:
    """Layers with a state instead of keys and values: gated delta nets and Mamba-2.

    Attributes:
        layers: How many there are.
        params: Parameters of each.
        state_bytes: State of one sequence in each.
        heads: Numbers that a tensor-parallel size must divide.
    """

    layers: int
    params: int
    state_bytes: int
    heads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Vision:
    """The encoder that sees beside a decoder; vLLM splits it among the same GPUs.

    Attributes:
        split: Heads and width, those that its configuration names.
        params: Parameters of its layers; 0 where their sizes are not known.
    """

    split: tuple[int, ...]
    params: int
