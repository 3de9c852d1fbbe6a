"""A whole simulated run of one arm over a trace.

Init, then for each step sync or publish, rollout, trainer phases, account. A trainer that keeps its lease stays beside
the replicas.

Invariant: the same arm, trace, cluster, model and seed give an identical record.
"""

from __future__ import annotations

from collections.abc import Coroutine, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import simpy

from verl_rlhfless.control import RolloutRecord, run_rollout
from verl_rlhfless.ledger import account, usd, whole_run
from verl_rlhfless.policy.arm import Arm, Outcome
from verl_rlhfless.policy.snapshot import PoolSnapshot, RolloutPlan
from verl_rlhfless.ports import RolloutPorts
from verl_rlhfless.sim.cluster import Cluster
from verl_rlhfless.sim.leases import Lease, LeaseBook
from verl_rlhfless.sim.records import RunRecord, StepRecord, fleet_text
from verl_rlhfless.sim.rollout import SimRollout
from verl_rlhfless.sim.workload import StepData
from verl_rlhfless.types import BusySpan, Window


@dataclass
class ArmRun:
    """One arm on one cluster.

    Attributes:
        arm: What decides.
        cluster: Nodes, prices and outages.
        pool: What may be leased while every node is up.
        data: The steps.
        parked_charge: Share of the price that a parked engine's GPUs cost (sensitivity).
        seed: Shifts the availability trace of preemptible nodes; 0 = not at all.
    """

    arm: Arm
    cluster: Cluster
    pool: PoolSnapshot
    data: Sequence[StepData]
    parked_charge: float = 0.0
    seed: int = 0
    _steps: list[StepRecord] = field(default_factory=list)

    def run(self) -> RunRecord:
        """Return the record of the whole run."""
        env = simpy.Environment()
        self._env = env
        self._book = LeaseBook(env, self.cluster)
        self._rollout: SimRollout | None = None
        for node in range(len(self.cluster.outages)):
            env.process(self._outages(node))
        main = env.process(self._main())
        env.run(until=main)
        return self._total()

    # ---- the run ----

    def _main(self) -> Generator[simpy.Event, Any, None]:
        env = self._env
        memory = self.arm.begin(self.pool, self.data[0].batch)
        yield from self._lease_trainer(self.pool.trainer.times.cold_start_s)
        yield from self._start_engines(self.arm.layout(memory, self.pool))
        self._trainer.usable_s = env.now
        self._init_s = env.now
        for step in self.data:
            yield from self._step(step, memory)
            outcome = Outcome(step.batch, step.lengths, self._took_s, self._plan, self._hidden_s)
            memory = self.arm.learn(memory, outcome)
        self._book.release(self._trainer)

    def _start_engines(self, layout: Mapping[int, int]) -> Generator[simpy.Event, Any, None]:
        """Start the first engines: on the trainer's lease, or on their own when they need fewer GPUs than it holds.

        Those that the trainer's lease has no room for get leases of their own. A trainer that keeps its lease has none
        on it.
        """
        env, pool, times = self._env, self.pool, self.pool.trainer.times
        num_gpus = sum(tp * count for tp, count in layout.items())
        if num_gpus >= pool.trainer.num_gpus and not pool.keeps_trainer:
            room = {tp: min(count, pool.trainer.num_gpus // tp) for tp, count in layout.items()}
            beyond = {tp: count - room[tp] for tp, count in layout.items() if count > room[tp]}
            leased = env.process(self._start_leased(beyond)) if beyond else None
            for tp, count in sorted(room.items()):
                yield env.timeout(times.cold_start_s)
                self._park(tp, count)
            if leased is not None:
                yield leased
            return
        if not pool.keeps_trainer:
            yield env.timeout(pool.trainer.state_copy_s)
            self._book.release(self._trainer)
        yield from self._start_leased(layout)
        if not pool.keeps_trainer:
            yield from self._lease_trainer(times.resume_s + pool.trainer.state_copy_s)

    def _start_leased(self, layout: Mapping[int, int]) -> Generator[simpy.Event, Any, None]:
        """Start engines on leases of their own; those that are not granted meanwhile are not started."""
        times = self.pool.trainer.times
        leases: list[tuple[Lease, int]] = []
        asks = [
            self._book.request("replica", tp, partial(_note, leases, tp), times.grant_s)
            for tp, count in sorted(layout.items(), reverse=True)
            for _ in range(count)
        ]
        yield self._env.timeout(times.grant_s + times.cold_start_s)
        for lease, tp in leases:
            self._book.release(lease, tp)
        for ask in asks:
            self._book.withdraw(ask)

    def _lease_trainer(self, start_s: float) -> Generator[simpy.Event, Any, None]:
        """Wait for the trainer's lease, then ``start_s`` seconds until its ranks are usable."""
        env = self._env
        got = env.event()
        num_gpus, delay = self.pool.trainer.num_gpus, self.pool.trainer.times.grant_s
        self._book.request_gpus("trainer", num_gpus, lambda lease: _fire(got, lease), delay)
        self._trainer: Lease = yield got
        yield env.timeout(start_s)

    def _step(self, step: StepData, memory: Any) -> Generator[simpy.Event, Any, None]:
        """Run one step: plan, publish and leave where the plan is elastic, rollout, take over, train, record."""
        env, trainer, keeps_trainer = self._env, self.pool.trainer, self.pool.keeps_trainer
        began_s = env.now
        held = trainer.num_gpus if keeps_trainer else 0
        beside = self._book.warm_gpus(self._trainer)
        num_gpus = self._book.num_up - held
        snapshot = replace(self.pool, num_gpus=num_gpus, warm=self._book.warm_gpus(), warm_beside=beside)
        plan = self.arm.plan(memory, snapshot, step.batch)
        leaves = not plan.is_resident and not keeps_trainer
        if not plan.is_resident or self.pool.shares_engines:
            yield env.timeout(trainer.publish_s + (trainer.state_copy_s if leaves else 0.0))
            self._trainer_was_busy(began_s)
        if leaves:
            self._book.release(self._trainer)
        if step.min_start_s is not None:
            step = replace(step, min_start_s=step.min_start_s - (env.now - began_s))
        self._plan = plan
        rollout = SimRollout(self._book, snapshot, step, plan, self._trainer.lease_id)
        self._rollout = rollout
        ports = RolloutPorts(clock=rollout, pool=rollout, engine=rollout, inference=rollout)
        record: RolloutRecord = yield env.process(_drive(run_rollout(self.arm.policy(memory, step.batch), plan, ports)))
        self._rollout = None
        gen_s = rollout.now_s()
        yield from self._take_over(plan)
        waited_s = yield from self._train(step, rollout)
        self._record(step, plan, (rollout, record), (began_s, gen_s, waited_s))

    def _take_over(self, plan: RolloutPlan) -> Generator[simpy.Event, Any, None]:
        """The rollout is over: engines on the trainer's lease go to sleep, or the trainer gets a lease again."""
        trainer, times = self.pool.trainer, self.pool.trainer.times
        if not plan.is_resident:
            if not self.pool.keeps_trainer:
                yield from self._lease_trainer(times.resume_s + trainer.state_copy_s)
                self._trainer.usable_s = self._env.now
            return
        if self.pool.shares_engines:
            yield self._env.timeout(times.park_s)
            return
        for tp in set(plan.fleet):
            self._park(tp, plan.fleet.count(tp))
        yield self._env.timeout(times.hybrid_sleep_s)

    def _train(self, step: StepData, rollout: SimRollout) -> Generator[simpy.Event, Any, float]:
        """Run the trainer's phases; return how long the update had to wait for the last reward."""
        env, trainer = self._env, self.pool.trainer
        tokens = int(step.batch.prompt_tokens.sum() + step.lengths.sum())
        context = tokens / step.batch.num_samples
        began_s = env.now
        left_s = trainer.inference_s(tokens - rollout.inference.done_tokens, context)
        self._hidden_s = trainer.inference_s(tokens, context) - left_s
        yield env.timeout(left_s)
        self._trainer_was_busy(began_s)
        waited_s = 0.0
        if step.score_s is not None:
            waited_s = max(0.0, rollout.begin_s + float((rollout.finished_s + step.score_s).max()) - env.now)
            yield env.timeout(waited_s)
        began_s = env.now
        yield env.timeout(trainer.update_s(tokens, context))
        self._trainer_was_busy(began_s)
        return waited_s

    def _trainer_was_busy(self, since_s: float) -> None:
        lease = self._trainer
        self._book.busy.append(BusySpan(lease.lease_id, len(lease.gpus), since_s, self._env.now))

    def _park(self, tp: int, count: int) -> None:
        """Note that engines of one size sleep on the first GPUs."""
        for first in range(0, count * tp, tp):
            self._book.park(divmod(first, self.cluster.gpus_per_node), tp)

    def _record(
        self,
        step: StepData,
        plan: RolloutPlan,
        done: tuple[SimRollout, RolloutRecord],
        times: tuple[float, float, float],
    ) -> None:
        """Append the record of a step that ends now.

        Args:
            step: Its prompts and lengths.
            plan: Its plan.
            done: Its rollout, and what the control loop did.
            times: When it began, how long the rollout took, and how long the update waited for rewards.
        """
        (rollout, record), (began, gen_s, waited_s) = done, times
        window = Window(began, self._env.now)
        leases, busy = self._book.settle()
        used = account(leases, busy, window)
        parked = self._book.settle_parked()
        cost = used.allocated + self.parked_charge * parked
        self._took_s = window.end_s - began
        price = self.cluster.usd_per_gpu_h
        self._steps.append(
            StepRecord(
                step=step.batch.step,
                step_s=self._took_s,
                gen_s=gen_s,
                gpu_s_allocated=used.allocated,
                gpu_s_busy=used.busy,
                gpu_s_idle=used.idle,
                gpu_s_startup=used.startup,
                gpu_s_parked=parked,
                gpu_lease_usd=usd(cost, price),
                node_usd=usd(self._book.node_seconds(window) * self.cluster.gpus_per_node, price),
                num_migrations=record.num_migrations,
                num_lost_replicas=rollout.replicas.num_lost,
                num_preemptions=rollout.replicas.num_preemptions,
                prefill_tokens=rollout.replicas.prefill_tokens,
                distinct_prompt_tokens=rollout.distinct_prompt_tokens,
                tokens=int(step.lengths.sum()),
                fused_tokens=rollout.inference.done_tokens,
                score_wait_s=waited_s,
                fleet=fleet_text(plan, record),
                reason=plan.reason,
                predicted_step_s=plan.predicted_step_s,
            )
        )

    def _total(self) -> RunRecord:
        spans = [lease.span() for lease in self._book.leases]
        window = whole_run(spans, self._env.now)
        used = account(spans, self._book.busy, window)
        parked = sum(step.gpu_s_parked for step in self._steps)
        price = self.cluster.usd_per_gpu_h
        return RunRecord(
            steps=tuple(self._steps),
            init_s=self._init_s,
            wall_s=window.end_s - window.start_s,
            gpu_s_allocated=used.allocated,
            gpu_s_busy=used.busy,
            gpu_s_idle=used.idle,
            gpu_s_startup=used.startup,
            gpu_s_parked=parked,
            gpu_lease_usd=usd(used.allocated + self.parked_charge * parked, price),
            node_usd=usd(self._book.node_seconds() * self.cluster.gpus_per_node, price),
            max_gpus=used.max_gpus,
        )

    def _outages(self, index: int) -> Generator[simpy.Event, Any, None]:
        """Take one preemptible node, ``index`` among these, down and up as its availability trace says, for ever."""
        env, node = self._env, self.cluster.num_nodes - len(self.cluster.outages) + index
        shift_s = float(np.random.default_rng(self.seed).uniform(0.0, self.cluster.period_s)) if self.seed else 0.0
        yield env.timeout(shift_s)
        period = 0
        while True:
            for down_s, up_s in self.cluster.outages[index]:
                down_s, up_s = down_s + shift_s, up_s + shift_s
                yield env.timeout(max(0.0, period * self.cluster.period_s + down_s - env.now))
                self._book.set_node(node, is_up=False)
                if self._rollout is not None:
                    self._rollout.lose_node(node)
                yield env.timeout(max(0.0, period * self.cluster.period_s + up_s - env.now))
                self._book.set_node(node, is_up=True)
            period += 1
            yield env.timeout(max(0.0, period * self.cluster.period_s + shift_s - env.now))


def _drive(coroutine: Coroutine[Any, Any, RolloutRecord]) -> Generator[simpy.Event, Any, RolloutRecord]:
    """Run an awaiting coroutine as a SimPy process: what it awaits are SimPy events."""
    value: Any = None
    while True:
        try:
            event = coroutine.send(value)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        value = yield event


def _fire(event: simpy.Event, value: Lease) -> None:
    event.succeed(value)


def _note(leases: list[tuple[Lease, int]], tp: int, lease: Lease, _is_warm: bool) -> None:
    leases.append((lease, tp))
