"""Inter-stage fusion: how many freed GPUs begin the forward-only phases on finished samples while the tail runs.

The phases are those of the recipe: old log-prob, reference, critic and model reward. Samples go in the order in which
they finished.

RLHFuse (arXiv 2409.13221, section 4) fuses whenever GPUs are free. Differs from the paper: with elastic leases a
freed GPU has a price, so GPUs fuse only when the shorter step is worth more than loading the models on them.
"""

from __future__ import annotations

from verl_rlhfless.policy.snapshot import FINISHED, PoolSnapshot, RolloutView


def fuse_gpus(view: RolloutView, remaining_s: float, price: float, is_leased: bool) -> int:
    """Return how many free GPUs should begin inference now; 0 = they are worth more given back.

    Args:
        view: The rollout.
        remaining_s: Predicted seconds until the last sample finishes.
        price: GPU-seconds that one second of the step is worth.
        is_leased: Whether the GPUs are paid for anyway (static arms).
    """
    pool = view.pool
    if view.free_gpus < 1 or view.fuse_tokens < 1 or not fits(pool):
        return 0
    finished = int((view.state == FINISHED).sum())
    rate = pool.trainer.fuse_tokens_per_s(view.fuse_tokens / max(finished, 1))
    times = pool.trainer.times
    start_s = pool.trainer.fuse_load_s + (times.hybrid_sleep_s if is_leased else times.wake_s + times.grant_s)
    untaken = view.fuse_tokens - rate * view.fusing_gpus * max(0.0, remaining_s)
    best, best_gain = 0, 0.0
    for count in sorted({1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, view.free_gpus}):
        if count > view.free_gpus:
            break
        tokens = min(max(0.0, untaken), rate * count * max(0.0, remaining_s - start_s))
        saved_s = tokens / (rate * pool.trainer.num_gpus)
        paid = 0.0 if is_leased else start_s * count
        gain = price * saved_s - paid
        if gain > best_gain + 1e-9:
            best, best_gain = count, gain
    return best


def fits(pool: PoolSnapshot) -> bool:
    """Return whether one GPU holds the weights of every forward-only model, which fused inference needs."""
    return pool.trainer.fuse_bytes < 0.8 * pool.trainer.gpu.memory_bytes
