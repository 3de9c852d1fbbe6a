"""What a leased replica, and inference on freed GPUs, take beside their work: worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import simpy

from tests.unit.sim.cases import cell, steps
from verl_rlhfless.policy.snapshot import RolloutPlan
from verl_rlhfless.sim.fused import FusedInference
from verl_rlhfless.sim.leases import LeaseBook
from verl_rlhfless.sim.rollout import SimRollout

DATA = steps(1, 4, 4)


@pytest.mark.parametrize("is_parked", [False, True])
def test_a_leased_replica_pays_its_grant_its_start_its_weights_and_its_way_to_sleep(is_parked: bool) -> None:
    one, env, every = cell(DATA), simpy.Environment(), np.arange(16)
    times, book = one.pool.trainer.times, LeaseBook(env, one.cluster)
    if is_parked:
        book.park((0, 0), 4)
    plan = RolloutPlan((4,), np.zeros(16, dtype=np.int64), every, is_resident=False, is_static=False)
    rollout = SimRollout(book, one.pool, DATA[0], plan, "trainer")
    rollout.start(plan.fleet)
    rollout.place(every, 0)
    env.run()
    (lease,), (work,) = book.leases, book.busy
    start_s = times.wake_s if is_parked else times.cold_start_s
    assert lease.granted_s == pytest.approx(times.grant_s)
    assert lease.usable_s - lease.granted_s == pytest.approx(start_s + one.pool.perf[4].load_s)
    assert work.start_s == pytest.approx(lease.usable_s)
    assert lease.released_s - work.end_s == pytest.approx(times.park_s)
    assert book.warm_gpus() == {4: 4}


@pytest.mark.parametrize("resident", [None, "trainer"], ids=["leased", "on the trainer's lease"])
def test_inference_loads_its_models_first_and_takes_every_finished_token_once(resident: str | None) -> None:
    one, env = cell(DATA), simpy.Environment()
    trainer, book = one.pool.trainer, LeaseBook(env, one.cluster)
    inference = FusedInference(book, trainer, resident)
    for tokens in (3000, 5000):
        inference.add(tokens)
    inference.fuse(2)
    env.run()
    times = trainer.times
    wait_s = times.hybrid_sleep_s if resident else times.grant_s + times.wake_s
    work_s = 8000 / (2 * trainer.fuse_tokens_per_s(4000))
    (work,) = book.busy
    assert (inference.done_tokens, inference.pending_tokens) == (8000, 0)
    assert (work.start_s, work.end_s) == pytest.approx(
        (wait_s + trainer.fuse_load_s, wait_s + trainer.fuse_load_s + work_s)
    )
