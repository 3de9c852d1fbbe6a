"""Our arm: predict, plan a fleet, migrate what pays, fuse what pays, learn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from verl_rlhfless.errors import ConfigError
from verl_rlhfless.policy.arm import Outcome
from verl_rlhfless.policy.fuse import fuse_gpus
from verl_rlhfless.policy.fusion_cut import cut_for_inference
from verl_rlhfless.policy.migrate import Change, consolidate
from verl_rlhfless.policy.paper_rules import RULES, cut_by_rule
from verl_rlhfless.policy.plan import Goal, plan_fleet, static_steps_s
from verl_rlhfless.policy.predict import LengthModel, learn, predict, refine
from verl_rlhfless.policy.prediction import Prediction, exact
from verl_rlhfless.policy.snapshot import FINISHED, Batch, PoolSnapshot, Reaction, RolloutPlan, RolloutView
from verl_rlhfless.policy.step_costs import static_gpus

_LOOKS = 7
"""Looks per predicted remaining time; a look costs about as much as a decode iteration of a small model."""

_REPAY = 0.5
"""Share of the seconds saved so far that the next step may be longer by, or of those lost that it has to catch up."""

_CAUTION_RATE = 0.3
"""Weight of the latest step: one step's luck with its longest response must not decide."""

_FEW = 16.0
"""Predictions that rest on as many samples are half trusted: a gain must be worth twice its transition (``doubt``)."""

_LATE = 100.0
"""Weight of the time beyond a step that must not be slower, against cost; each as a share of the static fleet's."""

_GROWTH = 0.2
"""Longest pause as a share of the rollout so far: an early prediction of what remains may be far too long."""

_FIRST_LOOK_S, _LEAST_PAUSE_S = 1.0, 0.5
"""When the first look is, and the shortest time between two."""

_MOST_CAUTION = 1.5
"""Most caution: a few unlucky steps must not end elasticity."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What goes from step to step.

    Attributes:
        lengths: The length model.
        pool: What may be leased.
        first_sizes: Tensor-parallel sizes of the engines that were started first.
        caution: Factor by which elastic steps were longer than predicted, compared with static ones.
        saved_s: Seconds by which the steps so far were shorter than those of the best static fleet would have been.
            Resident ones save what inference they hide, so that an elastic step's loss is paid back.
        static_factor: Seconds of a resident step that hides none over what the model says of its fleet; ``None`` =
            there was none yet.
    """

    lengths: LengthModel
    pool: PoolSnapshot
    first_sizes: tuple[int, ...] = ()
    caution: float = 1.0
    saved_s: float = 0.0
    static_factor: float | None = None


@dataclass(frozen=True)
class Ours:
    """The elastic arm.

    Attributes:
        goal: What to optimise.
        can_fuse: ``False`` is the ablation without fusion.
        migration: ``cut_and_migrate`` (priced, ours), ``rlhfless`` or ``rlhfuse`` (the papers' rules), or ``off``.
        tau: Share of finished samples at which the papers' rules cut.
    """

    goal: Goal = field(default_factory=Goal)
    can_fuse: bool = True
    migration: str = "cut_and_migrate"
    tau: float = 0.8
    name: str = "ours"

    def predict(self, memory: Memory, batch: Batch) -> Prediction:
        """Return the prediction of a step."""
        return predict(memory.lengths, batch)

    def doubt(self, memory: Memory) -> float:
        """Return how many times a gain must be worth its transition, given what the prediction rests on."""
        return 1 + _FEW / memory.lengths.num_samples

    def begin(self, pool: PoolSnapshot, first: Batch) -> Memory:
        """Return an empty memory and the engine sizes that do best for the lengths expected from the cap alone."""
        memory = Memory(LengthModel(), pool)
        return replace(memory, first_sizes=_first_sizes(pool, first, self.predict(memory, first), self.goal))

    def layout(self, memory: Memory, pool: PoolSnapshot) -> Mapping[int, int]:
        """Return one full engine set for each tensor-parallel size of the first plan."""
        return {tp: static_gpus(pool) // tp for tp in memory.first_sizes}

    def plan(self, memory: Memory, pool: PoolSnapshot, batch: Batch) -> RolloutPlan:
        """Return the fleet for the predicted lengths."""
        payback = self.goal.payback * self.doubt(memory)
        goal = replace(self.goal, slack_s=_REPAY * memory.saved_s, caution=memory.caution, payback=payback)
        plan = plan_fleet(pool, batch, self.predict(memory, batch), goal, can_fuse=self.can_fuse)
        return replace(plan, first_look_s=_FIRST_LOOK_S, rebinds_turns=True)

    def policy(self, memory: Memory, batch: Batch) -> OursPolicy:
        """Return the decisions during the rollout of a step."""
        return OursPolicy(self, memory, self.predict(memory, batch))

    def learn(self, memory: Memory, outcome: Outcome) -> Memory:
        """Return the memory with the step's lengths and seconds."""
        static_s = static_steps_s(memory.pool, outcome.batch, exact(outcome.lengths))
        best_s, plan = min(static_s.values()), outcome.plan
        factor = memory.static_factor
        if plan is not None and plan.is_resident:
            factor = _learn_static(factor, (outcome.step_s + outcome.hidden_s) / static_s[plan.fleet[0]])
        return replace(
            memory,
            lengths=learn(memory.lengths, outcome.batch, outcome.lengths),
            caution=_learn_caution(memory.caution, outcome, best_s),
            static_factor=factor,
            saved_s=memory.saved_s + best_s * (factor or 1.0) - outcome.step_s,
        )


@dataclass(frozen=True)
class OursPolicy:
    """Looks a fixed number of times per predicted remaining time: refine, consolidate, fuse.

    Attributes:
        arm: What decides, and by which rules.
        memory: What earlier steps left.
        prior: The prediction before the step's first token.
    """

    arm: Ours
    memory: Memory
    prior: Prediction

    def refine(self, view: RolloutView) -> Prediction:
        """Return the prediction given what has been generated."""
        finished = (view.state == FINISHED).astype(np.float64)
        return refine(self.memory.lengths, self.prior, view.batch, view.generated, finished)

    def react(self, view: RolloutView, plan: RolloutPlan) -> Reaction:
        """Return the change that pays most, and fusion on what stays free."""
        change = self._change(view, plan)
        reserved = sum(change.starts)
        fused = 0
        if self.arm.can_fuse and not reserved:
            fused = fuse_gpus(view, change.remaining_s, plan.price, plan.is_resident)
        pause = max(_LEAST_PAUSE_S, min(change.remaining_s / _LOOKS, _GROWTH * view.now_s))
        return Reaction(view.now_s + pause, change.starts, change.moves, fused, change.reason, change.releases)

    def _change(self, view: RolloutView, plan: RolloutPlan) -> Change:
        """Return the change of the fleet under the arm's migration, and how long the rollout still takes."""
        is_ours, refined = self.arm.migration == "cut_and_migrate", self.refine(view)
        if is_ours and plan.is_resident and self.arm.can_fuse:
            return cut_for_inference(view, refined)
        change = consolidate(view, refined, plan.price, self.arm.goal.hysteresis, len(plan.fleet))
        if is_ours and not plan.is_resident:
            return change
        moves = cut_by_rule(view, self.arm.migration, self.arm.tau) if self.arm.migration in RULES else ()
        return Change(change.remaining_s, (), moves, f"{self.arm.migration}'s rule" if moves else "")


def _first_sizes(pool: PoolSnapshot, first: Batch, prior: Prediction, goal: Goal) -> tuple[int, ...]:
    """Return the engine sizes to start with: one alone, or those of the fleet that is best when every size is warm.

    That fleet may count on sizes that it changes to later, so each choice is priced with what it starts alone.
    """
    free = plan_fleet(_all_warm(pool, tuple(pool.perf)), first, prior, goal)
    if free.is_resident:
        return (free.fleet[0],)
    assert free.static_step_s is not None
    static_s, static_gpu_s = free.static_step_s, free.static_step_s * static_gpus(pool)
    best: tuple[int, ...] = ()
    least = math.inf
    for sizes in dict.fromkeys([tuple(sorted(set(free.fleet))), *((tp,) for tp in pool.perf)]):
        try:
            plan = plan_fleet(_all_warm(pool, sizes), first, prior, goal)
        except ConfigError:
            continue  # these sizes alone cannot meet the goal's limits
        assert plan.predicted_step_s is not None and plan.predicted_gpu_s is not None
        time, cost = plan.predicted_step_s / static_s, plan.predicted_gpu_s / static_gpu_s
        value = goal.objective(time, cost) if not goal.is_notslower else cost + _LATE * max(0.0, time - 1)
        if value < least - 1e-9:
            best, least = sizes, value
    return best


def _all_warm(pool: PoolSnapshot, sizes: tuple[int, ...]) -> PoolSnapshot:
    """Return the pool as if it had only these sizes, and an engine of each wherever one fits."""
    warm, beside = dict.fromkeys(sizes, pool.num_gpus), dict.fromkeys(sizes, pool.trainer.num_gpus)
    return replace(pool, perf={tp: pool.perf[tp] for tp in sizes}, warm=warm, warm_beside=beside)


def _learn_caution(caution: float, outcome: Outcome, static_s: float) -> float:
    """Return the caution after a step: what it took against its prediction, each relative to the static fleet's."""
    plan = outcome.plan
    if plan is None or plan.is_resident or plan.predicted_step_s is None or plan.static_step_s is None:
        return caution
    seen = (outcome.step_s / static_s) / (plan.predicted_step_s / caution / plan.static_step_s)
    return float(np.clip((1 - _CAUTION_RATE) * caution + _CAUTION_RATE * seen, 1.0, _MOST_CAUTION))


def _learn_static(factor: float | None, seen: float) -> float:
    """Return the static factor after a resident step with ``seen`` as its own."""
    return seen if factor is None else (1 - _CAUTION_RATE) * factor + _CAUTION_RATE * seen
