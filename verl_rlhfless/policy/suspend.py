"""Whether the trainer gives its GPUs back during a rollout, and when it should begin to take them again.

The trainer has nothing to do while a rollout runs, but leaving its devices and coming back takes time in which it holds
them. It leaves when the GPU-seconds that others get repay those of the two moves, as measured in earlier steps, and
always when the replicas need its GPUs. The first rollout of a run is the measurement: its replicas start cold, which
takes longer than the trainer's way to the host and back.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

START_RATIO = 2.0
"""GPU-seconds given back for each one spent on the moves, from which a trainer that stayed begins to leave."""

KEEP_RATIO = 1.0
"""The same, from which a trainer that left in the last rollout leaves again: less, so that it does not flap."""

RETRY_AFTER = 20
"""Rollouts in a row that the trainer stays for, before what the moves cost is measured again."""

_WINDOW = 3  # measurements whose median is the prediction


@dataclass(frozen=True, slots=True)
class SuspendHistory:
    """What earlier rollouts took, newest last.

    Attributes:
        rollouts_s: From the request for replicas to the end of the last sample.
        suspends_s: Moving the trainer to the host and returning its lease.
        resumes_s: Leasing again, waits for others included, and moving back.
        num_kept: Rollouts in a row, up to now, that the trainer kept its lease for.
    """

    rollouts_s: tuple[float, ...] = ()
    suspends_s: tuple[float, ...] = ()
    resumes_s: tuple[float, ...] = ()
    num_kept: int = 0


@dataclass(frozen=True, slots=True)
class RolloutNeeds:
    """What the coming rollout leases, beside the trainer.

    Attributes:
        trainer_gpus: GPUs of the trainer's lease.
        replica_gpus: GPUs of the replicas.
        budget_gpus: Most GPUs that both may hold together.
        is_validation: Nothing is predicted for a validation.
    """

    trainer_gpus: int
    replica_gpus: int
    budget_gpus: int
    is_validation: bool = False

    @property
    def has_room_for_both(self) -> bool:
        """Whether the replicas can run beside a trainer that keeps its lease."""
        return self.trainer_gpus + self.replica_gpus <= self.budget_gpus


@dataclass(frozen=True, slots=True)
class SuspendDecision:
    """What the trainer does in one rollout.

    Attributes:
        is_suspended: Whether it leaves.
        is_first: Whether it has left before the first replica leases.
        resume_after_s: When it should begin to come back, in seconds after the replicas were asked for; ``None`` = when
            the rollout is over.
        predicted_gpu_s: GPU-seconds that others get; 0 when nothing is known yet.
        reason: Why, with the figures.
    """

    is_suspended: bool
    is_first: bool
    resume_after_s: float | None
    predicted_gpu_s: float
    reason: str


def decide_suspend(history: SuspendHistory, needs: RolloutNeeds) -> SuspendDecision:
    """Return what the trainer does in the coming rollout."""
    gpus, is_known = needs.trainer_gpus, bool(history.rollouts_s and history.resumes_s)
    away_s = _away_s(history) if is_known and not needs.is_validation else 0.0
    if not needs.has_room_for_both:
        reason = (
            f"the trainer's {gpus} GPUs and the replicas' {needs.replica_gpus} are more than the budget of "
            f"{needs.budget_gpus}"
        )
        return SuspendDecision(True, True, None, gpus * away_s, reason)
    if needs.is_validation:
        return stay("nothing is predicted for a validation, and the replicas fit beside the trainer")
    if not is_known:
        return SuspendDecision(True, False, None, 0.0, "the first rollout measures what leaving costs and repays")
    moves_s = statistics.median(history.suspends_s) + statistics.median(history.resumes_s)
    wanted = START_RATIO if history.num_kept else KEEP_RATIO
    figures = f"{gpus} GPUs for {away_s:.1f} s against {moves_s:.1f} s of moves"
    if away_s >= wanted * moves_s:
        return SuspendDecision(True, False, _resume_after_s(history), gpus * away_s, f"{figures} repay")
    if history.num_kept >= RETRY_AFTER:
        reason = f"{figures} did not repay {history.num_kept} rollouts ago: measured again"
        return SuspendDecision(True, False, _resume_after_s(history), gpus * away_s, reason)
    return stay(f"{figures} don't repay (wanted: {wanted:g} times)")


def learn_rollout(history: SuspendHistory, rollout_s: float, moves_s: tuple[float, float] | None) -> SuspendHistory:
    """Return the history after one more training rollout.

    Args:
        history: What was known before it.
        rollout_s: What the rollout took.
        moves_s: What suspend and resume took; ``None`` if the trainer kept its lease.
    """
    return SuspendHistory(
        rollouts_s=_newest(history.rollouts_s, rollout_s),
        suspends_s=_newest(history.suspends_s, moves_s[0]) if moves_s else history.suspends_s,
        resumes_s=_newest(history.resumes_s, moves_s[1]) if moves_s else history.resumes_s,
        num_kept=0 if moves_s else history.num_kept + 1,
    )


def stay(reason: str) -> SuspendDecision:
    """Return the decision of a trainer that keeps its lease."""
    return SuspendDecision(False, False, None, 0.0, reason)


def _away_s(history: SuspendHistory) -> float:
    """Return how long others have the GPUs: between the end of the suspend and the begin of the resume."""
    moves_s = statistics.median(history.suspends_s) + statistics.median(history.resumes_s)
    return max(0.0, statistics.median(history.rollouts_s) - moves_s)


def _resume_after_s(history: SuspendHistory) -> float:
    return max(0.0, statistics.median(history.rollouts_s) - statistics.median(history.resumes_s))


def _newest(values: tuple[float, ...], value: float) -> tuple[float, ...]:
    return (*values, value)[-_WINDOW:]
