"""Analytic lower bounds on the time and the cost of a step that no fleet on this cluster can beat.

Time: the longest response alone on the fastest replica, then the update, with all forward-only work hidden. Cost:
contexts are read once a token, weights are shared by as many samples as fit into the KV cache, nothing waits and
nothing starts. With a time limit a sample of ``L`` tokens also needs iterations that are short on average, so fewer
samples share each of them: that is the least cost of a step that must not be slower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from verl_rlhfless.policy.perf import BLOCK_TOKENS
from verl_rlhfless.policy.snapshot import FloatArray, PoolSnapshot
from verl_rlhfless.sim.workload import StepData

_NUM_DEPTHS = 8
_NUM_MULTIPLIERS = 16


@dataclass(frozen=True, slots=True)
class Bound:
    """Seconds and GPU-seconds of one step."""

    step_s: float
    gpu_s: float


def step_bound(pool: PoolSnapshot, step: StepData, limit_s: float = math.inf) -> Bound:
    """Return the lower bounds of a step; the cost is that of a step of at most ``limit_s`` seconds."""
    longest = int(np.argmax(step.lengths))
    tokens = int(step.batch.prompt_tokens.sum() + step.lengths.sum())
    context = tokens / step.batch.num_samples
    update_s = pool.trainer.update_s(tokens, context)
    prompt, length = int(step.batch.prompt_tokens[longest]), int(step.lengths[longest])
    alone = min(perf.decode_s(1, prompt, length - 1) for perf in pool.perf.values())
    fused = tokens / pool.trainer.fuse_tokens_per_s(context)
    on_trainer = pool.trainer.inference_s(tokens, context) * pool.trainer.num_gpus
    rollout = max(_rollout_gpu_s(pool, step, limit_s - update_s), min(_full_gpu_s(pool, step, tp) for tp in pool.perf))
    return Bound(alone + update_s, rollout + min(fused, on_trainer) + update_s * pool.trainer.num_gpus)


def _rollout_gpu_s(pool: PoolSnapshot, step: StepData, limit_s: float) -> float:
    """Return the least GPU-seconds of decoding when every sample must end within ``limit_s``.

    An iteration of ``w + k * (sum of contexts)`` seconds on ``tp`` GPUs costs a sample with context ``c`` at least
    ``tp * k * c``, and of ``tp * w`` the share ``c / sum``. With ``x = k * sum``, bounded by the KV cache, a token
    takes ``w + x`` seconds and costs ``tp * w * k * c / x`` beside its own read. For any multiplier ``y >= 0`` the
    sum over tokens of ``min over (tp, x) of cost + y * (w + x)``, less ``y * limit_s``, is a lower bound (weak
    duality), whatever replicas the sample visits.
    """
    lengths = step.lengths.astype(float) - 1
    prompts = step.batch.prompt_tokens.astype(float)
    begin = prompts[:, None] + lengths[:, None] * np.arange(_NUM_DEPTHS) / _NUM_DEPTHS  # least context of each part
    reads = lengths * prompts + lengths * lengths / 2
    least_read = min(tp * perf.kv_s_per_token for tp, perf in pool.perf.items())
    best: FloatArray = np.zeros(len(lengths))
    scale = pool.num_gpus if math.isfinite(limit_s) else 0
    for multiplier in scale * np.concatenate(([0.0], np.geomspace(1e-3, 1e2, _NUM_MULTIPLIERS))):
        token = np.full_like(begin, np.inf)
        for tp, perf in pool.perf.items():
            weights_s, read_s = perf.iteration_s(1, 0), perf.kv_s_per_token
            most = read_s * perf.kv_blocks * BLOCK_TOKENS
            work = tp * weights_s * read_s * begin
            x = np.minimum(np.sqrt(work / multiplier), most) if multiplier else most
            token = np.minimum(token, work / x + multiplier * (weights_s + x))
        value = token.mean(axis=1) * lengths - (multiplier * limit_s if multiplier else 0.0)
        best = np.maximum(best, value)
    return float((best + least_read * reads).sum())


def _full_gpu_s(pool: PoolSnapshot, step: StepData, tp: int) -> float:
    """Return the GPU-seconds of decoding on replicas of one size whose every iteration is as full as vLLM allows."""
    perf = pool.perf[tp]
    lengths = step.lengths.astype(float) - 1
    reads = (lengths * step.batch.prompt_tokens + lengths * lengths / 2).sum()
    full = perf.limits.max_num_seqs
    return float(tp * (lengths.sum() * perf.iteration_s(full, 0) / full + reads * perf.kv_s_per_token))
