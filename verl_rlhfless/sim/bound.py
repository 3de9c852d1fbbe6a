"""Analytic lower bounds on the time and the cost of a step that no fleet on this cluster can beat.

Time: the longest response alone on the fastest replica, then the phases with all forward-only work hidden. Cost:
every weight read is shared by as many samples as an engine can run, KV reads and trainer phases are paid, nothing
waits and nothing starts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from verl_rlhfless.policy.snapshot import PoolSnapshot
from verl_rlhfless.sim.run import StepData


@dataclass(frozen=True, slots=True)
class Bound:
    """Seconds and GPU-seconds of one step."""

    step_s: float
    gpu_s: float


def step_bound(pool: PoolSnapshot, step: StepData) -> Bound:
    """Return the lower bounds of a step."""
    longest = int(np.argmax(step.lengths))
    tokens = int(step.batch.prompt_tokens.sum() + step.lengths.sum())
    context = tokens / step.batch.num_samples
    update_s = pool.trainer.update_s(tokens, context)
    prompt, length = int(step.batch.prompt_tokens[longest]), int(step.lengths[longest])
    alone = min(perf.decode_s(1, prompt, length - 1) for perf in pool.perf.values())
    rollout = min(_least_gpu_s(pool, step, tp) for tp in pool.perf)
    fused = tokens / pool.trainer.fuse_tokens_per_s(context)
    on_trainer = pool.trainer.inference_s(tokens, context) * pool.trainer.num_gpus
    inference_g = min(fused, on_trainer)
    return Bound(alone + update_s, rollout + inference_g + update_s * pool.trainer.num_gpus)


def _least_gpu_s(pool: PoolSnapshot, step: StepData, tp: int) -> float:
    """Return the least GPU-seconds of decoding on replicas of one size.

    Whole batches for weights, each context read once a token.
    """
    perf = pool.perf[tp]
    lengths = step.lengths.astype(float) - 1
    kv_reads = (lengths * step.batch.prompt_tokens + lengths * lengths / 2).sum()
    full = perf.limits.max_num_seqs
    weights_s = (perf.iteration_s(full, 0)) / full
    return float(tp * (lengths.sum() * weights_s + kv_reads * perf.kv_s_per_token))
