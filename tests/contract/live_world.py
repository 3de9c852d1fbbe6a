"""The live pool without GPUs and engines as a world of the contract of pools.

It is our router, its control ports and the fleet; only leases, engines and clients are played here.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from tests.contract.pool_worlds import PROMPT_TOKENS, STEP, Watch, batch_of
from tests.unit.live.routed import Letters, settings
from tests.unit.live.test_fleet import FakeWarmPool
from verl_rlhfless.control import RolloutRecord, run_rollout
from verl_rlhfless.errors import LeaseTimeoutError
from verl_rlhfless.live import fleet as fleet_module
from verl_rlhfless.live import rollout_router as router_module
from verl_rlhfless.live.announcement import Announcement, Group
from verl_rlhfless.live.events import EventLog
from verl_rlhfless.live.fleet import Fleet
from verl_rlhfless.live.replica_life import ReleaseReport, WeightSource
from verl_rlhfless.live.rollout import LiveRollout
from verl_rlhfless.live.rollout_router import RolloutRouter
from verl_rlhfless.live.samples import Rollout
from verl_rlhfless.live.tickets import Delta, Message, Outcome, OutcomeKind, Part, RouterSettings, SessionEnd, Ticket
from verl_rlhfless.policy.arm import Policy
from verl_rlhfless.policy.snapshot import RolloutPlan, RolloutView
from verl_rlhfless.ports import RolloutPorts
from verl_rlhfless.types import FleetDecision, LeaseSpan, ReplicaSpec

_PER_TICK = 5


@dataclass
class Lease:
    """A GPU from grant to release, in ticks."""

    name: str
    gpus: Gpus
    granted_s: float
    released_s: float | None = None

    @property
    def gpu_s(self) -> float:
        return (self.gpus.now if self.released_s is None else self.released_s) - self.granted_s

    def release(self) -> None:
        if self.released_s is None:
            self.released_s = self.gpus.now
            self.gpus.give_back()


class Gpus:
    """As many as the budget; whoever finds none waits. ``now`` counts the ticks."""

    def __init__(self, count: int) -> None:
        self.now = 0
        self.leases: list[Lease] = []
        self._free = threading.Semaphore(count)

    def lease(self, name: str, over: threading.Event) -> Lease:
        while not self._free.acquire(timeout=0.02):
            if over.is_set():
                raise LeaseTimeoutError("the rollout is over")
        self.leases.append(lease := Lease(name, self, self.now))
        return lease

    def give_back(self) -> None:
        self._free.release()


@dataclass
class Engine:
    """A replica's process: the requests that run on it."""

    running: dict[str, Session] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)
    is_dead: bool = False

    @property
    def abort(self) -> Any:
        return SimpleNamespace(remote=self.aborted.update)


@dataclass
class Session:
    """A client's request: what it wants, what it holds, and what its present attempt has made."""

    ticket: Ticket
    target: int
    held: int = 0
    made: int = 0


class Replica:
    """An elastic replica as far as the fleet uses it."""

    gpus: Gpus

    def __init__(self, rank: int, rollout: Any, *others: Any) -> None:
        *_, self._over = others
        self.name, self.server_address = f"r{rank}", f"host:{rank}"
        self.world_size, self.engine_s = rollout.tensor_model_parallel_size, 0.0
        self.server_handle = Engine()
        self.lease: Lease | None = None
        self.state = SimpleNamespace(value="released")

    async def start(self, weights: WeightSource, lease: Lease | None) -> Any:
        self.lease = await asyncio.to_thread(self.gpus.lease, self.name, self._over)
        return SimpleNamespace(version=weights.version, checksum="", seconds=0.0, num_bytes=1)

    @property
    def holds_lease(self) -> bool:
        return self.lease is not None and self.lease.released_s is None

    async def is_lost(self) -> bool:
        return self.server_handle.is_dead

    async def host_available_bytes(self) -> int:
        return 0

    async def release(self) -> ReleaseReport:
        while self.server_handle.running and not self.server_handle.is_dead:
            await asyncio.sleep(0.001)
        assert self.lease is not None
        self.lease.release()
        return ReleaseReport(True, 0.0, 0.0, 0.0)


class Remote:
    """The router as the fleet's thread reaches it."""

    def __init__(self, router: RolloutRouter) -> None:
        self._router, self._loop = router, asyncio.get_running_loop()

    def __getattr__(self, method: str) -> Any:
        def remote(*args: Any) -> Call:
            return Call(asyncio.run_coroutine_threadsafe(getattr(self._router, method)(*args), self._loop))

        return SimpleNamespace(remote=remote)


@dataclass(eq=False)
class Call:
    """A call's answer, for one who awaits it and for one who blocks."""

    answer: Future[Any]

    def __await__(self) -> Any:
        return asyncio.wrap_future(self.answer).__await__()


class LiveWorld:
    """The router and the fleet of a run, and clients that ask for every sample's tokens at once."""

    look_s = 0.005

    def __init__(self, targets: Sequence[int], budget: int, patch: pytest.MonkeyPatch) -> None:
        self._gpus = Gpus(budget)
        patch.setattr(router_module, "import_in_background", lambda module: None)
        patch.setattr(fleet_module, "ElasticReplica", type("Ours", (Replica,), {"gpus": self._gpus}))
        patch.setattr(fleet_module.ray, "get", lambda call, **_: call.answer.result(10))
        self._targets, self._budget = targets, budget
        self._watch = Watch(targets, budget)
        self._messages: list[Message] = []
        self._sessions: dict[str, Session] = {}
        self._servers: dict[str, Engine] = {}

    async def open(self) -> None:
        """Announce the rollout and submit its prompts; replicas come later."""
        self._router = router = RolloutRouter({})
        self._letters = Letters(router)
        routing = replace(settings("elastic"), replica_gpus=self._budget)
        await router.configure_rollouts(RouterSettings(), routing)
        run = OmegaConf.create({"actor_rollout_ref": {"rollout": {"tensor_model_parallel_size": 1}, "model": {}}})
        warm: Any = FakeWarmPool()
        self._fleet = Fleet(run, routing.config, Remote(router), EventLog(None), warm)
        self._fleet.parking.is_last = True  # nothing is parked
        count = len(self._targets)
        announced = Announcement(STEP, tuple(Group(f"u{i}", f"p{i}", i, 1, PROMPT_TOKENS) for i in range(count)), 100)
        pool: Any = None  # nothing here asks for it
        predicted = np.full(count, 100.0)
        router.begin(Rollout(batch_of(count), announced.samples(), np.arange(count), predicted, pool))
        for sample, key in enumerate(announced.samples()):
            ticket = Ticket(f"t{sample}", "w", f"s{sample}", key, PROMPT_TOKENS)
            self._sessions[ticket.id] = Session(ticket, self._targets[sample])
            self._messages.append(ticket)

    async def begin(self, num_replicas: int) -> None:
        await self._expect(num_replicas)
        self._rollout.start([1] * num_replicas)

    async def _expect(self, num_replicas: int) -> None:
        decision = FleetDecision(STEP, (ReplicaSpec(1),) * num_replicas, "scripted")
        await asyncio.to_thread(self._fleet.expect, decision)
        router = self._router
        self._rollout = live = router._live = LiveRollout(router, router.desk, router.want_replica, 600.0)
        self.ports = RolloutPorts(live, live, live, live)
        self._fleet.start(decision, WeightSource("store", STEP - 1, 1.0))

    async def until(self, is_so: Callable[[RolloutView], bool]) -> RolloutView:
        deadline = time.monotonic() + 30
        while not is_so(view := self._watch.check(self._rollout.observe())):
            assert time.monotonic() < deadline, view
            await self._tick()
        return view

    async def _tick(self) -> None:
        """Every running request gets a few tokens; those that end, or were cut or lost, are reported."""
        self._gpus.now += 1
        for name, server in self._servers.items():
            if not server.is_dead:
                await self._generate(name, server)
        messages, self._messages = self._messages, []
        batch = await self._letters.send(messages)
        self._servers |= batch.servers
        for grant in batch.grants:
            assert not self._servers[grant.server].is_dead, "sent to a dead replica"
            self._servers[grant.server].running[grant.attempt] = self._sessions[grant.ticket]
        await asyncio.sleep(0.001)

    async def _generate(self, name: str, server: Engine) -> None:
        parts = []
        for attempt, session in list(server.running.items()):
            new = min(_PER_TICK, session.target - session.held - session.made)
            parts.append(Part(attempt, session.made, [0] * new, []))
            session.made += new
            if session.held + session.made == session.target:
                self._report(server, attempt, OutcomeKind.DONE)
            elif attempt in server.aborted:
                self._report(server, attempt, OutcomeKind.CUT)
        await self._router.progress(name, Delta(tuple(parts), STEP - 1))

    def _report(self, server: Engine, attempt: str, kind: OutcomeKind) -> None:
        session = server.running.pop(attempt)
        session.held, session.made = session.held + session.made, 0
        self._messages.append(Outcome(session.ticket.id, attempt, kind, session.held))
        if kind is OutcomeKind.DONE:
            assert session.ticket.sample is not None
            self._messages.append(SessionEnd(session.ticket.sample))

    async def control(self, policy: Policy, plan: RolloutPlan) -> RolloutRecord:
        await self._expect(len(plan.fleet))
        loop = asyncio.create_task(run_rollout(policy, plan, self.ports))
        try:
            await self.until(lambda view: loop.done())
        finally:
            while not loop.done():
                loop.cancel()  # again: a wait that ends at the same moment takes no notice
                await asyncio.sleep(0)
        return loop.result()

    def lose(self, replica: int) -> None:
        name = self._router.book._announced().replicas[replica].server
        assert name is not None
        server = self._servers[name]
        server.is_dead = True
        self._router.lose_server(name, "killed")
        self._watch.lost(self._rollout.observe())
        for attempt, session in list(server.running.items()):
            session.made = len(self._router.journal.read(attempt).tokens)
            self._report(server, attempt, OutcomeKind.LOST)

    async def close(self) -> None:
        for server in self._servers.values():
            server.running.clear()  # of a test that failed half-way: nobody waits for it
        await asyncio.to_thread(self._fleet.close)

    def leases(self) -> list[LeaseSpan]:
        return [LeaseSpan(x.name, "replica", 1, x.granted_s, x.granted_s, x.released_s) for x in self._gpus.leases]

    def gpu_s(self) -> float:
        return self._fleet.gpu_s
