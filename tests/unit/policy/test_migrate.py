"""What happens when replicas that were started during a rollout become ready."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.sim.cases import cell, steps
from verl_rlhfless.policy.migrate import Change, consolidate
from verl_rlhfless.policy.predict import Prediction
from verl_rlhfless.policy.snapshot import FINISHED, GONE, READY, RUNNING, Batch, ReplicaView, RolloutView

POOL = cell(steps(1, 4, 2)).pool


def ready(num_left: int, olds: tuple[int, ...], news: tuple[int, ...]) -> tuple[RolloutView, Change]:
    """Return a rollout whose ``num_left`` samples are spread over the old replicas, and what fresh ones change."""
    batch = Batch(1, ("p",), np.zeros(16, dtype=np.int64), np.full(16, 100), 8192)
    state = np.where(np.arange(16) < num_left, RUNNING, FINISHED).astype(np.int8)
    of = np.arange(16) % len(olds)
    held = np.bincount(of[:num_left], minlength=len(olds)).tolist() + [0] * len(news)
    replicas = tuple(
        ReplicaView(r, tp, READY if held[r] or r >= len(olds) else GONE, 0, held[r], 3000 * held[r])
        for r, tp in enumerate((*olds, *news))
    )
    view = RolloutView(100.0, batch, POOL, np.full(16, 3000), state, of, replicas, 4, 0, 0, 0)
    lengths = Prediction(np.full(16, np.log(4000.0)), np.full(16, 0.5), 8192)
    return view, consolidate(view, lengths, 16.0, (0.02, len(olds)))


@pytest.mark.parametrize(
    ("num_left", "olds", "news", "num_moved", "released"),
    [
        (1, (2,), (2,), 0, (1,)),
        (8, (2,), (2,), 4, ()),
        (3, (2,), (2, 2, 2, 2), 2, (3, 4)),
        (2, (2, 2), (4, 4, 4), 2, (4,)),
        (8, (2, 2), (4, 4), 8, ()),
    ],
)
def test_fresh_replicas_get_samples_or_end_and_the_rest_of_the_rollout_takes_time(
    num_left: int, olds: tuple[int, ...], news: tuple[int, ...], num_moved: int, released: tuple[int, ...]
) -> None:
    view, change = ready(num_left, olds, news)
    assert sum(len(move.samples) for move in change.moves) == num_moved
    assert change.releases == released
    assert {move.replica for move in change.moves} == set(range(len(olds), len(view.replicas))) - set(released)
    assert change.remaining_s > 1.0 and not change.starts and change.reason
