"""A whole simulated run of one arm over a trace.

Init, then for each step sync or publish, rollout, trainer phases, account.

Invariant: the same arm, trace, cluster, model and seed give an identical record.
"""

from __future__ import annotations

from collections.abc import Coroutine, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import simpy

from verl_rlhfless.control import RolloutRecord, run_rollout
from verl_rlhfless.ledger import account, usd, whole_run
from verl_rlhfless.policy.arm import Arm, Outcome
from verl_rlhfless.policy.snapshot import Batch, IntArray, PoolSnapshot, RolloutPlan
from verl_rlhfless.ports import RolloutPorts
from verl_rlhfless.sim.cluster import Cluster
from verl_rlhfless.sim.leases import Lease, LeaseBook
from verl_rlhfless.sim.rollout import SimRollout
from verl_rlhfless.types import BusySpan, Window


@dataclass(frozen=True, slots=True)
class StepData:
    """One step of a trace as arrays: what the arm may see (``batch``) and what only the engines know (``lengths``)."""

    batch: Batch
    lengths: IntArray


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step took. Names are those of the JSON output."""

    step: int
    step_s: float
    gen_s: float
    gpu_s_allocated: float
    gpu_s_busy: float
    gpu_s_idle: float
    gpu_s_startup: float
    gpu_s_parked: float
    gpu_lease_usd: float
    node_usd: float
    num_migrations: int
    num_lost_replicas: int
    prefill_tokens: int
    tokens: int
    fused_tokens: int
    fleet: str
    reason: str
    predicted_step_s: float | None


@dataclass(frozen=True, slots=True)
class RunRecord:
    """All steps and the whole run, initial start included."""

    steps: tuple[StepRecord, ...]
    init_s: float
    wall_s: float
    gpu_s_allocated: float
    gpu_s_busy: float
    gpu_s_idle: float
    gpu_s_startup: float
    gpu_s_parked: float
    gpu_lease_usd: float
    node_usd: float
    max_gpus: int


class _Version:
    def __init__(self, version: int) -> None:
        self._version = version

    def version(self) -> int:
        return self._version


@dataclass
class ArmRun:
    """One arm on one cluster.

    ``parked_charge`` is the share of the price that a parked engine's GPUs cost (sensitivity); ``seed`` shifts the
    availability trace of preemptible nodes.
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
        for tp, count in sorted(self.arm.layout(memory, self.pool).items()):
            yield env.timeout(self.pool.trainer.times.cold_start_s)
            for index in range(count):
                first = index * tp
                node = first // self.cluster.gpus_per_node
                self._book.park((node, first % self.cluster.gpus_per_node), tp)
        self._trainer.usable_s = env.now
        self._init_s = env.now
        for step in self.data:
            yield from self._step(step, memory)
            memory = self.arm.learn(memory, Outcome(step.batch, step.lengths, self._took_s, self._cost_gpu_s))
        self._book.release(self._trainer)

    def _lease_trainer(self, start_s: float) -> Generator[simpy.Event, Any, None]:
        env = self._env
        got = env.event()
        delay = self.pool.trainer.times.grant_s
        self._book.request_gpus("trainer", self.cluster.trainer_gpus, lambda lease: _fire(got, lease), delay)
        self._trainer: Lease = yield got
        yield env.timeout(start_s)

    def _step(self, step: StepData, memory: Any) -> Generator[simpy.Event, Any, None]:
        env, trainer, times = self._env, self.pool.trainer, self.pool.trainer.times
        began = env.now
        snapshot = replace(self.pool, num_gpus=self._book.num_up, warm=self._book.warm_gpus())
        plan = self.arm.plan(memory, snapshot, step.batch)
        if plan.is_resident:
            trainer_busy = self._trainer
        else:
            yield env.timeout(trainer.publish_s + trainer.state_copy_s)
            self._book.busy.append(BusySpan(self._trainer.lease_id, len(self._trainer.gpus), began, env.now))
            self._book.release(self._trainer)
        rollout = SimRollout(self._book, snapshot, step.batch, step.lengths, plan)
        rollout.busy_origin = self._trainer.lease_id
        self._rollout = rollout
        ports = RolloutPorts(rollout, rollout, rollout, rollout, _Version(step.batch.step))
        record: RolloutRecord = yield env.process(_drive(run_rollout(self.arm.policy(memory), plan, ports)))
        self._rollout = None
        gen_s = float(rollout.now_s())
        if plan.is_resident:
            for tp in set(plan.fleet):
                for index in range(plan.fleet.count(tp)):
                    first = index * tp
                    self._book.park((first // self.cluster.gpus_per_node, first % self.cluster.gpus_per_node), tp)
            yield env.timeout(times.hybrid_sleep_s)
        else:
            yield from self._lease_trainer(times.resume_s + trainer.state_copy_s)
            self._trainer.usable_s = env.now
        trainer_busy = self._trainer
        phases_began = env.now
        tokens = int(step.batch.prompt_tokens.sum() + step.lengths.sum())
        context = tokens / step.batch.num_samples
        yield env.timeout(
            trainer.inference_s(tokens - rollout.fused_tokens, context) + trainer.update_s(tokens, context)
        )
        self._book.busy.append(BusySpan(trainer_busy.lease_id, len(trainer_busy.gpus), phases_began, env.now))
        self._record(step, plan, rollout, record, (began, gen_s))

    def _record(
        self, step: StepData, plan: RolloutPlan, rollout: SimRollout, record: RolloutRecord, times: tuple[float, float]
    ) -> None:
        began, gen_s = times
        now = self._env.now
        used = account([lease.span() for lease in self._book.leases], self._book.busy, Window(began, now))
        parked = self._book.settle_parked()
        cost = used.allocated + self.parked_charge * parked
        self._took_s, self._cost_gpu_s = now - began, cost
        price = self.cluster.usd_per_gpu_h
        self._steps.append(
            StepRecord(
                step=step.batch.step,
                step_s=now - began,
                gen_s=gen_s,
                gpu_s_allocated=used.allocated,
                gpu_s_busy=used.busy,
                gpu_s_idle=used.idle,
                gpu_s_startup=used.startup,
                gpu_s_parked=parked,
                gpu_lease_usd=usd(cost, price),
                node_usd=usd(self._book.node_seconds(began, now) * self.cluster.gpus_per_node, price),
                num_migrations=record.num_migrations,
                num_lost_replicas=rollout.num_lost,
                prefill_tokens=rollout.prefill_tokens,
                tokens=int(step.lengths.sum()),
                fused_tokens=rollout.fused_tokens,
                fleet=_fleet_text(plan, record),
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
        node_s = self._book.node_seconds(window.start_s, window.end_s)
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
            node_usd=usd(node_s * self.cluster.gpus_per_node, price),
            max_gpus=used.max_gpus,
        )

    def _outages(self, index: int) -> Generator[simpy.Event, Any, None]:
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


def _fleet_text(plan: RolloutPlan, record: RolloutRecord) -> str:
    sizes, counts = np.unique(np.array(plan.fleet), return_counts=True)
    text = "+".join(f"{count}xTP{tp}" for tp, count in zip(sizes, counts, strict=True))
    later = [tp for _, reaction in record.reactions for tp in reaction.starts]
    return text + "".join(f" then TP{tp}" for tp in later) + (" resident" if plan.is_resident else "")
