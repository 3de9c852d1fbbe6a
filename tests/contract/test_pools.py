"""The simulated and the live pool keep the same promises to the control loop, whatever it starts, moves and releases.

Where they differ, nothing is asked: GPUs of an order that is not granted yet count as taken in the live pool alone.
What waits at a released replica is held in the live pool and served in the simulator; policies leave nothing there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

pytest.importorskip("verl", reason="needs verl")

from tests.contract.live_world import LiveWorld
from tests.contract.pool_worlds import World, plan_of
from tests.contract.sim_world import SimWorld
from verl_rlhfless.ledger import account, whole_run
from verl_rlhfless.policy.dispatch import place_orphans
from verl_rlhfless.policy.snapshot import (
    FINISHED,
    GONE,
    HELD,
    READY,
    RUNNING,
    STARTING,
    WAITING,
    Move,
    Reaction,
    RolloutPlan,
    RolloutView,
)

Scenario = Callable[[World], Coroutine[Any, Any, None]]
Play = Callable[..., None]


@pytest.fixture(params=["simulated", "live"])
def play(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Return ``play(scenario, targets, budget)``: run it with samples of these lengths, on so many GPUs."""

    def play(scenario: Scenario, targets: list[int], budget: int = 2) -> None:
        async def run() -> None:
            is_live = request.param == "live"
            world: World = LiveWorld(targets, budget, monkeypatch) if is_live else SimWorld(targets, budget)
            await world.open()
            try:
                await scenario(world)
            finally:
                await world.close()
            _check_leases(world, budget)

        asyncio.run(run())

    return play


def _check_leases(world: World, budget: int) -> None:
    """Every lease has ended, never were there more GPUs than the budget, and every GPU-second was counted."""
    leases = world.leases()
    assert leases and all(lease.released_s is not None for lease in leases)
    used = account(leases, (), whole_run(leases, 0.0))
    assert used.max_gpus <= budget
    assert world.gpu_s() == pytest.approx(used.allocated)


def _are(state: str, num: int | None = None) -> Callable[[RolloutView], bool]:
    def is_so(view: RolloutView) -> bool:
        states = [replica.state for replica in view.replicas]
        return states.count(state) == (len(states) if num is None else num)

    return is_so


def _all_run(view: RolloutView) -> bool:
    return bool((view.state == RUNNING).all() and (view.generated > 0).all())


def _done(view: RolloutView) -> bool:
    return bool((view.state == FINISHED).all())


def ids(*samples: int) -> Any:
    return np.array(samples)


def test_what_is_placed_on_a_replica_waits_for_it_and_runs_there_when_it_is_ready(play: Play) -> None:
    async def scenario(world: World) -> None:
        await world.begin(2)
        world.ports.engine.place(ids(0, 1), 1)
        view = world.ports.engine.observe()
        assert view.state.tolist() == [WAITING, WAITING, HELD] and view.replica_of.tolist() == [1, 1, -1]
        assert [replica.state for replica in view.replicas] == [STARTING, STARTING]
        view = await world.until(lambda view: _are(READY)(view) and view.generated[:2].all())
        assert view.state.tolist() == [RUNNING, RUNNING, HELD] and view.generated[2] == 0
        assert [(replica.num_waiting, replica.num_running) for replica in view.replicas] == [(0, 0), (0, 2)]
        assert view.free_gpus == 0 and not world.ports.engine.is_done()
        world.ports.engine.place(ids(2), 0)
        await world.until(_done)
        assert world.ports.engine.is_done()

    play(scenario, [300, 300, 300])


def test_a_running_sample_that_is_moved_goes_on_elsewhere_with_its_tokens(play: Play) -> None:
    async def scenario(world: World) -> None:
        await world.begin(2)
        world.ports.engine.place(ids(0, 1), 0)
        before = await world.until(lambda view: _are(READY)(view) and _all_run(view))
        world.ports.engine.place(ids(1), 1)
        view = await world.until(lambda view: view.replicas[1].num_running == 1)
        assert view.replica_of.tolist() == [0, 1] and view.replicas[0].num_running == 1
        assert before.generated[1] <= view.generated[1] < 400
        await world.until(_done)

    play(scenario, [400, 400])


def test_a_sample_that_waits_is_moved_for_free(play: Play) -> None:
    async def scenario(world: World) -> None:
        await world.begin(2)
        world.ports.engine.place(ids(0, 1), 0)
        world.ports.engine.place(ids(1), 1)
        assert world.ports.engine.observe().replica_of.tolist() == [0, 1]
        view = await world.until(_all_run)
        assert [replica.num_running for replica in view.replicas] == [1, 1]
        await world.until(_done)

    play(scenario, [300, 300])


def test_a_replica_that_is_released_finishes_what_runs_there_and_gives_its_gpu_back(play: Play) -> None:
    async def scenario(world: World) -> None:
        await world.begin(2)
        world.ports.engine.place(ids(0), 0)
        world.ports.engine.place(ids(1), 1)
        await world.until(_all_run)
        world.ports.pool.release([0])
        assert world.ports.engine.observe().state.tolist() == [RUNNING, RUNNING]
        await world.until(lambda view: view.state[0] == FINISHED)
        view = await world.until(lambda view: view.free_gpus == 1)
        assert [replica.state for replica in view.replicas] == [GONE, READY] and view.state[1] == RUNNING
        await world.until(_done)

    play(scenario, [200, 900])


def test_a_replica_may_be_emptied_and_released_at_one_look(play: Play) -> None:
    async def scenario(world: World) -> None:
        await world.begin(2)
        world.ports.engine.place(ids(0), 0)
        world.ports.engine.place(ids(1), 1)
        await world.until(_all_run)
        world.ports.engine.place(ids(0), 1)
        world.ports.pool.release([0])
        view = await world.until(lambda view: view.replicas[1].num_running == 2 and view.free_gpus == 1)
        assert view.replicas[0].state == GONE and view.replica_of.tolist() == [1, 1]
        await world.until(_done)

    play(scenario, [900, 900])


def test_what_does_not_fit_the_budget_waits_for_a_gpu_that_comes_back(play: Play) -> None:
    async def scenario(world: World) -> None:
        await world.begin(2)
        world.ports.engine.place(ids(0), 0)
        world.ports.engine.place(ids(1), 1)
        await world.until(_are(READY))
        world.ports.pool.start([1])
        world.ports.engine.place(ids(2), 2)
        view = await world.until(lambda view: view.generated[0] >= 100)
        assert [replica.state for replica in view.replicas] == [READY, READY, STARTING]
        assert view.state.tolist() == [RUNNING, RUNNING, WAITING] and view.free_gpus == 0
        world.ports.pool.release([0])
        view = await world.until(lambda view: view.generated[2] > 0)
        assert [replica.state for replica in view.replicas] == [GONE, READY, READY] and view.state[0] == FINISHED
        assert view.free_gpus == 0
        await world.until(_done)

    play(scenario, [300, 900, 300])


def test_samples_of_a_lost_replica_are_held_with_their_tokens_and_go_on_elsewhere(play: Play) -> None:
    async def scenario(world: World) -> None:
        await world.begin(2)
        world.ports.engine.place(ids(0, 1), 0)
        world.ports.engine.place(ids(2), 1)
        before = await world.until(lambda view: bool((view.generated >= 100).all()))
        world.lose(0)
        view = world.ports.engine.observe()
        assert view.state.tolist() == [HELD, HELD, RUNNING] and view.replica_of.tolist() == [-1, -1, 1]
        assert [replica.state for replica in view.replicas] == [GONE, READY]
        assert (view.generated[:2] > before.generated[:2] // 2).all(), "a report's interval is all that a loss costs"
        world.ports.engine.place(ids(0, 1), 1)
        view = await world.until(lambda view: view.replicas[1].num_running == 3)
        assert (view.generated[:2] > before.generated[:2] // 2).all()
        await world.until(_done)

    play(scenario, [900, 900, 900])


def test_the_gpu_of_a_lost_replica_is_free_while_the_others_go_on(play: Play) -> None:
    async def scenario(world: World) -> None:
        await world.begin(2)
        world.ports.engine.place(ids(0), 0)
        world.ports.engine.place(ids(1), 1)
        await world.until(_all_run)
        world.lose(0)
        view = await world.until(lambda view: view.free_gpus == 1)
        assert [lease.released_s is None for lease in world.leases()] == [False, True]
        assert view.state[1] == RUNNING, "long before the rollout ends"
        world.ports.engine.place(ids(0), 1)
        await world.until(_done)

    play(scenario, [900, 900])


def test_a_lost_fleet_is_replaced_on_its_own_gpus_by_a_replica_with_the_next_number(play: Play) -> None:
    async def scenario(world: World) -> None:
        await world.begin(2)
        world.ports.engine.place(ids(0), 0)
        world.ports.engine.place(ids(1), 1)
        await world.until(_all_run)
        world.lose(0)
        world.lose(1)
        view = world.ports.engine.observe()
        starts, moves = place_orphans(view, np.flatnonzero(view.state == HELD), (1, 1))
        world.ports.pool.start(starts)
        for move in moves:
            world.ports.engine.place(move.samples, move.replica)
        view = await world.until(_all_run)
        assert view.replica_of.tolist() == [2, 2] and [r.state for r in view.replicas] == [GONE, GONE, READY]
        await world.until(_done)

    play(scenario, [300, 300])


class Script:
    """When everything runs, a third replica starts; when it is up it takes the first one's samples."""

    def __init__(self, look_s: float) -> None:
        self._look_s = look_s

    def react(self, view: RolloutView, plan: RolloutPlan) -> Reaction:
        assert not _done(view), "nobody is asked about a rollout that is over"
        next_s = view.now_s + self._look_s
        if len(view.replicas) == 2 and _all_run(view):
            return Reaction(next_s, starts=(1,))
        if _are(READY, 3)(view) and not (view.replica_of == 2).any():
            mine = np.flatnonzero((view.replica_of == 0) & (view.state == RUNNING))
            return Reaction(next_s, moves=(Move(mine, 2),), releases=(0,))
        return Reaction(next_s)


def test_the_control_loop_does_the_same_in_both_worlds(play: Play) -> None:
    async def scenario(world: World) -> None:
        record = await world.control(Script(world.look_s), plan_of((1, 1), (0, 0, 1), world.look_s))
        done = [reaction for _, reaction in record.reactions]
        assert [(r.starts, len(r.moves), r.releases) for r in done] == [((1,), 0, ()), ((), 1, (0,))]
        assert record.num_migrations == 2
        view = world.ports.engine.observe()
        assert view.replica_of.tolist() == [2, 2, 1] and _done(view)
        assert [lease.released_s is None for lease in world.leases()].count(False) == 1, "the first one's, long ago"

    play(scenario, [1500, 1500, 1500], budget=3)


class Sleeper:
    """Never changes anything, and asks to look again in a year."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def react(self, view: RolloutView, plan: RolloutPlan) -> Reaction:
        self.seen.append([replica.state for replica in view.replicas])
        starts = (1,) if len(view.replicas) == 1 else ()
        return Reaction(3e7, starts=starts)


def test_a_policy_that_waits_is_woken_by_a_replica_that_came_and_by_the_end(play: Play) -> None:
    async def scenario(world: World) -> None:
        policy = Sleeper()
        await world.control(policy, plan_of((1,), (0,), world.look_s))
        assert policy.seen[-1] == [READY, READY]

    play(scenario, [1500])
