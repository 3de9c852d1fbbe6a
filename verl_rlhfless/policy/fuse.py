"""Inter-stage fusion: which GPUs begin the forward-only phases on finished samples while the tail runs, and when.

The phases are those of the recipe: old log-prob, reference, critic and model reward. Samples go in the order in which
they finished.

RLHFuse (arXiv 2409.13221, section 4) fuses whenever GPUs are free. Differs from the paper: with elastic leases a
freed GPU has a price, so GPUs fuse only when the shorter step is worth more than loading the models on them
(``fuse_gpus``). The trainer's own GPUs hold the models and are paid for: they take chunk after chunk (``next_chunk``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from verl_rlhfless.policy.snapshot import IntArray, PoolSnapshot, RolloutView

CHUNK_TOKENS = 4096
"""Tokens that a freed GPU takes at once: enough to be bound by compute, and little is lost when the rollout ends."""

_NUM_GPUS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Numbers of GPUs that are priced, besides all of them."""

_WEIGHTS_SHARE = 0.8
"""Most of a GPU's memory that weights may take: activations need the rest."""


def fuse_gpus(view: RolloutView, remaining_s: float, price: float, is_leased: bool) -> int:
    """Return how many fusible GPUs should begin inference now; 0 = they are worth more given back.

    What they infer until the rollout ends, the trainer need not: that shortens the step. Against it stand the
    GPU-seconds in which they only start. Inference itself costs the same on either.

    Args:
        view: The rollout.
        remaining_s: Predicted seconds until the last sample finishes.
        price: GPU-seconds that one second of the step is worth.
        is_leased: Whether the GPUs are paid for anyway: all of them begin while the models can still be loaded.
    """
    pool = view.pool
    if view.fusible_gpus < 1 or view.fuse_tokens < 1 or not fits(pool):
        return 0
    rate = pool.trainer.fuse_tokens_per_s(view.fuse_tokens / view.fuse_samples)
    load_s, times = pool.trainer.fuse_load_s, pool.trainer.times
    if is_leased:
        return view.fusible_gpus if remaining_s > load_s + times.hybrid_sleep_s else 0
    start_s = load_s + times.wake_s + times.grant_s
    untaken = view.fuse_tokens - rate * view.fusing_gpus * max(0.0, remaining_s)
    best, best_gain = 0, 0.0
    for count in sorted({*_NUM_GPUS, view.fusible_gpus}):
        if count > view.fusible_gpus:
            break
        tokens = min(max(0.0, untaken), rate * count * max(0.0, remaining_s - start_s))
        saved_s = tokens / (rate * pool.trainer.num_gpus)
        gain = price * saved_s - start_s * count
        if gain > best_gain + 1e-9:
            best, best_gain = count, gain
    return best


def fits(pool: PoolSnapshot) -> bool:
    """Return whether one GPU holds the weights of every forward-only model, which fused inference needs."""
    return pool.trainer.fuse_bytes < _WEIGHTS_SHARE * pool.trainer.gpu.memory_bytes


@dataclass(frozen=True, slots=True)
class CallCost:
    """What an inference call takes: ``call_s`` whatever its size, and ``token_s`` for each token [s]."""

    call_s: float
    token_s: float

    def __add__(self, other: CallCost) -> CallCost:
        return CallCost(self.call_s + other.call_s, self.token_s + other.token_s)


def fit_cost(calls: Sequence[tuple[int, float]]) -> CallCost:
    """Return the cost that fits measured calls ``(tokens, seconds)`` best (least squares), neither part negative.

    Where the calls don't tell the parts apart (one size, a first call slower than larger ones) all is taken to be for
    tokens: a chunk too many costs less than none at all.
    """
    tokens, seconds = np.array(calls, dtype=np.float64).T
    spread = tokens - tokens.mean()
    token_s = float(spread @ seconds / (spread @ spread)) if spread.any() else 0.0
    call_s = float(seconds.mean() - token_s * tokens.mean())
    if token_s <= 0 or call_s < 0:
        return CallCost(0.0, float(seconds.sum() / tokens.sum()))
    return CallCost(call_s, token_s)


def next_chunk(tokens: IntArray, quantum: int, cost: CallCost | None, remaining_s: float) -> int:
    """Return how many of the finished samples, from the first on, the trainer infers now; 0 = none for now.

    A chunk that ends before the rollout is free. One that ends later delays the step by work that would follow anyway,
    so all that it costs is one call more: it starts if more than that is done by the end of the rollout.

    Args:
        tokens: [S] tokens of the finished samples that were not taken yet, in the order in which they finished.
        quantum: The number of samples must be a multiple of this.
        cost: Of a chunk in all phases; ``None`` = not measured yet, and the smallest chunk measures it.
        remaining_s: Predicted seconds until the rollout ends.
    """
    ready = len(tokens) // quantum * quantum
    if not ready or remaining_s <= 0:
        return 0
    if cost is None:
        return quantum
    chunk_s = cost.call_s + cost.token_s * np.cumsum(tokens)[quantum - 1 : ready : quantum]
    at = max(0, int((chunk_s <= remaining_s).sum()) - 1)
    is_worth_it = min(float(chunk_s[at]), remaining_s) > cost.call_s
    return (at + 1) * quantum if is_worth_it else 0
