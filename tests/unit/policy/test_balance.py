"""A replica's work is what its survival curves say, and a move pays only when the last replica ends sooner."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.policy.paced import POOL
from verl_rlhfless.policy.balance import Foresight, Outlook, Workload, WorkUnits, assign, best_move
from verl_rlhfless.policy.layers import Window
from verl_rlhfless.policy.prediction import Prediction, exact
from verl_rlhfless.policy.shapes import MODELS
from verl_rlhfless.policy.snapshot import FINISHED, READY, RUNNING, Batch, FloatArray, ReplicaView, RolloutView


def outlook(*left: int, generated: int = 0, prompt: int = 0) -> Outlook:
    """Return the outlook on samples whose remaining tokens are known."""
    total = np.array(left) + generated
    prediction = Prediction(np.log(total), np.full(len(left), 0.001), int(total.max()) + 1)
    return outlook_on(prediction, generated, prompt)


def outlook_on(prediction: Prediction, generated: int = 0, prompt: int = 0) -> Outlook:
    ids = np.arange(len(prediction.mu))
    batch = Batch(1, tuple(map(str, ids)), ids, np.full(len(ids), prompt), prediction.cap)
    return Outlook.build(prediction, batch, np.full(len(ids), generated), ids, POOL.trainer.shape)


def singles(view: Outlook, samples: list[int], prefill: float = 0.0) -> WorkUnits:
    units = view.units(slice(None), np.arange(len(view.samples)), np.full(len(view.samples), prefill))
    for sample in sorted(set(view.samples.tolist()) - set(samples), reverse=True):
        units = units.without(sample)
    return units


def workload(view: Outlook, *held: list[int]) -> Workload:
    work = Workload([POOL.perf[1]] * len(held), view.width)
    for replica, samples in enumerate(held):
        for unit in range(len(samples)):
            work.add(replica, singles(view, samples), unit)
    return work


def test_one_request_takes_its_iterations() -> None:
    view = outlook(100)
    assert workload(view, [0]).end_s()[0] == pytest.approx(100 * 0.062, rel=0.05)


def test_a_batch_takes_the_iterations_of_its_longest_and_a_part_for_each() -> None:
    view = outlook(100, 50, 50)
    assert workload(view, [0, 1, 2]).end_s()[0] == pytest.approx(100 * 0.060 + 200 * 0.002, rel=0.05)


def test_more_requests_than_slots_take_turns() -> None:
    view = outlook(*[50] * 32)
    assert workload(view, list(range(32))).end_s()[0] == pytest.approx(200 * 0.060 + 1600 * 0.002, rel=0.05)


def test_reads_behind_a_window_are_no_work() -> None:
    shape = replace(MODELS["qwen2.5-7b"], window=Window(1000, 21))  # three quarters of the layers
    batch = Batch(1, ("a", "b"), np.arange(2), np.array([200, 5000]), 9000)
    views = [Outlook.build(exact(np.array([500, 500])), batch, np.zeros(2, np.int64), np.arange(2), of)
             for of in (MODELS["qwen2.5-7b"], shape)]  # fmt: skip
    full, kept = (view.volume[1][view.row_of] for view in views)
    assert kept[0] == full[0]
    assert kept[1] == pytest.approx(full[1] / 4 + 500 * 1000 * 3 / 4, rel=0.02)


def test_an_empty_replica_is_done() -> None:
    assert workload(outlook(10), [0], []).end_s()[1] == 0.0


def test_a_unit_that_is_taken_away_leaves_nothing_behind() -> None:
    view = outlook(100, 50)
    work = workload(view, [0], [])
    before = work.end_s().copy()
    work.add(1, singles(view, [1], 30.0), 0)
    work.remove(1, singles(view, [1], 30.0), 0)
    assert work.end_s() == pytest.approx(before)


def test_the_long_one_is_left_alone() -> None:
    view = outlook(400, 100, 100, 100, 100)
    assert assign(workload(view, [], []), singles(view, [0, 1, 2, 3, 4])) == [0, 1, 1, 1, 1]


def move(view: Outlook, *held: list[int], again: float = 0.0) -> tuple[int, int, int, float] | None:
    units = [singles(view, part) for part in held]

    def prefill(units: WorkUnits, replica: int) -> FloatArray:
        return np.full(len(units.first), again)

    return best_move(workload(view, *held), units.__getitem__, range(len(held)), prefill)


def test_a_move_to_an_idle_replica_pays_and_is_the_one_that_helps_most() -> None:
    source, position, target, gain = move(outlook(300, 300, 20), [0, 1, 2], []) or (-1, -1, -1, 0.0)
    assert (source, target) == (0, 1) and position in (0, 1)
    assert gain == pytest.approx(300 * 0.002 / (300 * 0.060 + 620 * 0.002), rel=0.1)


def test_no_move_when_what_is_computed_again_costs_more_than_it_saves() -> None:
    assert move(outlook(3, 3), [0, 1], []) is not None
    assert move(outlook(3, 3), [0, 1], [], again=4000.0) is None


@pytest.mark.parametrize("held", [([0], []), ([], []), ([0],)], ids=["a single request", "nothing", "one replica"])
def test_there_is_nothing_to_gain(held: tuple[list[int], ...]) -> None:
    assert move(outlook(300), *held, again=1.0) is None


def test_of_unknown_lengths_the_larger_batch_is_the_later_one() -> None:
    prediction = Prediction(np.full(12, np.log(50)), np.full(12, 1.0), 400)
    end_s = workload(outlook_on(prediction), list(range(10)), [10, 11]).end_s()
    assert end_s[0] > 1.3 * end_s[1]


def test_a_rollout_lasts_as_long_as_its_longest_sample_that_is_not_finished() -> None:
    batch = Batch(1, ("p",), np.zeros(3, dtype=np.int64), np.full(3, 20), 500)
    replicas = (ReplicaView(0, 1, READY, 0, 1, 0), ReplicaView(1, 1, READY, 0, 1, 0))
    generated, where = np.array([400, 100, 100]), np.array([0, 0, 1])

    def left_s(*state: int) -> float:
        view = RolloutView(1.0, batch, POOL, generated, np.array(state, dtype=np.int8), where, replicas, 0, 0, 0, 0)
        return Foresight(view, lambda now: exact(np.array([400, 300, 150]))).remaining_s()

    assert left_s(FINISHED, RUNNING, RUNNING) == pytest.approx(200 * 0.062, rel=0.05)
    assert left_s(FINISHED, FINISHED, RUNNING) == pytest.approx(50 * 0.062, rel=0.05)
    assert left_s(FINISHED, FINISHED, FINISHED) == 0.0
