"""One decision during a rollout, with true lengths, against every other one that could be made then."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import simpy

from tests.unit.sim.cases import request
from verl_rlhfless.policy.fuse import fuse_gpus
from verl_rlhfless.policy.gpus import GPUS
from verl_rlhfless.policy.migrate import consolidate, moves_onto
from verl_rlhfless.policy.prediction import exact
from verl_rlhfless.policy.shapes import MODELS
from verl_rlhfless.policy.snapshot import FINISHED, READY, RUNNING, Batch, IntArray, Move, ReplicaView, RolloutView
from verl_rlhfless.policy.transitions import LeaseTimes
from verl_rlhfless.sim.cell import make_pool
from verl_rlhfless.sim.cluster import Cluster
from verl_rlhfless.sim.engine import Engine
from verl_rlhfless.sim.fused import FusedInference
from verl_rlhfless.sim.leases import LeaseBook
from verl_rlhfless.sim.request import Request

EIGHT = Cluster("eight", GPUS["H100"], 1, 8, 3.6)
POOL = make_pool(EIGHT, MODELS["qwen2.5-3b"], LeaseTimes(wake_s=1.0))
CAP = 8192
TAIL_TOKENS = 500_000
"""Of samples that end with the rollout: the trainer infers those in any case."""


def late_rollout(seed: int, slots: int) -> tuple[RolloutView, IntArray]:
    """Return a rollout of six samples on three replicas, of which a part has ended, and the true lengths."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.exp(rng.normal(7.5, 1.0, 6)), 200, CAP).astype(np.int64)
    generated = np.minimum(np.sort(lengths)[seed % 3], lengths)
    state = np.where(lengths > generated, RUNNING, FINISHED).astype(np.int8)
    of = rng.permutation(6) % 3
    held = np.bincount(of[state == RUNNING], minlength=3).tolist()
    replicas = tuple(ReplicaView(r, 1, READY, 0, held[r], 0) for r in range(3))
    batch = Batch(1, tuple("abcdef"), np.arange(6), np.full(6, 100), CAP)
    perf = replace(POOL.perf[1], limits=replace(POOL.perf[1].limits, max_num_seqs=slots))
    pool = replace(POOL, perf={1: perf}, num_gpus=3)
    return RolloutView(30.0, batch, pool, generated, state, of, replicas, 0, 0, 0, 0), lengths


def rest(view: RolloutView, lengths: IntArray, moves: tuple[Move, ...]) -> tuple[float, float]:
    """Return (seconds, GPU-seconds) until all replicas have ended, when ``moves`` is all that is ever changed."""
    env = simpy.Environment()
    ends = np.zeros(len(view.replicas))
    engines: list[Engine] = []
    to = view.replica_of.copy()
    for move in moves:
        to[move.samples] = move.replica

    def left(replica: int, one: Request, is_cut: bool) -> None:
        if is_cut:
            engines[to[one.sample]].submit(one)
        ends[replica] = env.now

    engines += [Engine(env, view.pool.perf[one.tp], partial(left, one.replica)) for one in view.replicas]
    for i in view.alive.tolist():
        one = request(i, i, 100, int(lengths[i]))
        one.generated, one.has_kv = int(view.generated[i]), True
        engines[view.replica_of[i]].submit(one)
    for engine in engines:
        engine.start()
    env.run(until=0.02)
    for r, engine in enumerate(engines):
        engine.abort({i for i in view.alive.tolist() if view.replica_of[i] == r != to[i]})
    env.run()
    return float(ends.max()), float(ends.sum())


def drains(view: RolloutView, lengths: IntArray) -> list[tuple[Move, ...]]:
    """Return the moves for every choice of replicas that go on, of those that have samples and can run them all.

    What is cut for fewer would queue behind all others, and how long it has would not matter: that is never done.
    """
    slots, busy = view.pool.perf[1].limits.max_num_seqs, sorted(set(view.replica_of[view.alive].tolist()))
    least = -(-len(view.alive) // slots)
    choices = [kept for size in range(least, len(busy) + 1) for kept in combinations(busy, size)]
    cut = [view.alive[~np.isin(view.replica_of[view.alive], kept)] for kept in choices]
    return [moves_onto(view, exact(lengths), samples, kept) for samples, kept in zip(cut, choices, strict=True)]


@pytest.mark.parametrize("slots", [2, 1024])
@pytest.mark.parametrize("seed", range(12))
def test_which_replicas_are_drained_is_at_most_5_percent_worse_than_any_other_choice(seed: int, slots: int) -> None:
    view, lengths = late_rollout(seed, slots)
    for price in (0.5, 3.0, 16.0, 64.0):
        change = consolidate(view, exact(lengths), price, 0.02, 3)
        worth = [price * end_s + gpu_s for end_s, gpu_s in (rest(view, lengths, m) for m in drains(view, lengths))]
        end_s, gpu_s = rest(view, lengths, change.moves)
        assert price * end_s + gpu_s <= 1.05 * min(worth), (price, change.reason)


def fused(view: RolloutView, remaining_s: float, num_gpus: int) -> tuple[float, float]:
    """Return (seconds, GPU-seconds) of inference on what has finished, of which freed GPUs take a part meanwhile."""
    env, trainer = simpy.Environment(), view.pool.trainer
    book = LeaseBook(env, EIGHT)
    inference = FusedInference(book, trainer, None)
    for _ in range(view.fuse_samples):
        inference.add(view.fuse_tokens // view.fuse_samples)
    if num_gpus:
        inference.fuse(num_gpus)
    env.run(until=remaining_s)
    inference.end()
    leased = sum(lease.span().num_gpus * (lease.released_s - lease.granted_s) for lease in book.leases)
    left_s = trainer.inference_s(view.fuse_tokens - inference.done_tokens + TAIL_TOKENS, 1000)
    return left_s, leased + left_s * trainer.num_gpus


@pytest.mark.parametrize("num_samples", [50, 200, 2000, 6000])
@pytest.mark.parametrize(("remaining_s", "price"), [(40.0, 8.0), (40.0, 0.05), (12.0, 32.0), (5.0, 1.0)])
def test_how_many_gpus_infer_is_at_most_5_percent_worse_than_any_other_number(
    num_samples: int, remaining_s: float, price: float
) -> None:
    free = {"fuse_samples": num_samples, "fuse_tokens": num_samples * 1000, "free_gpus": 8, "fusible_gpus": 8}
    view = replace(late_rollout(0, 1024)[0], **free)
    worth = [price * left_s + gpu_s for left_s, gpu_s in (fused(view, remaining_s, n) for n in range(9))]
    assert worth[fuse_gpus(view, remaining_s, price, is_leased=False)] <= 1.05 * min(worth)
