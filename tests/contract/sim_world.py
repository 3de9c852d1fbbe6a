"""The simulator's rollout as a world of the contract of pools."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import simpy

from tests.contract.pool_worlds import Watch, batch_of, plan_of
from tests.unit.sim.cases import cell
from verl_rlhfless.control import RolloutRecord, run_rollout
from verl_rlhfless.ledger import account, whole_run
from verl_rlhfless.policy.arm import Policy
from verl_rlhfless.policy.gpus import GPUS
from verl_rlhfless.policy.snapshot import RolloutPlan, RolloutView
from verl_rlhfless.ports import RolloutPorts
from verl_rlhfless.sim.cluster import Cluster
from verl_rlhfless.sim.leases import LeaseBook
from verl_rlhfless.sim.rollout import SimRollout
from verl_rlhfless.sim.run import _drive
from verl_rlhfless.sim.workload import StepData
from verl_rlhfless.types import LeaseSpan


class SimWorld:
    """The simulator's rollout, on nodes of one GPU."""

    look_s = 0.2

    def __init__(self, targets: Sequence[int], budget: int) -> None:
        step = StepData(batch_of(len(targets)), np.array(targets))
        one = cell((step,), Cluster("nodes", GPUS["L40S"], budget, 1, 3.6), cold_start_s=1.0)
        self._env = simpy.Environment()
        self._book = LeaseBook(self._env, one.cluster)
        plan = plan_of((), [-1] * len(targets))
        self._rollout = SimRollout(self._book, one.pool, step, plan, "trainer")
        self._watch = Watch(targets, budget)
        self._deadline_s = 3600.0
        self.ports = RolloutPorts(self._rollout, self._rollout, self._rollout, self._rollout)

    async def open(self) -> None:
        pass

    async def begin(self, num_replicas: int) -> None:
        self._rollout.start([1] * num_replicas)

    async def until(self, is_so: Callable[[RolloutView], bool]) -> RolloutView:
        while not is_so(view := self._watch.check(self._rollout.observe())):
            assert self._env.now < self._deadline_s, view
            self._env.run(until=self._env.now + 0.05)
        return view

    async def control(self, policy: Policy, plan: RolloutPlan) -> RolloutRecord:
        loop = self._env.process(_drive(run_rollout(policy, plan, self.ports)))
        await self.until(lambda view: not loop.is_alive)
        assert isinstance(loop.value, RolloutRecord)
        return loop.value

    def lose(self, replica: int) -> None:
        lease = self._rollout.replicas.all[replica].lease
        assert lease is not None
        ((node, _),) = lease.gpus
        self._book.set_node(node, is_up=False)
        self._rollout.lose_node(node)
        self._book.set_node(node, is_up=True)
        self._watch.lost(self._rollout.observe())

    async def close(self) -> None:
        self._env.run(until=self._env.now + 10.0)

    def leases(self) -> list[LeaseSpan]:
        return [lease.span() for lease in self._book.leases]

    def gpu_s(self) -> float:
        used = account(self.leases(), self._book.busy, whole_run(self.leases(), self._env.now))
        assert used.busy + used.idle + used.startup == pytest.approx(used.allocated)
        return used.allocated
