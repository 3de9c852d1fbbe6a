"""When the tail of a rollout on the trainer's GPUs goes to fewer replicas, so that the others' GPUs infer meanwhile.

RLHFuse (arXiv 2409.13221, section 4.2) cuts at a share R_t of unfinished samples onto m instances, both tuned for a
workload. Here every look prices all cuts, now and at later depths: the tail that gets slower against the inference that
is done when it ends. Nothing is tuned, and a cut waits while waiting promises clearly more.

Invariants: pure; nothing is cut while requests queue, nor where the phases' models do not fit on one GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from verl_rlhfless.policy.fuse import CHUNK_TOKENS, fits
from verl_rlhfless.policy.migrate import Change, fullest, lane_of, moves_onto
from verl_rlhfless.policy.prediction import Prediction
from verl_rlhfless.policy.snapshot import FINISHED, READY, FloatArray, IntArray, PoolSnapshot, RolloutView
from verl_rlhfless.policy.stages import Lane, Options, longest_depth, options_for, stage_times

_PATIENCE = 0.1
"""Share of the best gain that may be left to a later cut: that one rests on predictions which have yet to come true."""

_LEAST_GAIN = 0.01
"""Least gain as a share of what the rollout still takes."""

_IN_TIME = 0.8
"""Depth, as a share of the longest sample's, beyond which samples end too late for inference beside the rollout."""


@dataclass(frozen=True, slots=True)
class Inference:
    """The forward-only phases beside a rollout.

    Attributes:
        num_samples: Samples of the batch.
        finished_tokens: Tokens of those that have finished.
        waiting_tokens: Of these, tokens that no phase has taken yet.
        free_gpus / running_gpus: GPUs that have nothing to do, and those that run inference already.
    """

    num_samples: int
    finished_tokens: float = 0.0
    waiting_tokens: float = 0.0
    free_gpus: int = 0
    running_gpus: int = 0


@dataclass(frozen=True, slots=True)
class Cuts:
    """Every cut of a fleet: at depth k onto ``counts[m]`` of its replicas.

    Attributes:
        counts: [M] replicas that go on; the last entry is all of them, no cut.
        rollout_s: [K, M] seconds until the last sample ends.
        total_s: [K, M] the same and the inference that is left to the trainer then.
    """

    counts: IntArray
    rollout_s: FloatArray
    total_s: FloatArray

    @property
    def saved_s(self) -> float:
        """Seconds that the best cut saves."""
        return float(self.total_s[0, -1] - self.total_s.min())

    def best_now(self) -> int:
        """Return the position of the cut that pays now; the last one where none does, or a later one pays more."""
        now = int(self.total_s[0].argmin())
        gain = float(self.total_s[0, -1] - self.total_s[0, now])
        is_worth_it = gain > _LEAST_GAIN * float(self.rollout_s[0, -1])
        return now if is_worth_it and gain >= (1 - _PATIENCE) * self.saved_s else len(self.counts) - 1


def price_cuts(pool: PoolSnapshot, lane: Lane, fleet: tuple[int, int], inference: Inference) -> Cuts:
    """Return what every cut of a fleet takes.

    Inference runs on the GPUs that the cut frees, from when the models are loaded there, and on those that are free
    already. It does no more than what finishes in time; the trainer does the rest after the rollout.

    Args:
        pool: Performance of replicas and trainer.
        lane: The samples that are left.
        fleet: Tensor-parallel size, and how many replicas of it have samples.
        inference: What is done, and what waits, of the other phases.
    """
    tp, count = fleet
    every = options_for(pool, (fleet,), (tp,))
    counts = every.count[every.count <= count]
    rollout_s, tail_s = _rollout_s(pool, lane, fleet, counts)
    trainer, tokens = pool.trainer, inference.finished_tokens + _tokens(lane)
    mean = tokens / inference.num_samples
    rate = trainer.fuse_tokens_per_s(mean)
    lost_s = CHUNK_TOKENS / 2 / rate  # with the chunk that the end of the rollout finds
    start_s = trainer.fuse_load_s + trainer.times.hybrid_sleep_s + lost_s
    gpu_s = (count - counts) * tp * np.maximum(0.0, tail_s - start_s)
    gpu_s += inference.free_gpus * np.maximum(0.0, rollout_s - start_s) + inference.running_gpus * rollout_s
    done = np.minimum(rate * gpu_s, inference.waiting_tokens + _tokens_in_time(lane))
    left = np.maximum(tokens - (inference.finished_tokens - inference.waiting_tokens) - done, 1.0)
    left_s = [[trainer.inference_s(each, mean) for each in row] for row in left.tolist()]
    return Cuts(counts, rollout_s, rollout_s + np.array(left_s))


def _rollout_s(
    pool: PoolSnapshot, lane: Lane, fleet: tuple[int, int], counts: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Return the seconds until the last sample ends, from now and from the cut on, [K, M] each.

    The whole fleet decodes until depth k. What is cut there is recomputed by those that go on, side by side.
    """
    tp, count = fleet
    stage_s = stage_times(pool, Options(np.full(len(counts), tp), counts), lane)
    before_s = np.cumsum(stage_s[:, -1]) - stage_s[:, -1]
    after_s = np.cumsum(stage_s[::-1], axis=0)[::-1]
    moved = np.concatenate((lane.alive[:1], lane.alive[:-1]))[:, None] * (1 - counts / count)
    contexts = (lane.context + lane.edges[:-1]).tolist()
    move_s = np.array([pool.perf[tp].move_s(context, pool.has_kv_transfer) for context in contexts])
    tail_s = moved * move_s[:, None] / counts + after_s
    return before_s[:, None] + tail_s, tail_s


def _tokens(lane: Lane) -> float:
    """Return the tokens that a lane's samples will have, prompts included."""
    return float(lane.alive[0] * lane.context + (lane.alive * lane.width).sum())


def _tokens_in_time(lane: Lane) -> float:
    """Return the tokens of the samples that end early enough for inference beside the rollout."""
    late = float(np.interp(_IN_TIME * longest_depth(lane.edges, lane.alive), lane.middle, lane.alive))
    ending = -np.diff(np.append(np.maximum(lane.alive, late), late))  # [K] samples that end in each interval
    return float((ending * (lane.context + lane.middle)).sum())


def cut_for_inference(view: RolloutView, prediction: Prediction) -> Change:
    """Return the cut of a fleet on the trainer's own GPUs that pays now, if one does.

    Args:
        view: The rollout now.
        prediction: Lengths given what has been generated.
    """
    held = view.num_held
    live = [r for r in view.replicas if r.state == READY and held[r.replica]]
    if not live:
        return Change(0.0)
    is_finished = view.state == FINISHED
    inference = Inference(
        view.batch.num_samples,
        float((view.batch.prompt_tokens + view.generated)[is_finished].sum()),
        view.fuse_tokens,
        view.free_gpus,
        view.fusing_gpus,
    )
    lane = replace(lane_of(view, prediction, view.alive), ranked=0.0)  # what is cut queues in any order
    cuts = price_cuts(view.pool, lane, (live[0].tp, len(live)), inference)
    has_queue = any(r.num_waiting for r in live)
    may_cut = view.fuse_tokens > 0 and not has_queue and fits(view.pool)
    to = cuts.best_now() if may_cut else len(cuts.counts) - 1
    remaining_s, count = float(cuts.rollout_s[0, to]), int(cuts.counts[to])
    if count == len(live):
        return Change(remaining_s)
    kept = fullest(view, [r.replica for r in live], count)
    cut = view.alive[~np.isin(view.replica_of[view.alive], kept)]
    reason = f"{len(live)} x TP{live[0].tp} shrinks to {count}, for inference on the others' GPUs"
    return Change(remaining_s, (), moves_onto(view, prediction, cut, kept), reason)
