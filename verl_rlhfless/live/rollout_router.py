"""The router of a run of ours: it runs the control loop (``control.run_rollout``, the simulator's too) in its process.

So decisions and their effects are direct calls, and only cuts and grants leave the process.

Invariants: one announced rollout at a time, and what comes while it runs is served without a plan; when a policy fails,
its rollout ends without further decisions, and the trainer is told.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray

from verl_rlhfless.config import RlhflessConfig
from verl_rlhfless.control import RolloutRecord, run_rollout
from verl_rlhfless.errors import ReplicaError
from verl_rlhfless.live.announcement import Announcement
from verl_rlhfless.live.orders import Order
from verl_rlhfless.live.planning_router import PlanningRouter
from verl_rlhfless.live.preload import SERVER_MODULE, import_in_background
from verl_rlhfless.live.rollout import LiveRollout
from verl_rlhfless.live.router import ACTOR_OPTIONS, WAITING_CALLS
from verl_rlhfless.live.samples import Rollout
from verl_rlhfless.live.step_report import RolloutReport, StepReport
from verl_rlhfless.live.tickets import Message, SessionEnd
from verl_rlhfless.policy.arm import Policy
from verl_rlhfless.policy.balance import Foresight
from verl_rlhfless.policy.baselines.stock import NoReaction
from verl_rlhfless.policy.prediction import Prediction
from verl_rlhfless.policy.snapshot import STARTING, Batch, RolloutPlan, RolloutView
from verl_rlhfless.ports import RolloutPorts

logger = logging.getLogger(__name__)

_NEVER_S = 1e9  # beyond the end of any rollout


class RolloutRouter(PlanningRouter):
    """The router of a run of ours: it also controls every rollout that is announced."""

    def __init__(self, servers: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> None:
        super().__init__(servers, options)
        import_in_background(SERVER_MODULE)
        self._live: LiveRollout | None = None
        self._refine: Callable[[RolloutView], Prediction] | None = None
        self._control: asyncio.Task[None] | None = None
        self._step = StepReport()
        self.listeners.append(self._on_change)

    async def expect(self, tps: Sequence[int]) -> None:
        """Note the size of each replica that is on its way to the next rollout."""
        self.desk.expect(tps)

    def want_replica(self, tp: int) -> bool:
        """Ask the fleet for a replica in place of lost ones; return whether one may come.

        Resident replicas can't be replaced, and a rollout that loses one after the other is not worth more leases.
        """
        assert self._routing is not None
        if not self._routing.config.is_elastic or self.desk.num_started >= self.settings.max_retries:
            return False
        self.desk.start(tp)
        return True

    @ray.method(concurrency_group=WAITING_CALLS)
    async def wanted(self, number: int) -> Order | None:
        """Return a replica to start or to end, the rollout's ``number``-th; ``None`` once there will be none."""
        return await self._on_own_loop(self.desk.order(number))

    async def stop_wanting(self) -> None:
        """End the call that waits in ``wanted``: the fleet is released."""
        self.desk.stop()

    async def lease_returned(self, tp: int) -> None:
        """Note that a replica's GPUs were given back during the rollout."""
        self.desk.returned(tp)

    async def announce(self, announced: Announcement) -> tuple[int, ...]:
        """Plan a step for the replicas that are up or expected; prompts may be submitted from then on.

        Returns:
            The groups' positions in the batch, in the order in which their prompts are best submitted.

        Raises:
            ReplicaError: No replica is up and none is expected.
        """
        if not self.book.is_done:
            logger.info("rlhfless: step %d: further prompts join without a plan", announced.step)
            self._step.num_joined += len(announced.samples())
            return tuple(range(len(announced.groups)))
        await self._control_ended()
        assert self._routing is not None and self._planner is not None, "configured before the first rollout"
        servers = await self.get_all_servers()
        fleet = (*(self.desk.tp_of(server) for server in servers), *self.desk.expected)
        if not fleet:
            raise ReplicaError(f"step {announced.step}: no rollout replica is up. Look for the replicas' errors above.")
        batch = announced.batch()
        arm = self._routing.arm(announced, fleet)
        planned, pool = self._planner.next or (None, self._routing.pool(fleet))
        routing = arm.policy(self._lengths, batch)
        policy: Policy = routing
        if planned is None or planned.is_resident:
            plan = arm.plan(self._lengths, pool, batch)
        else:
            plan = arm.plan_leased(planned, self._lengths, pool, batch)
            policy = self._routing.resizing(routing)
        self._planner.next = None
        predicted = routing.prior.mean()
        rank = np.empty_like(plan.order)
        rank[plan.order] = np.arange(len(rank))
        self.begin(Rollout(batch, announced.samples(), rank, predicted, pool))
        self._step.begin(announced.step)
        limit_s = start_limit_s(self._routing.config)
        self._live = LiveRollout(self, self.desk, self.want_replica, limit_s)
        self._refine = routing.refine
        ports = RolloutPorts(clock=self._live, pool=self._live, engine=self._live, inference=self._live)
        control = self._run((policy, plan, ports), batch, self._live)
        self._control = asyncio.get_running_loop().create_task(control)
        await asyncio.sleep(0)  # the loop has placed every sample when the caller goes on to submit
        return tuple(dict.fromkeys(batch.group_of[plan.order].tolist()))

    @ray.method(concurrency_group=WAITING_CALLS)
    async def wait_ended(self, timeout_s: float) -> None:
        """Return when the announced rollout's last sample is complete, at once when none runs, or at the deadline."""
        await self._on_own_loop(self._control_ended(timeout_s))

    async def report(self) -> RolloutReport | None:
        """Return what was done for the last step, when its rollout has ended; ``None`` when none was announced."""
        await self._control_ended()
        return self._step.total

    async def remaining_s(self) -> float:
        """Return the predicted seconds until the last sample of the announced rollout is complete; 0 = none runs."""
        if self._live is None or self._refine is None or self._live.is_done():
            return 0.0
        return Foresight(self._live.observe(), self._refine).remaining_s()

    async def add_servers(self, servers: dict[str, Any], tp: int | None = None) -> None:
        """Take servers in; each is one of the replicas that the rollout expects, of ``tp`` GPUs or the recipe's.

        One that died on its way in is lost; one that serves already changes nothing.
        """
        await super().add_servers(servers)
        for server in servers:
            if self._live is not None and self.book.serves(server):
                continue
            replica, is_up = self._arrived(tp, server), server in self.book.servers.loads
            if replica is not None and is_up:
                self.book.replica_ready(replica, server)
            elif replica is not None:
                self.book.lose_replica(replica)
            if not is_up:
                self._reclaim(server)
        self._look_now()

    async def give_up_expected(self, tp: int) -> None:
        """Note that one of the replicas that were expected will not come."""
        if (replica := self._arrived(tp)) is not None:
            self.book.lose_replica(replica)
        self._replace_last(tp)
        self._look_now()

    def lose_server(self, server: str, reason: str) -> None:
        """Note that a server is dead; its samples get another place, and its lease is given back, at once."""
        if server in self.book.servers.loads:
            self._reclaim(server)
        super().lose_server(server, reason)
        self._replace_last(self.desk.tp_of(server))
        self._look_now()

    def _read(self, messages: Sequence[Message]) -> None:
        if self._live is None and any(isinstance(one, SessionEnd) for one in messages):
            self._step.sample_ended()  # the last sample of a step may be one that joined without a plan
        super()._read(messages)

    def _replace_last(self, tp: int) -> None:
        """Ask for a replica in place of the last one while a validation runs, which no control loop watches."""
        is_last = not self.book.servers.has_open and not self.desk.expected
        if self._live is None and self.book.has_requests and is_last:
            self.want_replica(tp)

    def _wait_limit_s(self) -> float:
        """Return the limit of a whole start where a validation waits for the replica in place of its last one."""
        if self._live is None and self._routing is not None and self.desk.expected:
            return start_limit_s(self._routing.config)
        return super()._wait_limit_s()

    def _reclaim(self, server: str) -> None:
        if self._routing is not None and self._routing.config.is_elastic:
            self.desk.reclaim(server)

    def _arrived(self, tp: int | None, server: str | None = None) -> int | None:
        """Return the replica of the running rollout and of this size that waits longest for its server, if any does."""
        size = self.desk.arrived(tp, server)
        if self._live is None:
            return None
        starting = [r.replica for r in self._live.observe().replicas if r.state == STARTING and r.tp == size]
        return starting[0] if starting else None

    def _look_now(self) -> None:
        if self._live is not None:
            self._live.look_now()
        self.pump()

    def _on_change(self) -> None:
        if self._live is not None:
            self._live.on_change()

    async def _control_ended(self, timeout_s: float | None = None) -> None:
        if self._control is not None:
            await asyncio.wait([self._control], timeout=timeout_s)

    async def _run(self, loop: tuple[Policy, RolloutPlan, RolloutPorts], batch: Batch, live: LiveRollout) -> None:
        began_cpu_s, failure = time.process_time(), ""
        policy, plan, ports = loop
        try:
            record = await run_rollout(policy, plan, ports)
            self._learn(batch, is_refill=self._step.has_part_of(batch.step))
        except Exception as error:  # the trainer is told, when every sample is complete
            logger.exception("rlhfless: step %d: the control loop failed", batch.step)
            failure = f"the control loop of step {batch.step} failed: {error!r}"
            record, further = await self._without_decisions(plan, ports)
            failure += further
        report = RolloutReport(
            step=batch.step,
            num_samples=batch.num_samples + self._step.num_joined,
            num_looks=record.num_looks,
            num_migrations=record.num_migrations,
            num_late=self.book.num_late,
            rollout_s=self._step.rollout_s,
            router_cpu_s=time.process_time() - began_cpu_s,
            failure=failure,
            num_released=live.num_released,
            num_started=self.desk.num_started,
        )
        self._step.add(report)
        live.close()
        self._live = None

    async def _without_decisions(self, plan: RolloutPlan, ports: RolloutPorts) -> tuple[RolloutRecord, str]:
        """Wait for the end of a rollout whose policy failed; return why that failed too, if it did.

        Lost samples move to replicas that live. Once none does, their requests are refused.
        """
        try:
            return await run_rollout(NoReaction(), replace(plan, fleet=(), first_look_s=0.0), ports), ""
        except Exception as error:
            logger.exception("rlhfless: nothing brings the samples of a lost replica to another one any more")
            while not ports.engine.is_done():
                await ports.clock.wait(_NEVER_S)
            return RolloutRecord(), f", and then {error!r}"


def start_limit_s(config: RlhflessConfig) -> float:
    """Return a time after which the fleet has told how a start ended [s].

    Twice what its parts may take, and the trainer's way to the host before them.
    """
    pool = config.pool
    return pool.resume_timeout_s + 2 * (pool.grant_timeout_s + pool.start_timeout_s + config.weights.pull_timeout_s)


RolloutRouterActor = ray.remote(**ACTOR_OPTIONS)(RolloutRouter)
"""What the router plugin's YAML names."""
