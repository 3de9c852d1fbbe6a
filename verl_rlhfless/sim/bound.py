"""Analytic lower bounds on the time and the cost of a step that no fleet on this cluster can beat.

Time: the longest response alone, each token on the replica that is fastest for it, then the update, with all
forward-only work hidden. Cost: contexts are read once a token, weights are shared by as many samples as fit into the
KV cache, where samples with a common prompt hold it once, nothing waits and nothing starts. With a time limit a sample
of ``L`` tokens also needs iterations that are short on average, so fewer samples share each of them: that is the least
cost of a step that must not be slower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from verl_rlhfless.policy.dedup import batch_prefixes
from verl_rlhfless.policy.perf import BLOCK_TOKENS
from verl_rlhfless.policy.shapes import ModelShape
from verl_rlhfless.policy.snapshot import Batch, FloatArray, IntArray, PoolSnapshot
from verl_rlhfless.sim.workload import StepData

_NUM_DEPTHS = 8
"""Parts of a response; what a sample holds is taken from the beginning of each."""

_NUM_MULTIPLIERS = 16
"""Multipliers of the time limit that are tried, besides 0: each gives a lower bound, the largest one counts."""


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
    decoded = _decoded(step)
    alone_s = _alone_s(pool, int(step.batch.prompt_tokens[longest]), float(decoded[longest]))
    # Samples that end early are inferred apart, at their own mean context, the rest at that of the whole batch: at
    # best 3/4 of it in all, as x tokens in a share of f samples attend to x^2 / f + 1 - x >= 1 - f / 4 as much.
    inference = tokens / pool.trainer.fuse_tokens_per_s(0.75 * context)
    rollout = max(_rollout_gpu_s(pool, step, limit_s - update_s), min(_full_gpu_s(pool, step, tp) for tp in pool.perf))
    return Bound(alone_s + update_s, rollout + inference + update_s * pool.trainer.num_gpus)


def _decoded(step: StepData) -> FloatArray:
    """Return the tokens that each sample decodes: all but the first of every turn, which its prefill yields, [B]."""
    num_turns = np.ones(len(step.lengths))
    for sample, ends in step.turn_ends.items():
        num_turns[sample] = len(ends)
    return step.lengths - num_turns


def _alone_s(pool: PoolSnapshot, prompt: int, decoded: float) -> float:
    """Return the least seconds of decoding a sample, whatever replicas it visits.

    The least iteration over all sizes is concave in the context, so it is nowhere below the chord between its ends.
    """
    ends = (prompt, prompt + max(decoded - 1, 0))
    first_s, last_s = (min(perf.decode_s(1, context, 1) for perf in pool.perf.values()) for context in ends)
    return decoded * (first_s + last_s) / 2


def _held_prompt(batch: Batch) -> FloatArray:
    """Return each sample's part of the prompt tokens that the batch holds when every common span is held once, [B]."""
    prefixes = batch_prefixes(batch)
    chains = [prefixes.tree.chain(group) for group in range(len(batch.prompt_ids))]
    sharers = np.zeros(len(prefixes.node_tokens))
    for chain, size in zip(chains, np.bincount(batch.group_of), strict=True):
        sharers[chain] += size
    part = np.array(prefixes.node_tokens) / np.maximum(sharers, 1)
    return np.array([part[chain].sum() for chain in chains])[batch.group_of]


def _reads(shape: ModelShape, prompts: IntArray, lengths: FloatArray) -> FloatArray:
    """Return the tokens of context, at least, that each sample reads over all of its iterations, [B]."""
    reads: FloatArray = lengths * prompts + lengths * lengths / 2
    if shape.window:  # a sum of convex terms is at most their integral from half before to half behind
        behind = [np.maximum(prompts + end + 0.5 - shape.window.tokens, 0.0) for end in (0.0, lengths)]
        reads -= shape.window_share * (behind[1] ** 2 - behind[0] ** 2) / 2
    return reads


def _rollout_gpu_s(pool: PoolSnapshot, step: StepData, limit_s: float) -> float:
    """Return the least GPU-seconds of decoding when every sample must end within ``limit_s``.

    An iteration of ``w + k * (sum of contexts)`` seconds on ``tp`` GPUs costs a sample with context ``c`` at least
    ``tp * k * c``, and of ``tp * w`` the share ``h / sum`` of the tokens ``h`` that it holds: its part of a common
    prompt, and what it has generated. With ``x = k * sum``, bounded by the KV cache, a token takes at least ``w + x``
    seconds, as ``h <= c``, and costs ``tp * w * k * h / x`` beside its own read. For any multiplier ``y >= 0`` the
    sum over tokens of ``min over (tp, x) of cost + y * (w + x)``, less ``y * limit_s``, is a lower bound (weak
    duality), whatever replicas the sample visits.
    """
    lengths, shape = _decoded(step), pool.trainer.shape
    parts = lengths[:, None] * np.arange(_NUM_DEPTHS) / _NUM_DEPTHS
    held = shape.attended(_held_prompt(step.batch)[:, None] + 1 + parts)  # at least, in each part of the response
    reads = _reads(shape, step.batch.prompt_tokens, lengths)
    least_read = min(tp * perf.kv_s_per_token for tp, perf in pool.perf.items())
    best: FloatArray = np.zeros(len(lengths))
    scale = pool.num_gpus if math.isfinite(limit_s) else 0
    for multiplier in scale * np.concatenate(([0.0], np.geomspace(1e-3, 1e2, _NUM_MULTIPLIERS))):
        token = np.full_like(held, np.inf)
        for tp, perf in pool.perf.items():
            weights_s, read_s = perf.iteration_s(1, 0), perf.kv_s_per_token
            most = read_s * perf.kv_blocks * BLOCK_TOKENS
            work = tp * weights_s * read_s * held
            x = np.minimum(np.sqrt(work / multiplier), most) if multiplier else most
            token = np.minimum(token, work / x + multiplier * (weights_s + x))
        value = token.mean(axis=1) * lengths - (multiplier * limit_s if multiplier else 0.0)
        best = np.maximum(best, value)
    return float((best + least_read * reads).sum())


def _full_gpu_s(pool: PoolSnapshot, step: StepData, tp: int) -> float:
    """Return the GPU-seconds of decoding on replicas of one size whose every iteration is as full as vLLM allows."""
    perf = pool.perf[tp]
    lengths = _decoded(step)
    reads = _reads(perf.shape, step.batch.prompt_tokens, lengths).sum()
    full = perf.limits.max_num_seqs
    return float(tp * (lengths.sum() * perf.iteration_s(full, 0) / full + reads * perf.kv_s_per_token))
