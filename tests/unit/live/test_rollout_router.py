"""The control loop inside the router: every announced sample completes, whoever fails, and the trainer hears of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError

from tests.unit.live.routed import Letters, settings
from verl_rlhfless.errors import ConfigError, ReplicaError
from verl_rlhfless.live import planner as planner_module
from verl_rlhfless.live import rollout_router as rollout_module
from verl_rlhfless.live import step_report
from verl_rlhfless.live.announcement import Announcement, Group
from verl_rlhfless.live.orders import EndReplica, Order, ReclaimReplica, StartReplica
from verl_rlhfless.live.planner import LivePlanner
from verl_rlhfless.live.rollout_router import RolloutRouter
from verl_rlhfless.live.tickets import (
    Delta,
    Grant,
    Outcome,
    OutcomeKind,
    RouterSettings,
    SampleKey,
    ServerLimits,
    SessionEnd,
    Ticket,
)
from verl_rlhfless.policy import routing as routing_module
from verl_rlhfless.policy.learnt import CostModel, ReplicaTimes, Standby, StepTimes
from verl_rlhfless.policy.predict import LengthModel, learn
from verl_rlhfless.policy.routing import RoutingPolicy

SERVERS = Standby(num_servers=4)
FAST = {"name": "cost_aware", "cost_weight": 0}
TWO = {"min_replicas": 2, "max_replicas": 2, "tensor_parallel_sizes": [1]}


@pytest.fixture(autouse=True)
def no_preload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_module, "import_in_background", lambda module: None)


class Server:
    """A server handle that is told what to abort."""

    def __init__(self) -> None:
        self.aborted: list[str] = []

    @property
    def abort(self) -> Any:
        return type("Method", (), {"remote": staticmethod(self.aborted.extend)})


def announcement(step: int = 1, groups: int = 4, n: int = 2) -> Announcement:
    return Announcement(step, tuple(Group(f"u{step}-{g}", f"p{g}", g, n, 50) for g in range(groups)), 100)


class World:
    """A router with fake servers, and one worker that serves its grants."""

    def __init__(self, router: RolloutRouter) -> None:
        self.router = router
        self.letters = Letters(router)
        self.where: dict[SampleKey, list[str]] = {}
        self._tickets: dict[str, SampleKey] = {}
        self._num_orders = 0

    async def order(self, timeout_s: float = 5.0) -> Order | None:
        """Return the next order of the rollout, as the fleet does."""
        order = await asyncio.wait_for(self.router.wanted(self._num_orders), timeout_s)
        self._num_orders += 1
        return order

    async def submit(self, announced: Announcement) -> list[Grant]:
        tickets = []
        for number, key in enumerate(announced.samples()):
            ticket = Ticket(f"{key.uid}-{key.session}", "w", f"s{number}", key, 50)
            self._tickets[ticket.id] = key
            tickets.append(ticket)
        return await self._grants(await self.letters.send(tickets))

    async def finish(self, grants: list[Grant], kind: OutcomeKind = OutcomeKind.DONE, tokens: int = 10) -> list[Grant]:
        messages: list[Any] = []
        for grant in grants:
            messages.append(Outcome(grant.ticket, grant.attempt, kind, tokens))
            if kind is OutcomeKind.DONE:
                messages.append(SessionEnd(self._tickets[grant.ticket]))
        return await self._grants(await self.letters.send(messages))

    async def more(self) -> list[Grant]:
        return await self._grants(await self.letters.more())

    async def _grants(self, batch: Any) -> list[Grant]:
        for grant in batch.grants:
            self.where.setdefault(self._tickets[grant.ticket], []).append(grant.server)
        return batch.grants


async def settled() -> None:
    """Return after the looks at what has happened so far."""
    for _ in range(20):
        await asyncio.sleep(0)


async def orders(world: World, count: int) -> list[Any]:
    return [await world.order() for _ in range(count)]


def on_router(
    test: Callable[[World], Coroutine[Any, Any, None]], servers: int = 2, pool: str = "resident", **parts: Any
) -> None:
    async def run() -> None:
        router = RolloutRouter({f"host:{n}": Server() for n in range(servers)})
        await router.configure_rollouts(RouterSettings(stranded_timeout_s=0.5), settings(pool, **parts))
        try:
            await test(World(router))
        finally:
            while router._control is not None and not router._control.done():
                router._control.cancel()  # again: a wait that ends at the same moment takes no notice
                await asyncio.sleep(0)

    asyncio.run(run())


def test_an_announced_rollout_is_served_and_reported() -> None:
    async def check(world: World) -> None:
        announced = announcement()
        await world.router.announce(announced)
        grants = await world.submit(announced)
        assert len(grants) == 8
        await world.finish(grants)
        report = await world.router.report()
        assert report is not None
        assert (report.step, report.num_samples, report.num_migrations, report.failure) == (1, 8, 0, "")

    on_router(check)


def test_calls_that_the_trainer_makes_again_take_effect_once() -> None:
    async def check(world: World) -> None:
        router, announced = world.router, announcement()
        await router.expect([1, 1, 1])
        for _ in range(2):
            await router.once("first is up", "add_servers", {"host:0": Server()}, 1)
            await router.once("second failed", "give_up_expected", 1)
        assert router.desk.expected == [1], "the third is still to come"
        free = router.desk.free_gpus
        for _ in range(2):
            await router.once("its GPUs are back", "lease_returned", 1)
        assert router.desk.free_gpus == free + 1
        order = await router.once("step 1", "announce", announced)
        assert await router.once("step 1", "announce", announced) == order
        assert router._step.num_joined == 0, "the same prompts are no further ones"

    on_router(check, servers=0, pool="elastic")


def test_the_rest_of_a_rollout_is_predicted_while_it_runs_and_nothing_is_left_without_one() -> None:
    async def check(world: World) -> None:
        assert await world.router.remaining_s() == 0.0
        announced = announcement()
        await world.router.announce(announced)
        grants = await world.submit(announced)
        before = await world.router.remaining_s()
        assert before > 0.0
        await world.finish(grants[:-1])
        assert 0.0 < await world.router.remaining_s() < before
        await world.finish(grants[-1:])
        assert await world.router.remaining_s() == 0.0

    on_router(check)


def test_samples_of_a_group_share_a_replica_and_groups_spread() -> None:
    async def check(world: World) -> None:
        announced = announcement()
        await world.router.announce(announced)
        await world.submit(announced)
        of_group = {
            key.uid: {server for k, used in world.where.items() if k.uid == key.uid for server in used}
            for key in world.where
        }
        assert all(len(used) == 1 for used in of_group.values())
        assert len(set.union(*of_group.values())) == 2

    on_router(check)


def test_lengths_of_a_step_are_learnt_and_survive_a_checkpoint() -> None:
    async def check(world: World) -> None:
        announced = announcement()
        await world.router.announce(announced)
        await world.finish(await world.submit(announced), tokens=40)
        await world.router.report()
        text = await world.router.lengths()
        assert "p0" in text
        other = RolloutRouter({})
        await other.restore_lengths(text)
        assert await other.lengths() == text

    on_router(check)


def test_a_rollout_with_a_sample_that_has_no_tokens_is_not_learnt_from() -> None:
    async def check(world: World) -> None:
        before = await world.router.lengths()
        announced = announcement()
        await world.router.announce(announced)
        grants = await world.submit(announced)
        await world.finish(grants[1:], tokens=40)
        await world.letters.send([SessionEnd(world._tickets[grants[0].ticket])])  # its agent gave up
        report = await world.router.report()
        assert report is not None and not report.failure
        assert await world.router.lengths() == before

    on_router(check)


def test_without_a_predictor_every_step_is_planned_as_the_first_one() -> None:
    async def check(world: World) -> None:
        before = await world.router.lengths()
        announced = announcement()
        await world.router.announce(announced)
        await world.finish(await world.submit(announced), tokens=40)
        await world.router.report()
        assert await world.router.lengths() == before

    on_router(check, predictor="off")


def test_prompts_that_come_before_their_replicas_wait_for_them() -> None:
    async def check(world: World) -> None:
        announced = announcement()
        await world.router.expect([1, 1])
        await world.router.announce(announced)
        assert await world.submit(announced) == []
        await world.router.add_servers({"host:a": Server()})
        first = await world.more()
        assert first and {grant.server for grant in first} == {"host:a"}
        await world.router.add_servers({"host:b": Server()})
        second = await world.more()
        assert {grant.server for grant in second} == {"host:b"}
        assert len(first) + len(second) == 8

    on_router(check, servers=0)


def test_looks_before_any_replica_is_up_decide_nothing() -> None:
    async def check(world: World) -> None:
        announced = announcement()
        await world.router.expect([1])
        await world.router.announce(announced)
        await world.submit(announced)
        world.router._look_now()
        await asyncio.sleep(0.05)
        await world.router.add_servers({"host:a": Server()})
        await world.finish(await world.more())
        report = await world.router.report()
        assert report is not None and report.num_looks and not report.failure

    on_router(check, servers=0)


def test_a_replica_that_will_not_come_leaves_its_samples_to_the_others() -> None:
    async def check(world: World) -> None:
        announced = announcement()
        await world.router.expect([1, 1])
        await world.router.announce(announced)
        await world.submit(announced)
        await world.router.add_servers({"host:a": Server()})
        grants = await world.more()
        await world.router.give_up_expected(1)
        while len(grants) < 8:
            grants += await world.more()
        assert {grant.server for grant in grants} == {"host:a"}

    on_router(check, servers=0)


def test_samples_of_a_lost_replica_continue_on_another_at_once() -> None:
    async def check(world: World) -> None:
        announced = announcement()
        await world.router.announce(announced)
        grants = await world.submit(announced)
        lost = [grant for grant in grants if grant.server == "host:0"]
        world.router.lose_server("host:0", "killed")
        again = await world.finish(lost, OutcomeKind.LOST)
        while len(again) < len(lost):
            again += await world.more()
        assert {grant.server for grant in again} == {"host:1"}
        await world.finish([*again, *(grant for grant in grants if grant.server == "host:1")])
        report = await world.router.report()
        assert report is not None and not report.failure

    on_router(check)


def test_the_only_replica_of_an_elastic_fleet_is_replaced() -> None:
    async def check(world: World) -> None:
        announced = announcement()
        await world.router.announce(announced)
        grants = await world.submit(announced)
        world.router.lose_server("host:0", "killed")
        assert await world.finish(grants, OutcomeKind.LOST) == []
        assert await orders(world, 2) == [ReclaimReplica("host:0"), StartReplica(1)]
        await world.router.add_servers({"host:new": Server()})
        again = await world.more()
        assert len(again) == len(grants) and {grant.server for grant in again} == {"host:new"}
        await world.finish(again)
        report = await world.router.report()
        assert report is not None and not report.failure

    on_router(check, servers=1, pool="elastic")


def test_a_fleet_that_loses_one_replica_after_the_other_gives_up() -> None:
    async def check(world: World) -> None:
        announced = announcement()
        await world.router.announce(announced)
        await world.submit(announced)
        world.router.lose_server("host:0", "killed")
        assert await orders(world, 1) == [ReclaimReplica("host:0")]
        for _ in range(world.router.settings.max_retries):
            await world.order()
            await world.router.give_up_expected(1)
        with pytest.raises(asyncio.TimeoutError):
            await world.order(0.2)

    on_router(check, servers=1, pool="elastic")


def test_requests_of_a_resident_fleet_that_is_gone_fail_within_a_bounded_wait() -> None:
    async def check(world: World) -> None:
        announced = announcement()
        await world.router.announce(announced)
        grants = await world.submit(announced)
        world.router.lose_server("host:0", "killed")
        await world.finish(grants, OutcomeKind.LOST)
        refusals = []
        while len(refusals) < len(grants):
            refusals += (await world.letters.more()).refusals
        assert all("host:0 lost: killed" in refusal.reason for refusal in refusals)

    on_router(check, servers=1)


def test_a_server_that_reports_the_death_of_its_engine_is_replaced_at_once() -> None:
    async def check(world: World) -> None:
        announced = announcement()
        await world.router.announce(announced)
        grants = await world.submit(announced)
        await world.router.progress("host:0", Delta((), None, is_dead=True))
        assert await world.router.get_all_servers() == ["host:1"]
        again = await world.finish([grant for grant in grants if grant.server == "host:0"], OutcomeKind.LOST)
        while len(again) < len(grants) // 2:
            again += await world.more()
        assert {grant.server for grant in again} == {"host:1"}

    on_router(check)


class Timers:
    """The router's loop as a clock that a test moves."""

    def __init__(self) -> None:
        self.waits: list[Any] = []

    def call_later(self, delay_s: float, action: Callable[[], None]) -> Any:
        wait = SimpleNamespace(action=action, delay_s=delay_s, is_over=False)
        wait.cancel = lambda: setattr(wait, "is_over", True)
        self.waits.append(wait)
        return wait

    def fire(self) -> None:
        """Every wait that is not cancelled is over."""
        waits, self.waits = self.waits, []
        for wait in waits:
            if not wait.is_over:
                wait.action()


def test_each_wait_for_a_replica_has_its_whole_time() -> None:
    async def check(world: World) -> None:
        router, world.router._loop = world.router, (timers := Timers())  # type: ignore[assignment]
        assert not (await world.letters.send([Ticket("validation", "w", "s", None, 50)])).grants
        await router.add_servers({"host:1": Server()})
        assert timers.waits.pop().is_over, "what has begun before a replica came does not end the next wait"
        (grant,) = (await world.letters.send([])).grants
        router.lose_server("host:1", "killed")
        await world.letters.send([Outcome("validation", grant.attempt, OutcomeKind.LOST, 0)])
        timers.fire()
        assert len((await world.letters.send([])).refusals) == 1

    on_router(check, servers=0)


async def lose_all_in_validation(world: World) -> None:
    """Start a validation of one request on ``host:0`` and ``host:1``, and lose these after each other."""
    (grant,) = (await world.letters.send([Ticket("validation", "w", "s", None, 50)])).grants
    world.router.lose_server("host:1", "killed")
    assert world.router.desk.orders.items == [ReclaimReplica("host:1")], "another one is left"
    world.router.lose_server("host:0", "killed")
    await world.letters.send([Outcome("validation", grant.attempt, OutcomeKind.LOST, 3)])
    assert world.router.desk.orders.items[1:] == [ReclaimReplica("host:0"), StartReplica(1)]


def test_the_last_replica_of_a_validation_is_replaced_and_waited_for() -> None:
    async def check(world: World) -> None:
        router, world.router._loop = world.router, (timers := Timers())  # type: ignore[assignment]
        await lose_all_in_validation(world)
        (limit,) = [wait for wait in timers.waits if not wait.is_over]
        assert limit.delay_s > 60, "as long as a start may take"
        await router.add_servers({"host:2": Server()}, 1)
        (again,) = (await world.letters.send([])).grants
        assert again.server == "host:2" and limit.is_over

    on_router(check, pool="elastic")


def test_a_validation_gives_up_when_nothing_comes_in_place_of_its_last_replica() -> None:
    async def check(world: World) -> None:
        router, world.router._loop = world.router, (timers := Timers())  # type: ignore[assignment]
        await lose_all_in_validation(world)
        for _ in range(router.settings.max_retries):
            await router.give_up_expected(1)
        assert router.desk.orders.items.count(StartReplica(1)) == router.settings.max_retries
        (limit,) = [wait for wait in timers.waits if not wait.is_over]
        assert limit.delay_s == router.settings.stranded_timeout_s
        timers.fire()
        (refusal,) = (await world.letters.send([])).refusals
        assert "host:0 lost: killed" in refusal.reason

    on_router(check, pool="elastic")


def test_nothing_is_given_up_while_a_replica_starts() -> None:
    async def check(world: World) -> None:
        announced, router = announcement(), world.router
        await router.announce(announced)
        grants = await world.submit(announced)
        router._loop = timers = Timers()  # type: ignore[assignment]
        router.lose_server("host:0", "killed")
        assert await world.finish(grants, OutcomeKind.LOST) == []
        router.book.add_replica(1)
        timers.fire()
        assert not (await world.letters.send([])).refusals
        await router.give_up_expected(1)
        timers.fire()
        assert len((await world.letters.send([])).refusals) == 8
        await world.letters.send([SessionEnd(key) for key in announced.samples()])
        await router.report()

    on_router(check, servers=1)


def test_a_policy_that_fails_is_reported_and_every_sample_completes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("policy")

    async def check(world: World) -> None:
        announced = announcement()
        await world.router.announce(announced)
        grants = await world.submit(announced)
        await asyncio.sleep(0.6)  # one look
        await world.finish(grants)
        report = await world.router.report()
        assert report is not None and "step 1" in report.failure and "ZeroDivisionError" in report.failure

    monkeypatch.setattr(RoutingPolicy, "react", fail)
    on_router(check)


def test_after_a_failed_policy_nothing_more_is_leased(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("policy")

    async def check(world: World) -> None:
        announced = announcement()
        await world.router.announce(announced)
        grants = await world.submit(announced)
        monkeypatch.setattr(RoutingPolicy, "react", fail)
        world.router._look_now()
        await settled()
        await world.finish(grants)
        report = await world.router.report()
        assert report is not None and "ZeroDivisionError" in report.failure
        assert not world.router.desk.orders.items and report.num_started == 0

    on_router(check, pool="elastic")


def test_a_fleet_that_is_lost_after_its_policy_failed_is_reported_with_both_failures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("policy")

    async def check(world: World) -> None:
        announced, router = announcement(), world.router
        await router.announce(announced)
        grants = await world.submit(announced)
        monkeypatch.setattr(RoutingPolicy, "react", fail)
        router._look_now()
        await settled()
        for server in ("host:0", "host:1"):
            router.lose_server(server, "killed")
        await settled()
        await world.finish(grants, OutcomeKind.LOST)
        await world.letters.send([SessionEnd(key) for key in announced.samples()])
        report = await router.report()
        assert (
            report is not None and report.step == 1 and "ZeroDivisionError('policy'), and then Repl" in report.failure
        )

    on_router(check)


def test_without_any_replica_the_step_is_refused() -> None:
    async def check(world: World) -> None:
        with pytest.raises(ReplicaError, match="step 1: no rollout replica is up"):
            await world.router.announce(announcement())

    on_router(check, servers=0)


def test_further_prompts_of_a_step_are_served_without_a_plan() -> None:
    async def check(world: World) -> None:
        first, refill = announcement(1), refill_of(1)
        await world.router.announce(first)
        await world.router.announce(refill)
        grants = [*await world.submit(first), *await world.submit(refill)]
        assert len(grants) == 10
        await world.finish(grants)
        report = await world.router.report()
        assert report is not None and report.num_samples == 10

    on_router(check)


def refill_of(step: int, uid: str = "refill") -> Announcement:
    """Two samples of one more prompt: verl replaces a group that has nothing to teach while the step goes on."""
    return Announcement(step, (Group(uid, uid, 90, 2, 50),), 100)


def test_a_step_whose_prompts_come_in_parts_is_reported_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now_s[0], process_time=lambda: now_s[0] / 10)
    for module in (rollout_module, step_report):
        monkeypatch.setattr(module, "time", clock)

    async def end_after(world: World, seconds: float, grants: list[Grant]) -> None:
        now_s[0] += seconds
        await world.finish(grants)
        await world.router.wait_ended(5.0)

    async def check(world: World) -> None:
        first, refill, joining = announcement(1), refill_of(1), refill_of(1, "joins")
        await world.router.announce(first)
        await end_after(world, 30.0, await world.submit(first))
        now_s[0] += 10.0  # until verl asks for more
        await world.router.announce(refill)
        await world.router.announce(joining)
        grants, last = await world.submit(refill), await world.submit(joining)
        await end_after(world, 8.0, grants)
        await end_after(world, 4.0, last)
        report = await world.router.report()
        assert report is not None and (report.num_samples, report.rollout_s) == (12, 52.0)
        assert report.router_cpu_s == pytest.approx(3.8), "its wait for refills is not the router's work"
        await world.router.announce(announcement(2))
        await end_after(world, 5.0, await world.submit(announcement(2)))
        report = await world.router.report()
        assert report is not None and (report.step, report.num_samples, report.rollout_s) == (2, 8, 5.0)

    on_router(check)


def test_a_failure_before_a_refill_is_still_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("policy")

    async def check(world: World) -> None:
        await world.router.announce(announcement())
        grants = await world.submit(announcement())
        with monkeypatch.context() as broken:
            broken.setattr(RoutingPolicy, "react", fail)
            world.router._look_now()
            await settled()
        await world.finish(grants)
        await world.router.announce(refill_of(1))
        await world.finish(await world.submit(refill_of(1)))
        report = await world.router.report()
        assert report is not None and "ZeroDivisionError" in report.failure

    on_router(check)


def test_a_prompt_that_is_in_a_step_twice_is_two_groups() -> None:
    group = Group("u0", "p", 0, 2, 50)
    batch = Announcement(1, (group, Group("u1", "p", 0, 2, 50)), 100).batch()
    assert batch.prompt_ids == ("p", "p+1") and batch.group_of.tolist() == [0, 0, 1, 1]


def test_looks_do_not_run_hot_when_a_dry_replica_stays_dry() -> None:
    async def check(world: World) -> None:
        announced = announcement(groups=1, n=2)
        await world.router.announce(announced)
        grants = await world.submit(announced)
        for _ in range(200):
            world.router.pump()
            await asyncio.sleep(0)
        await world.finish(grants)
        report = await world.router.report()
        assert report is not None and report.num_looks < 5

    on_router(check)


def test_the_end_of_a_rollout_is_told_at_once_and_waiting_for_it_is_bounded() -> None:
    async def check(world: World) -> None:
        await asyncio.wait_for(world.router.wait_ended(60.0), 5)  # none runs
        announced = announcement()
        await world.router.announce(announced)
        grants = await world.submit(announced)
        waiting = asyncio.create_task(world.router.wait_ended(60.0))
        await asyncio.wait_for(world.router.wait_ended(0.01), 5)
        assert not waiting.done()
        await world.finish(grants)
        await asyncio.wait_for(waiting, 5)

    on_router(check)


def test_the_prompts_that_will_probably_be_long_are_submitted_first() -> None:
    async def check(world: World) -> None:
        first = announcement()
        assert sorted(await world.router.announce(first)) == [0, 1, 2, 3]
        grants = await world.submit(first)
        for group, tokens in enumerate((10, 90, 20, 60)):
            uid = first.groups[group].uid
            await world.finish([g for g in grants if world._tickets[g.ticket].uid == uid], tokens=tokens)
        await world.router.report()
        assert await world.router.announce(announcement(2)) == (1, 3, 2, 0)

    on_router(check)


def test_the_actor_of_the_plugin_seam_is_the_router() -> None:
    assert rollout_module.RolloutRouterActor.__ray_metadata__.modified_class.__name__ == "RolloutRouter"


def on_planning_router(test: Callable[[World], Coroutine[Any, Any, None]], **planner: Any) -> None:
    on_router(test, servers=0, pool="elastic", planner={"name": "cost_aware", **planner})


async def start_planned(world: World, announced: Announcement, replica_of: Sequence[int] | None = None) -> list[Grant]:
    """Plan a step, with other lanes if they are given, start every replica of its fleet, and return what may start."""
    decision = await world.router.plan(announced, standby=SERVERS)
    if replica_of is not None:
        assert world.router._planner is not None and world.router._planner.next is not None
        plan, pool = world.router._planner.next
        world.router._planner.next = replace(plan, replica_of=np.array(replica_of)), pool
    await world.router.expect([spec.tp for spec in decision.replicas])
    await world.router.announce(announced)
    for number, spec in enumerate(decision.replicas):
        await world.router.add_servers({f"host:{number}": Server()}, spec.tp)
    return await world.submit(announced)


def test_a_step_is_planned_from_its_prompts_within_the_limits() -> None:
    async def check(world: World) -> None:
        decision = await world.router.plan(announcement(groups=16, n=8), standby=SERVERS)
        assert len(decision.replicas) >= 2 and decision.num_gpus <= 4
        forecast = decision.forecast
        assert forecast is not None and 0 < forecast.rollout_s < forecast.step_s
        assert forecast.gpu_s > 2 * forecast.step_s, "the trainer's two GPUs are leased all the time"
        assert "static" in decision.reason

    on_planning_router(check, min_replicas=2)


@pytest.mark.parametrize("lanes", [(0, 0, 1, 1), (0, 1, 1, 0), (1, 1, 0, 0)])
def test_requests_go_to_the_lanes_that_the_fleet_was_planned_for(lanes: tuple[int, ...]) -> None:
    async def check(world: World) -> None:
        announced = announcement()
        grants = await start_planned(world, announced, [lane for lane in lanes for _ in range(2)])
        await world.finish(grants)
        lanes_of = {sample: f"host:{lanes[number // 2]}" for number, sample in enumerate(announced.samples())}
        assert world.where == {sample: [server] for sample, server in lanes_of.items()}

    on_planning_router(check, min_replicas=2, max_replicas=2)


def test_a_deadline_that_no_fleet_meets_is_refused_before_anything_is_leased() -> None:
    async def check(world: World) -> None:
        with pytest.raises(ConfigError, match=r"rlhfless\.planner\.max_step_s=0\.1.*Feasible: \d"):
            await world.router.plan(announcement(), standby=SERVERS)

    on_planning_router(check, max_step_s=0.1)


def test_a_replica_whose_last_sample_ended_is_given_back_while_the_others_decode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routing_module, "_LOOK_S", 60.0)  # at once, and not at the next look

    async def check(world: World) -> None:
        announced = announcement()
        grants = await start_planned(world, announced)
        first = [grant for grant in grants if grant.server == "host:0"]
        others = [grant for grant in grants if grant.server != "host:0"]
        assert first and others
        await settled()
        await world.finish(first)
        order = await world.order()
        assert order == EndReplica("host:0")
        assert await world.router.get_all_servers() == ["host:1"]
        await world.finish(others)
        report = await world.router.report()
        assert report is not None and (report.num_released, report.failure) == (1, "")

    on_planning_router(check, **TWO)


async def share_trainer(world: World, announced: Announcement) -> list[Grant]:
    """Plan a step of two replicas beside the trainer, start them, and return what may start."""
    leaves = replace(settings("elastic", {"name": "cost_aware", **TWO, "cost_weight": 0}), keeps_trainer=False)
    await world.router.configure_rollouts(RouterSettings(stranded_timeout_s=0.5), leaves)
    decision = await world.router.plan(announced, Standby({1: 2}, beside={1: 2}))
    assert decision.is_resident and decision.forecast is not None and len(decision.replicas) == 2
    await world.router.expect([1, 1])
    await world.router.announce(announced)
    for number in range(2):
        await world.router.add_servers({f"host:{number}": Server()}, 1)
    return await world.submit(announced)


def test_no_replica_beside_the_trainer_is_ended_before_the_rollout_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing_module, "_LOOK_S", 60.0)

    async def check(world: World) -> None:
        grants = await share_trainer(world, announcement())
        first = [grant for grant in grants if grant.server == "host:0"]
        await world.finish(first)
        with pytest.raises(asyncio.TimeoutError):
            await world.order(0.8)
        await world.finish([grant for grant in grants if grant not in first])
        report = await world.router.report()
        assert report is not None and (report.num_released, report.failure) == (0, "")

    on_planning_router(check)


def test_a_lost_replica_beside_the_trainer_is_replaced() -> None:
    async def check(world: World) -> None:
        grants = await share_trainer(world, announcement())
        for server in ("host:0", "host:1"):
            world.router.lose_server(server, "killed")
        assert await world.finish(grants, OutcomeKind.LOST) == []
        assert await orders(world, 3) == [ReclaimReplica("host:0"), ReclaimReplica("host:1"), StartReplica(1)]
        await world.router.add_servers({"host:2": Server()}, 1)
        again = await world.more()
        assert {grant.server for grant in again} == {"host:2"} and len(again) == len(grants)
        await world.finish(again)

    on_planning_router(check)


def test_with_a_fixed_schedule_every_replica_stays_to_the_end() -> None:
    async def check(world: World) -> None:
        announced = announcement()
        await world.router.expect([1, 1])
        await world.router.announce(announced)
        await world.router.add_servers({"host:0": Server()}, 1)
        await world.router.add_servers({"host:1": Server()}, 1)
        grants = await world.submit(announced)
        await world.finish([grant for grant in grants if grant.server == "host:0"])
        with pytest.raises(asyncio.TimeoutError):
            await world.order(0.8)

    on_router(check, servers=0, pool="elastic", migration="off")


def test_the_router_fills_a_mixed_fleet_by_size_whatever_comes_first() -> None:
    async def check(world: World) -> None:
        announced = announcement()
        await world.router.expect([2, 1])
        await world.router.announce(announced)
        await world.router.add_servers({"narrow": Server()}, 1)
        await world.router.add_servers({"wide": Server()}, 2)
        live = world.router._live
        assert live is not None
        assert [(r.tp, r.state) for r in live.observe().replicas] == [(2, "ready"), (1, "ready")]
        assert world.router.book._announced().replicas[0].server == "wide"
        await world.finish(await world.submit(announced))

    on_router(check, servers=0, pool="elastic")


def test_a_replica_that_comes_while_its_rollout_is_planned_serves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = RolloutRouter.begin

    async def check(world: World) -> None:
        def arrive() -> None:
            world.router._handles["host:a"] = Server()
            world.router.book.servers.add("host:a", ServerLimits())
            assert world.router._arrived(1, "host:a") is None, "nobody waits for it yet"

        def begin_meanwhile(router: RolloutRouter, rollout: Any) -> None:
            asyncio.get_running_loop().call_soon(arrive)  # an answer that came in: before the control loop's first step
            begin(router, rollout)

        monkeypatch.setattr(RolloutRouter, "begin", begin_meanwhile)
        announced = announcement()
        await world.router.expect([1, 1])
        await world.router.announce(announced)
        grants = await world.submit(announced)
        assert grants and {grant.server for grant in grants} == {"host:a"}
        await world.router.add_servers({"host:b": Server()}, 1)
        grants += await world.more()
        assert len(grants) == 8
        await world.finish(grants)

    on_router(check, servers=0, pool="elastic", migration="off")


@pytest.mark.parametrize("answer", [RayActorError(), None])
def test_a_server_that_dies_or_hangs_before_it_reports_is_no_replica_that_samples_wait_for(
    answer: RayActorError | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = SimpleNamespace(current_actor="router")
    monkeypatch.setattr(rollout_module.ray, "get_runtime_context", lambda: here)

    def report_to(*_: Any) -> asyncio.Future[Any]:
        report: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if answer is not None:
            report.set_exception(answer)
        return report

    async def check(world: World) -> None:
        announced = announcement()
        await world.router.expect([1, 1])
        await world.router.announce(announced)
        await world.submit(announced)
        dead = SimpleNamespace(report_to=SimpleNamespace(remote=report_to))
        await asyncio.wait_for(world.router.add_servers({"host:dead": dead}, 1), 10)
        assert await orders(world, 1) == [ReclaimReplica("host:dead")]
        await world.router.add_servers({"host:a": Server()}, 1)
        grants = await world.more()
        while len(grants) < 8:
            grants += await world.more()
        assert {grant.server for grant in grants} == {"host:a"}
        await world.finish(grants)

    on_router(check, servers=0, pool="elastic")


def test_a_replica_of_which_nothing_is_heard_is_not_waited_for_for_ever() -> None:
    async def check(world: World) -> None:
        announced, router = announcement(), world.router
        router._loop = timers = Timers()  # type: ignore[assignment]
        await router.expect([1, 1])
        await router.announce(announced)
        await router.add_servers({"host:a": Server()}, 1)
        grants = await world.submit(announced)
        assert 0 < len(grants) < 8, "the others wait for the second replica"
        timers.fire()
        await settled()
        grants += await world._grants(await world.letters.send([]))
        assert len(grants) == 8 and {grant.server for grant in grants} == {"host:a"}
        await world.finish(grants)
        assert router.desk.expected == []

    on_router(check, servers=0, pool="elastic", migration="off", dispatcher="stock")


def test_gpus_are_free_only_after_the_fleet_confirmed_their_return() -> None:
    async def check(world: World) -> None:
        announced = announcement()
        grants = await start_planned(world, announced)
        free = world.router.desk.free_gpus
        await world.finish([grant for grant in grants if grant.server == "host:0"])
        await world.order()
        assert world.router.desk.free_gpus == free
        await world.router.lease_returned(1)
        assert world.router.desk.free_gpus == free + 1

    on_planning_router(check, **TWO)


def test_an_order_that_came_too_late_for_its_rollout_is_not_carried_out_in_the_next_one() -> None:
    async def check(world: World) -> None:
        world.router.desk.start(1)
        await world.router.progress("host:0", Delta((), None, is_dead=True))
        await world.router.expect([1])
        assert not world.router.desk.orders.items and world.router.desk.free_gpus == 3

    on_router(check, servers=1, pool="elastic")


def test_an_order_whose_answer_was_lost_is_given_again_and_none_after_it_is_missed() -> None:
    async def check(world: World) -> None:
        lost = asyncio.ensure_future(world.router.wanted(0))
        await settled()
        world.router.desk.start(1)
        assert await asyncio.wait_for(lost, 5) == StartReplica(1)
        world.router.desk.end("host:0")
        assert await orders(world, 2) == [StartReplica(1), EndReplica("host:0")]

    on_router(check, pool="elastic")


def test_a_server_that_is_registered_twice_is_one_replica() -> None:
    async def check(world: World) -> None:
        announced, one = announcement(), Server()
        await world.router.expect([1, 1])
        await world.router.announce(announced)
        await world.submit(announced)
        for _ in range(2):
            await world.router.add_servers({"host:a": one}, 1)
        first = await world.more()
        assert 0 < len(first) < 8 and world.router.desk.expected == [1]
        await world.router.add_servers({"host:b": Server()}, 1)
        second = await world.more()
        assert {grant.server for grant in second} == {"host:b"}
        await world.finish(first + second)

    on_router(check, servers=0, pool="elastic", migration="off", dispatcher="stock")


def test_a_limit_that_later_steps_cannot_meet_does_not_end_the_run() -> None:
    async def check(world: World) -> None:
        first = announcement(groups=2, n=1)
        await world.finish(await start_planned(world, first), tokens=1)
        await world.router.report()
        await world.router.learn_costs(StepTimes((), None, phases_s=500.0, publish_s=None))
        decision = await world.router.plan(announcement(2), standby=SERVERS)
        assert "nearest to a limit" in decision.reason and "Feasible" in decision.reason

    on_planning_router(check, max_step_s=60.0)


def test_a_steps_phases_are_not_those_of_its_last_refill() -> None:
    learnt: list[str] = []

    async def check(world: World, refills: Sequence[Announcement]) -> None:
        await world.finish(await start_planned(world, announcement()), tokens=40)
        for refill in refills:
            await world.router.announce(refill)
            await world.finish(await world.submit(refill), tokens=20)
        await world.router.report()
        await world.router.learn_costs(StepTimes((), None, phases_s=20.0, publish_s=None))
        learnt.append(await world.router.costs())

    on_planning_router(partial(check, refills=()), **TWO)
    on_planning_router(partial(check, refills=(refill_of(1), refill_of(1, "another"))), **TWO)
    assert learnt[0] == learnt[1] and "phases" in learnt[0]


def test_plans_lease_no_more_than_a_trainer_that_could_not_leave_has_room_for() -> None:
    async def check(world: World) -> None:
        large = announcement(groups=16, n=8)
        assert (await world.router.plan(large, standby=SERVERS)).num_gpus > 2
        stays = replace(settings("elastic", FAST), replica_gpus=2, keeps_trainer=True)
        await world.router.reroute(stays)
        assert (await world.router.plan(large, standby=SERVERS)).num_gpus <= 2
        assert world.router.desk.free_gpus == 2

    on_router(check, servers=0, pool="elastic", planner=FAST)


def test_a_plan_is_for_one_step() -> None:
    async def check(world: World) -> None:
        await world.finish(await start_planned(world, announcement()))
        await world.router.report()
        larger = announcement(2, groups=6)
        await world.router.announce(larger)  # by a fleet that nobody planned
        await world.finish(await world.submit(larger))
        report = await world.router.report()
        assert report is not None and (report.num_samples, report.failure) == (12, "")

    on_planning_router(check, **TWO)


def test_slow_starts_and_phases_of_one_step_are_expected_of_the_next_one() -> None:
    async def check(world: World) -> None:
        first = announcement()
        before = await world.router.plan(announcement(), standby=SERVERS)
        await world.finish(await start_planned(world, first), tokens=20)
        await world.router.report()
        slow = ReplicaTimes(way="warm_start", grant_s=1.0, start_s=30.0, load_s=2.0)
        await world.router.learn_costs(StepTimes((slow,), 0.5, phases_s=20.0, publish_s=1.0))
        after = await world.router.plan(announcement(2), standby=SERVERS)
        assert before.forecast is not None and after.forecast is not None
        assert after.forecast.rollout_s > 33.0
        assert after.forecast.step_s > after.forecast.rollout_s + 20.0
        other = RolloutRouter({})
        await other.restore_costs(await world.router.costs())
        await other.configure_rollouts(RouterSettings(), settings("elastic", {"name": "cost_aware"}))
        assert await other.costs() == await world.router.costs()

    on_planning_router(check)


@pytest.mark.parametrize(
    ("wake_s", "has_history", "has_room", "is_told"),
    [(300.0, True, False, True), (300.0, True, True, False), (300.0, False, False, False), (0.01, True, False, False)],
)
def test_a_user_whose_leases_do_not_pay_is_told_once_what_does(
    wake_s: float, has_history: bool, has_room: bool, is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(planner_module.logger, "warning", lambda text, *values: told.append(text % values))
    leaves = replace(settings("elastic", {"name": "cost_aware"}), keeps_trainer=False)
    planner = LivePlanner(leaves, CostModel({"wake_s": (wake_s,), "cold_start_s": (2 * wake_s,)}))
    lengths = LengthModel()
    if has_history:
        lengths = learn(lengths, announcement().batch(), np.array([5, 90, 10, 10, 15, 10, 10, 10]))
    for step in range(1, 8):
        planner.plan(announcement(step), lengths, Standby({1: 4}, beside={1: 4 * has_room}))
    assert len(told) == is_told
    assert all("+rlhfless=resident" in text for text in told)
