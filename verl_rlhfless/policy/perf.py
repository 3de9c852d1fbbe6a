"""Seconds of everything a rollout replica does, by (model shape, GPU type, tensor-parallel size).

One iteration of vLLM's continuous batching is ``overhead + max(weights / bandwidth, compute) + KV reads +
all-reduces``. With a fixed batch a decode iteration is affine in the summed context, so ``k`` iterations have a
closed form (``decode_s``): the event-compressed simulator and the planner both rest on it. Where layers attend to a
window, it is affine on either side of the one at which the mean context leaves it: of a batch whose contexts lie on
both sides, reads and memory are too high, never too low. Prefill attends to the whole context in every layer.

Invariants: no figure is negative; more tokens, a longer context or a larger batch never take less time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from verl_rlhfless.errors import ConfigError
from verl_rlhfless.policy.gpus import GpuType
from verl_rlhfless.policy.layers import BYTES_PER_PARAM
from verl_rlhfless.policy.shapes import ModelShape

BLOCK_TOKENS = 16
"""vLLM's default KV block."""

_LEAST_KEPT = 1e-6
"""Share of a block behind the windows that is counted at least, where every layer has a window."""


@dataclass(frozen=True, slots=True)
class Efficiencies:
    """The few figures that data sheets do not give; ``calibrate`` fits the first four.

    Attributes:
        hbm: Share of peak memory bandwidth that decoding reaches.
        prefill: Share of peak FLOP/s in prefill.
        launch_s: Fixed seconds of one engine iteration (scheduling, graph launch, sampling).
        per_seq_s: Seconds per running request and iteration (sampling, detokenising).
        peer: Share of the peer link that a large all-reduce reaches.
        host: Share of PCIe that a copy from host memory reaches.
        allreduce_s: Latency of one small all-reduce between two GPUs, (NVLink, PCIe).
        allreduce_hop_s: Added latency for each further GPU, (NVLink, PCIe).
        transfer_s: Set-up of one transfer of keys and values between two replicas.
    """

    hbm: float = 0.80
    prefill: float = 0.55
    launch_s: float = 1.5e-3
    per_seq_s: float = 6e-6
    peer: float = 0.70
    host: float = 0.65
    allreduce_s: tuple[float, float] = (8e-6, 20e-6)
    allreduce_hop_s: tuple[float, float] = (0.5e-6, 8e-6)
    transfer_s: float = 5e-3


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """vLLM's own limits with verl's default values, the same in every arm.

    Attributes:
        max_num_seqs: Most running requests.
        max_batched_tokens: Token budget of one iteration (chunked prefill).
        memory_utilization: Share of device memory that the engine may use.
        reserve_bytes: Activations, CUDA graphs and context on each GPU.
    """

    max_num_seqs: int = 1024
    max_batched_tokens: int = 8192
    memory_utilization: float = 0.85
    reserve_bytes: float = 2.5e9


@dataclass(frozen=True)
class EnginePerf:
    """The iteration times and the KV capacity of one replica."""

    shape: ModelShape
    gpu: GpuType
    tp: int
    efficiencies: Efficiencies = field(default_factory=Efficiencies)
    limits: EngineLimits = field(default_factory=EngineLimits)

    def __post_init__(self) -> None:
        if self.blocks_of(1) < 1:
            raise ConfigError(
                "model",
                self.shape.name,
                f"weights of {self.shape.weight_bytes / 1e9:.1f} GB over {self.tp} x {self.gpu.name} leave no KV cache",
                "Use a larger tensor-parallel size or GPU.",
            )

    def check_holds(self, context_tokens: int) -> None:
        """Refuse a sample that this replica can never finish, as vLLM does when it starts.

        Raises:
            ConfigError: Its keys and values exceed the cache.
        """
        held = self.blocks_of(1) * BLOCK_TOKENS
        if context_tokens > held:
            raise ConfigError(
                "model",
                self.shape.name,
                f"prompt and response of up to {context_tokens} tokens exceed the {held} "
                f"that the KV cache of {self.tp} x {self.gpu.name} holds",
                "Use a larger tensor-parallel size or GPU, or a trace with shorter responses.",
            )

    @cached_property
    def kv_blocks(self) -> int:
        """Blocks of 16 tokens, of all layers, that fit beside the weights (0 when the weights do not fit)."""
        usable = self.gpu.memory_bytes * self.limits.memory_utilization - self.limits.reserve_bytes
        free = usable - self._stored_params * BYTES_PER_PARAM / self.tp
        return max(0, int(free / (self._kv_bytes * BLOCK_TOKENS)))

    def blocks_of(self, requests: int) -> int:
        """Return the blocks of 16 tokens that so many requests may have together, whatever their layers keep of them.

        Blocks behind the windows are kept by the other layers alone; each request has a state.
        """
        shape, blocks = self.shape, self.kv_blocks
        if self._state_tokens:
            blocks = max(0, blocks - requests * math.ceil(self._state_tokens / BLOCK_TOKENS))
        if shape.window is None:
            return blocks
        inside = requests * (math.ceil(shape.window.tokens / BLOCK_TOKENS) + 1)  # it may begin inside a block
        kept = max(1 - shape.window_share, _LEAST_KEPT)
        return blocks if blocks <= inside else inside + int((blocks - inside) / kept)

    @property
    def _stored_params(self) -> int:
        """Parameters on all GPUs of the replica."""
        return self.shape.params + (self.tp - 1) * self.shape.replicated_params

    @cached_property
    def _kv_bytes(self) -> float:
        """Bytes of one token's keys and values on each GPU."""
        return self.shape.kv_bytes_per_token / self.shape.kv_shards(self.tp)

    @cached_property
    def _state_tokens(self) -> float:
        """Tokens that are as many bytes as what vLLM keeps for one request whatever its length.

        That is two states: prefix caching copies one at a block's end (its ``align`` mode).
        """
        return 2 * self.shape.state_bytes / self.tp / self._kv_bytes

    @cached_property
    def kv_s_per_token(self) -> float:
        """Seconds to read one token's keys and values in an iteration.

        Latents are read once for all heads, which attend to them in absorbed form (2,176 FLOPs a head of DeepSeek-V3).
        Up to some 50 heads a GPU that takes less time than reading; models with more need more GPUs.
        """
        return self._kv_bytes / (self.gpu.hbm_bytes_per_s * self.efficiencies.hbm)

    @cached_property
    def _window_s_per_token(self) -> float:
        """Seconds of ``kv_s_per_token`` that a token behind the window does not take."""
        return self.shape.window_share * self.kv_s_per_token

    @cached_property
    def _window_tokens(self) -> int:
        return self.shape.window.tokens if self.shape.window else 0

    @cached_property
    def _per_seq_s(self) -> float:
        """Seconds of each running request in an iteration; its state is read and written."""
        state_s = 2 * self.shape.state_bytes / self.tp / (self.gpu.hbm_bytes_per_s * self.efficiencies.hbm)
        return self.efficiencies.per_seq_s + state_s

    def _weights_s(self, tokens: int) -> float:
        copies = (self.tp - 1) * self.shape.replicated_params
        read = (self.shape.read_params(tokens) + copies) * BYTES_PER_PARAM / self.tp
        return read / (self.gpu.hbm_bytes_per_s * self.efficiencies.hbm)

    @cached_property
    def _compute_s_per_token(self) -> float:
        return 2 * self.shape.matmul_params / (self.tp * self.gpu.flops * self.efficiencies.prefill)

    @cached_property
    def _batch_s(self) -> tuple[float, ...]:
        return tuple(self._matmul_s(b) + self._per_seq_s * b for b in range(self.limits.max_num_seqs + 1))

    @cached_property
    def _batch_table(self) -> NDArray[np.float64]:
        return np.array(self._batch_s)

    @cached_property
    def _batch_rise(self) -> NDArray[np.float64]:
        return np.diff(self._batch_table)

    def allreduce_s(self, tokens: int) -> float:
        """Return the seconds of all tensor-parallel all-reduces (two a layer) for ``tokens`` in one iteration."""
        if self.tp == 1:
            return 0.0
        link = 0 if self.gpu.has_nvlink else 1
        eff = self.efficiencies
        latency = eff.allreduce_s[link] + eff.allreduce_hop_s[link] * (self.tp - 2)
        sent = 2 * (self.tp - 1) / self.tp * tokens * self.shape.hidden * BYTES_PER_PARAM
        return 2 * self.shape.layers * (latency + sent / (self.gpu.peer_bytes_per_s * eff.peer))

    def _matmul_s(self, tokens: int) -> float:
        work = max(self._weights_s(tokens), tokens * self._compute_s_per_token)
        return self.efficiencies.launch_s + work + self.allreduce_s(tokens)

    def iteration_s(
        self, decodes: int, context_tokens: int, prefill_tokens: int = 0, prefill_context: int = 0
    ) -> float:
        """Return the seconds of one iteration.

        Args:
            decodes: Requests that decode one token each.
            context_tokens: Their summed context.
            prefill_tokens: Prompt tokens computed in the same iteration.
            prefill_context: Sum over the prefill tokens of the context each attends to.
        """
        read_s = context_tokens * self.kv_s_per_token
        if self._window_s_per_token:
            read_s -= max(0, context_tokens - decodes * self._window_tokens) * self._window_s_per_token
        if prefill_tokens == 0 and decodes < len(self._batch_s):
            return self._batch_s[decodes] + read_s
        base = self._matmul_s(decodes + prefill_tokens) + self._per_seq_s * decodes
        attention = self.shape.attention_flops * prefill_context
        return base + read_s + attention / (self.tp * self.gpu.flops * self.efficiencies.prefill)

    def fluid_iteration_s(self, batch: NDArray[np.float64], context: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the seconds in which each of ``batch`` requests (a mean, may be fractional) gets one more token.

        Where more requests than the engine can run at once share it, they take turns.

        Args:
            batch: Requests on the replica, any shape, >= 0.
            context: Their mean context in tokens, broadcastable.
        """
        read = self.shape.attended(context)
        held = read + self._state_tokens if self._state_tokens else read
        fits = np.minimum(self.limits.max_num_seqs, self.kv_blocks * BLOCK_TOKENS / np.maximum(held, 1.0))
        running = np.minimum(np.maximum(batch, 1.0), fits)
        low = np.minimum(running.astype(np.int64), len(self._batch_s) - 2)
        base = self._batch_table[low] + (running - low) * self._batch_rise[low]
        seconds: NDArray[np.float64] = (base + running * read * self.kv_s_per_token) * np.maximum(batch / running, 1.0)
        return seconds

    @cached_property
    def prefill_s_per_token(self) -> float:
        """Seconds per prompt token in a full prefill iteration."""
        return self._matmul_s(self.limits.max_batched_tokens) / self.limits.max_batched_tokens

    def decode_s(self, decodes: int, context_tokens: float, iterations: float) -> float:
        """Return the seconds of ``iterations`` decode iterations of an unchanged batch.

        Its summed context starts at ``context_tokens`` and grows by one token a request and iteration.
        """
        grown = decodes * iterations * (iterations - 1) / 2
        seconds = iterations * self._batch_s[decodes] + (iterations * context_tokens + grown) * self.kv_s_per_token
        return seconds - self._behind_s(decodes, context_tokens, iterations) if self._window_s_per_token else seconds

    def _behind_s(self, decodes: int, context_tokens: float, iterations: float) -> float:
        """Return the seconds of ``iterations`` that reading what is behind the windows would take."""
        inside = self._iterations_inside(decodes, context_tokens)
        if not decodes or iterations <= inside:
            return 0.0
        first, count = context_tokens + decodes * (inside - self._window_tokens), iterations - inside
        return (count * first + decodes * count * (count - 1) / 2) * self._window_s_per_token

    def _iterations_inside(self, decodes: int, context_tokens: float) -> int:
        """Return the iterations until the mean context leaves the windows."""
        return max(0, math.ceil(self._window_tokens - context_tokens / decodes)) if decodes else 0

    def iterations_within(self, decodes: int, context_tokens: float, seconds: float) -> int:
        """Return how many whole decode iterations end within ``seconds`` (the inverse of ``decode_s``)."""
        done, rise_s, read_s = 0, self.kv_s_per_token, context_tokens * self.kv_s_per_token
        if self._window_s_per_token:
            inside = self._iterations_inside(decodes, context_tokens)
            inside_s = self.decode_s(decodes, context_tokens, inside)
            if seconds >= inside_s:  # from there on iterations rise more slowly
                done, seconds, rise_s = inside, seconds - inside_s, rise_s - self._window_s_per_token
                read_s = decodes * self._window_tokens * self._window_s_per_token
                read_s += (context_tokens + decodes * inside) * rise_s
        a = decodes * rise_s / 2
        b = self._batch_s[decodes] + read_s - a
        k = (math.sqrt(b * b + 4 * a * max(seconds, 0.0)) - b) / (2 * a) if a > 0 else seconds / b
        return done + int(k + 1e-9)

    def transfer_s(self, tokens: float) -> float:
        """Return the seconds to copy the keys and values of ``tokens``, or what is kept of them, from another replica.

        Each GPU receives its own shard over the slower of its peer link and its share of the network.
        """
        shard = float(self.shape.attended(tokens)) * self._kv_bytes + self.shape.state_bytes / self.tp
        link = min(self.gpu.peer_bytes_per_s, self.gpu.network_bytes_per_s) * self.efficiencies.peer
        return self.efficiencies.transfer_s + shard / link

    def move_s(self, tokens: float, has_kv_transfer: bool) -> float:
        """Return the seconds that a cut sample of ``tokens`` (prompt and generated) takes of its new replica.

        Recomputing them or, where the pool can, copying their keys and values: whichever is less (PAT).
        """
        recompute_s = tokens * self.prefill_s_per_token
        return min(recompute_s, self.transfer_s(tokens)) if has_kv_transfer else recompute_s

    @property
    def load_s(self) -> float:
        """Seconds to copy one weight version from host memory into the replica."""
        return self._stored_params * BYTES_PER_PARAM / self.tp / (self.gpu.host_bytes_per_s * self.efficiencies.host)
