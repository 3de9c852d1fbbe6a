"""The control loop on live requests: the simulator's own loop, as a task inside the router's process.

Decisions and their effect are direct calls; only cuts and grants leave the process.

Invariants: one announced rollout at a time, and what comes while it runs is served without a plan; when a policy fails,
its rollout ends without further decisions, and the trainer is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import ray

from verl_rlhfless.control import run_rollout
from verl_rlhfless.errors import ReplicaError, UnsupportedError
from verl_rlhfless.live.announcement import Announcement
from verl_rlhfless.live.preload import SERVER_MODULE, import_in_background
from verl_rlhfless.live.router import ACTOR_OPTIONS, WAITING, Router
from verl_rlhfless.live.routing import RoutingSettings
from verl_rlhfless.live.samples import Rollout
from verl_rlhfless.live.tickets import RouterSettings
from verl_rlhfless.policy.arm import Policy
from verl_rlhfless.policy.balance import remaining_s
from verl_rlhfless.policy.baselines.stock import NoReaction
from verl_rlhfless.policy.predict import LengthModel, Prediction, learn
from verl_rlhfless.policy.snapshot import FINISHED, STARTING, Batch, IntArray, RolloutPlan, RolloutView
from verl_rlhfless.ports import RolloutPorts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RolloutReport:
    """What the router did for one announced rollout.

    Attributes:
        step: Training step.
        num_samples: Samples that were announced.
        num_looks: How often the policy was asked.
        num_migrations: Running samples that were cut to continue elsewhere.
        num_late: Messages about attempts that had ended already, since the start of the run.
        rollout_s: From the announcement to the last sample's end.
        router_cpu_s: CPU time of the router's process meanwhile: requests, journal and decisions.
        failure: Why no decisions were made to the end; empty when they were.
    """

    step: int
    num_samples: int
    num_looks: int
    num_migrations: int
    num_late: int
    rollout_s: float
    router_cpu_s: float
    failure: str = ""


class LiveRollout:
    """The ports of one rollout over the router's book."""

    def __init__(self, router: RolloutRouter, step: int, servers: Sequence[str], num_expected: int) -> None:
        self._router, self._book = router, router.book
        self._num_expected = num_expected
        self._version = step - 1  # every token of a step comes from the weights of the step before
        self._servers = list(servers)
        self._began_s = time.monotonic()
        self._changed = asyncio.Event()
        self._was_dry = False

    # ---- clock

    def now_s(self) -> float:
        """Return the seconds since the rollout was announced."""
        return time.monotonic() - self._began_s

    async def wait(self, until_s: float) -> None:
        """Return at ``until_s``, or when a replica came or went or ran dry, or all samples are complete."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._changed.wait(), max(0.0, until_s - self.now_s()))
        self._changed.clear()

    def look_now(self) -> None:
        """End the wait: a replica came or went."""
        self._changed.set()

    def on_change(self) -> None:
        """Take note of any change of the book; most need no decision."""
        is_dry = self._book.has_dry_replica()
        if self._book.is_done or (is_dry and not self._was_dry):
            self._changed.set()
        self._was_dry = is_dry

    # ---- replicas

    def start(self, tps: Sequence[int]) -> None:
        """Add replicas; those whose server is up are ready, the others are expected or asked for."""
        for tp in tps:
            if self._servers:
                self._book.add_replica(tp, self._servers.pop(0))
                continue
            replica = self._book.add_replica(tp)
            if self._num_expected:
                self._num_expected -= 1
            elif not self._router.want_replica(tp):
                self._book.lose_replica(replica)

    def release(self, replicas: Sequence[int]) -> None:
        """Give replicas no more work."""
        for replica in replicas:
            self._book.drain_replica(replica)

    # ---- requests

    def place(self, samples: IntArray, replica: int) -> None:
        """Send samples to a replica; running ones are cut and continue there."""
        self._router.place(samples, replica)

    def observe(self) -> RolloutView:
        """Return the rollout as it is now."""
        return self._book.view(self.now_s())

    def is_done(self) -> bool:
        """Return whether every announced sample is complete."""
        return self._book.is_done

    # ---- what routing never asks for

    def fuse(self, num_gpus: int) -> None:
        """Refuse: inference starts after the rollout.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(f"fusing inference on {num_gpus} GPUs is not supported in live runs yet.")

    def version(self) -> int:
        """Return the weight version of the rollout."""
        return self._version


class RolloutRouter(Router):
    """The router of a run of ours: it also plans and controls every rollout that is announced."""

    def __init__(self, servers: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> None:
        super().__init__(servers, options)
        import_in_background(SERVER_MODULE)
        self._routing: RoutingSettings | None = None
        self._lengths = LengthModel()
        self._num_expected = self._num_wanted = 0
        self._wanted: asyncio.Queue[int | None] = asyncio.Queue()
        self._live: LiveRollout | None = None
        self._refine: Callable[[RolloutView], Prediction] | None = None
        self._control: asyncio.Task[None] | None = None
        self._report: RolloutReport | None = None
        self.listeners.append(self._on_change)

    async def configure_rollouts(self, settings: RouterSettings, routing: RoutingSettings) -> None:
        """Take the settings of a run, before its first rollout."""
        self._routing = routing
        await self.configure(settings)

    async def expect(self, num_replicas: int) -> None:
        """Note how many replicas are on their way to the next rollout."""
        self._num_expected = num_replicas

    def want_replica(self, tp: int) -> bool:
        """Ask the fleet for a replica in place of lost ones; return whether one may come.

        Resident replicas can't be replaced, and a rollout that loses one after the other is not worth more leases.
        """
        assert self._routing is not None
        if not self._routing.config.is_elastic or self._num_wanted >= self.settings.max_retries:
            return False
        self._num_wanted += 1
        self._num_expected += 1
        self._wanted.put_nowait(tp)
        return True

    @ray.method(concurrency_group=WAITING)
    async def wanted(self) -> int | None:
        """Return the tensor-parallel size of a replica as soon as one more is needed, ``None`` once none will be."""
        return await self._on_own_loop(self._wanted.get())

    async def stop_wanting(self) -> None:
        """End the call that waits in ``wanted``: the fleet is released."""
        self._wanted.put_nowait(None)

    async def announce(self, announced: Announcement) -> None:
        """Plan a step for the replicas that are up or expected; prompts may be submitted from then on.

        Raises:
            ReplicaError: No replica is up and none is expected.
        """
        if not self.book.is_done:
            logger.info("rlhfless: step %d: further prompts join without a plan", announced.step)
            return
        await self._control_ended()
        assert self._routing is not None, "a router is configured before its first rollout"
        servers = await self.get_all_servers()
        count = len(servers) + self._num_expected
        if not count:
            raise ReplicaError(f"step {announced.step}: no rollout replica is up. Look for the replicas' errors above.")
        batch = announced.batch()
        arm = self._routing.arm(announced, count)
        pool = self._routing.pool(count)
        plan = arm.plan(self._lengths, pool, batch)
        predicted = arm.predict(self._lengths, batch).mean()
        rank = np.empty_like(plan.order)
        rank[plan.order] = np.arange(len(rank))
        self.begin(Rollout(batch, announced.samples(), rank, predicted, pool))
        self._live = LiveRollout(self, announced.step, servers, self._num_expected)
        self._refine = partial(arm.refine, self._lengths)
        self._num_wanted = 0
        ports = RolloutPorts(self._live, self._live, self._live, self._live, self._live)
        control = self._run((arm.policy(self._lengths), plan, ports), batch, self._live)
        self._control = asyncio.get_running_loop().create_task(control)
        await asyncio.sleep(0)  # the loop has placed every sample when the caller goes on to submit

    async def report(self) -> RolloutReport | None:
        """Return what was done for the last rollout, when it has ended; ``None`` when none was announced."""
        await self._control_ended()
        return self._report

    async def remaining_s(self) -> float:
        """Return the predicted seconds until the last sample of the announced rollout is complete; 0 = none runs."""
        if self._live is None or self._refine is None or self._live.is_done():
            return 0.0
        view = self._live.observe()
        return remaining_s(view, self._refine(view))

    async def lengths(self) -> str:
        """Return the length history as JSON text, for the checkpoint."""
        return self._lengths.to_json()

    async def restore_lengths(self, text: str) -> None:
        """Take a length history from a checkpoint.

        Raises:
            DataError: The text is no such history.
        """
        self._lengths = LengthModel.from_json(text)

    async def add_servers(self, servers: dict[str, Any]) -> None:
        """Take servers in; each is one of the replicas that the rollout expects."""
        await super().add_servers(servers)
        for server in servers:
            if server in self.book.servers.loads and (replica := self._arrived()) is not None:
                self.book.replica_ready(replica, server)
        self._look_now()

    async def give_up_expected(self) -> None:
        """Note that one of the replicas that were expected will not come."""
        if (replica := self._arrived()) is not None:
            self.book.lose_replica(replica)
        self._look_now()

    def lose_server(self, server: str, reason: str) -> None:
        """Note that a server is dead; its samples get another place at once."""
        super().lose_server(server, reason)
        self._look_now()

    def _arrived(self) -> int | None:
        """Return the replica of the running rollout that waits longest for its server, if any does."""
        self._num_expected = max(0, self._num_expected - 1)
        if self._live is None:
            return None
        starting = [r.replica for r in self._live.observe().replicas if r.state == STARTING]
        return starting[0] if starting else None

    def _look_now(self) -> None:
        if self._live is not None:
            self._live.look_now()
        self.pump()

    def _on_change(self) -> None:
        if self._live is not None:
            self._live.on_change()

    async def _control_ended(self) -> None:
        if self._control is not None:
            await asyncio.wait([self._control])

    async def _run(self, loop: tuple[Policy, RolloutPlan, RolloutPorts], batch: Batch, live: LiveRollout) -> None:
        began_cpu_s, failure = time.process_time(), ""
        policy, plan, ports = loop
        try:
            record = await run_rollout(policy, plan, ports)
            self._learn(batch)
        except Exception as error:  # the trainer is told, when every sample is complete
            logger.exception("rlhfless: step %d: the control loop failed", batch.step)
            failure = f"the control loop of step {batch.step} failed: {error!r}"
            record = await run_rollout(NoReaction(), replace(plan, fleet=(), first_look_s=0.0), ports)
        self._report = RolloutReport(
            step=batch.step,
            num_samples=batch.num_samples,
            num_looks=record.num_looks,
            num_migrations=record.num_migrations,
            num_late=self.book.num_late,
            rollout_s=live.now_s(),
            router_cpu_s=time.process_time() - began_cpu_s,
            failure=failure,
        )
        self._live = None

    def _learn(self, batch: Batch) -> None:
        view = self.book.view(0.0)
        if (view.generated > 0).all() and (view.state == FINISHED).all():
            self._lengths = learn(self._lengths, batch, view.generated)


RolloutRouterActor = ray.remote(**ACTOR_OPTIONS)(RolloutRouter)
"""What the router plugin's YAML names."""
