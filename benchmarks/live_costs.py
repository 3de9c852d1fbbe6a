"""What a live run took beside its declared iterations, as the simulator's times of leases, engines and trainer phases.

Invariant: nothing is fitted to a prediction; every figure is a median of what was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median

from benchmarks.live_run import ARMS, LiveRun, LiveStep, Stay
from verl_rlhfless.errors import DataError
from verl_rlhfless.live.pacing import PaceModel
from verl_rlhfless.policy.learnt import CostModel, ReplicaTimes, StepTimes, learn_step
from verl_rlhfless.policy.snapshot import PoolSnapshot
from verl_rlhfless.policy.transitions import LeaseTimes, Recipe
from verl_rlhfless.sim.workload import StepData

_PHASES = 2  # old log-prob and update


@dataclass(frozen=True, slots=True)
class Costs:
    """What a run took beside its declared iterations and phases [s]: medians over its counted steps.

    Attributes:
        grant_s: Half of what passed between the trainer's leave and the replicas' leases, and between the last
            iteration and the trainer's lease.
        wake_s: A replica's lease until its first iteration.
        cold_start_s: The same where the engine was started; the latest such step.
        park_s: A replica's last iteration until its lease ended.
        resume_s: The trainer's lease until its first phase.
        publish_s: The step's begin until the trainer left, with advantages and weights at its end.
        hybrid_wake_s: Stock's begin until its first iteration.
        hybrid_sleep_s: Stock's step beside rollout and phases.
        phase_s: What one trainer phase took beyond its declared time, in both arms.
    """

    grant_s: float
    wake_s: float
    cold_start_s: float
    park_s: float
    resume_s: float
    publish_s: float
    hybrid_wake_s: float
    hybrid_sleep_s: float
    phase_s: float


def declared_phases_s(pace: PaceModel, data: StepData, num_gpus: int) -> float:
    """Return the declared seconds of both trainer phases of a step."""
    tokens = int(data.batch.prompt_tokens.sum() + data.lengths.sum())
    return (pace.per_inference_token_us + pace.per_update_token_us) / 1e6 * tokens / num_gpus


def calibrate(run: LiveRun) -> Costs:
    """Return what a run took.

    Raises:
        DataError: No step counts, or the trainer kept its lease in all of them.
    """
    stock, elastic = run.steps("stock"), run.steps("elastic")
    if not any(step.stays and step.back_s is not None for step in elastic):
        raise DataError(
            f"{run.folder}: no step counts in which the trainer left and every engine woke. Run more steps."
        )
    declared = {data.batch.step: declared_phases_s(run.pace, data, run.settings.trainer_gpus) for data in run.data}

    def of_stays(seconds: Callable[[Stay], float]) -> float:
        return median(seconds(stay) for step in elastic for stay in step.stays)

    def of_trainer(seconds: Callable[[LiveStep, float, float], float]) -> float:
        return median(
            seconds(step, step.left_s, step.back_s)
            for step in elastic
            if step.stays and step.left_s is not None and step.back_s is not None
        )

    cold = [
        [stay.first_s - stay.granted_s for stay in step.stays if stay.is_cold]
        for _, step in sorted(run.arms["elastic"].items())
        if step.is_cold
    ]
    return Costs(
        grant_s=of_trainer(
            lambda step, left_s, back_s: (
                (median(stay.granted_s for stay in step.stays) - left_s + back_s - step.last_s) / 2
            )
        ),
        wake_s=of_stays(lambda stay: stay.first_s - stay.granted_s),
        cold_start_s=median(cold[-1]) if cold else LeaseTimes().cold_start_s,
        park_s=of_stays(lambda stay: stay.released_s - stay.last_s),
        resume_s=of_trainer(lambda step, left_s, back_s: step.step_s - back_s - step.phases_s - step.beside_s),
        publish_s=of_trainer(lambda step, left_s, back_s: left_s + step.beside_s),
        hybrid_wake_s=median(step.first_s for step in stock),
        hybrid_sleep_s=median(step.step_s - step.gen_s - step.phases_s for step in stock),
        phase_s=median((run.arms[arm][n].phases_s - declared[n]) / _PHASES for arm in ARMS for n in run.counted),
    )


def calibrated(pool: PoolSnapshot, pace: PaceModel, costs: Costs) -> PoolSnapshot:
    """Return a declared pool whose trainer's phases, leases and engines take what was declared and calibrated."""
    trainer, shape = pool.trainer, pool.trainer.shape
    full_s = 2 * shape.matmul_params / trainer.gpu.flops  # a token's forward pass at full speed
    recipe = Recipe(
        has_reference=False,
        mfu_infer=full_s / max(pace.per_inference_token_us / 1e6, 1e-12),
        mfu_train=4 * full_s / max(pace.per_update_token_us / 1e6, 1e-12),
        phase_s=max(0.0, costs.phase_s),
    )
    values = asdict(costs)  # a host's jitter may leave a small negative remainder
    measured = {name: max(0.0, values[name]) for name in values.keys() - {"publish_s", "phase_s"}}
    times = LeaseTimes(publish_bytes_per_s=shape.weight_bytes / max(costs.publish_s, 1e-6), **measured)
    trainer = replace(trainer, recipe=recipe, times=times)
    return replace(pool, trainer=trainer, has_resident=True, shares_engines=False)


def known_costs(declared: PoolSnapshot, pool: PoolSnapshot, data: StepData) -> CostModel:
    """Return what a live planner has learnt of ``pool`` after some steps; it is told only what was ``declared``."""
    times, tokens = pool.trainer.times, float(data.batch.prompt_tokens.sum() + data.lengths.sum())
    context = tokens / data.batch.num_samples
    starts = (
        ReplicaTimes("wake", times.grant_s, times.wake_s, 0.0),
        ReplicaTimes("cold_start", times.grant_s, times.cold_start_s, 0.0),
    )
    phases_s = pool.trainer.inference_s(tokens, context) + pool.trainer.update_s(tokens, context)
    suspend_s = pool.trainer.state_copy_s
    moves_s = (suspend_s, suspend_s + times.resume_s)
    learnt = StepTimes(starts, times.park_s, phases_s, pool.trainer.publish_s, moves_s)
    return learn_step(CostModel(), declared, (data.batch, data.lengths), learnt)
