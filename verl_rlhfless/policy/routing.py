"""Where requests run on a fleet that is given: stock's rule, a random one, or by predicted length with priced affinity.

The fleet is verl's own resident replicas, or what a fixed schedule leases. Nothing here starts or ends a replica.

Invariants: every unfinished sample has a replica; nothing moves for less than a least gain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from verl_rlhfless.policy.arm import Outcome
from verl_rlhfless.policy.balance import Foresight, WorkUnits, best_move, run_starts
from verl_rlhfless.policy.dispatch import least_requests, longest_first
from verl_rlhfless.policy.paper_rules import RULES, cut_by_rule
from verl_rlhfless.policy.placement import place
from verl_rlhfless.policy.predict import LengthModel, learn, predict, refine
from verl_rlhfless.policy.prediction import KNOWN_SIGMA, Prediction
from verl_rlhfless.policy.snapshot import (
    FINISHED,
    READY,
    RUNNING,
    WAITING,
    Batch,
    FloatArray,
    IntArray,
    Move,
    PoolSnapshot,
    Reaction,
    RolloutPlan,
    RolloutView,
)

_LEAST_GAIN = 0.08
"""Least share of the time left that the moves of a look must save together: predictions are no better."""

_LEAST_MOVE_GAIN = {WAITING: 0.08, RUNNING: 0.05}
"""Least share that each of them must save: a prompt is computed twice, a cut sample stands still on its way."""

_MOST_MOVES = {WAITING: 64, RUNNING: 8}
"""Samples that one look moves, until its last unit is whole: what is known of progress is up to one interval old."""

_LOOK_S = 0.5
"""Seconds between two looks."""

_SAMPLES_PER_LOOK = 8192
"""A look takes about 1 us a sample: with more of them, looks are as much rarer."""


@dataclass(frozen=True)
class Routing:
    """An arm whose fleet is given.

    Attributes:
        fleet: Tensor-parallel size of each replica.
        dispatcher: ``stock``, ``length_bucket`` or ``random``.
        migration: ``off``, ``cut_and_migrate``, ``rlhfuse`` or ``rlhfless``.
        keeps_groups: Whether the samples of a group share a replica, so that its prompt is computed once.
        learns: Whether lengths are predicted from history and siblings; without, all samples look alike.
        tau: Share of finished samples at which the two papers' rules cut.
        seed: Of the random dispatcher.
        is_resident: Whether the replicas are the trainer's own, which keep their lease when they are empty.
        truth: [B] int64, true lengths of the step that is planned: the control arm of a benchmark.
    """

    fleet: tuple[int, ...]
    dispatcher: str = "length_bucket"
    migration: str = "off"
    keeps_groups: bool = True
    learns: bool = True
    tau: float = 0.8
    seed: int = 0
    is_resident: bool = True
    truth: IntArray | None = None
    name: str = "routing"

    def predict(self, memory: LengthModel, batch: Batch) -> Prediction:
        """Return the prediction before the step's first token."""
        if self.truth is not None:
            sigma = np.full(batch.num_samples, KNOWN_SIGMA)
            return Prediction(np.log(self.truth + 0.5), sigma, batch.max_response_tokens + 1)
        return predict(memory, batch)

    def begin(self, pool: PoolSnapshot, first: Batch) -> LengthModel:
        """Return an empty memory."""
        return LengthModel()

    def layout(self, memory: LengthModel, pool: PoolSnapshot) -> Mapping[int, int]:
        """Return the fleet itself."""
        return {tp: self.fleet.count(tp) for tp in set(self.fleet)}

    def plan(self, memory: LengthModel, pool: PoolSnapshot, batch: Batch) -> RolloutPlan:
        """Return the fleet with a placement of every sample."""
        prediction = self.predict(memory, batch)
        return self._planned(batch, prediction, self._place(pool, batch, prediction))

    def _planned(self, batch: Batch, prediction: Prediction, replica_of: IntArray) -> RolloutPlan:
        """Return the plan of a placement; only the dispatcher by length submits the longest samples first."""
        order = np.arange(batch.num_samples)
        if self.dispatcher == "length_bucket":
            order = longest_first(order, prediction.mu)
        return RolloutPlan(
            fleet=self.fleet,
            replica_of=replica_of,
            order=order,
            is_resident=self.is_resident,
            is_static=self.is_resident,
            first_look_s=_LOOK_S,
            reason=f"{self.dispatcher} on {len(self.fleet)} given replicas",
        )

    def plan_leased(self, planned: RolloutPlan, memory: LengthModel, pool: PoolSnapshot, batch: Batch) -> RolloutPlan:
        """Return the plan on a fleet that was planned: with the lanes that it was planned for, if it came as a whole.

        Lanes keep what is predicted long apart from the rest, so that replicas of the rest end early. Neither stock's
        nor a random dispatcher knows them, and samples that are placed one by one are in none. Replicas may come in
        another order than planned.
        """
        is_whole = sorted(planned.fleet) == sorted(self.fleet)
        if self.dispatcher == "length_bucket" and self.keeps_groups and is_whole:
            came_as = np.empty(len(self.fleet), dtype=np.int64)
            came_as[np.argsort(planned.fleet, kind="stable")] = np.argsort(self.fleet, kind="stable")
            placed = self._planned(batch, self.predict(memory, batch), came_as[planned.replica_of])
        else:
            placed = self.plan(memory, pool, batch)
        expected_s, reason = planned.predicted_step_s, planned.reason
        return replace(placed, price=planned.price, predicted_step_s=expected_s, reason=reason)

    def _place(self, pool: PoolSnapshot, batch: Batch, prediction: Prediction) -> IntArray:
        """Return the replica of each sample, [B]."""
        count = len(self.fleet)
        if self.dispatcher == "length_bucket":
            perf = [pool.perf[tp] for tp in self.fleet]
            return place(batch, prediction, perf, self.keeps_groups)
        if self.dispatcher == "random":
            draws = np.random.default_rng((self.seed, batch.step)).integers(count, size=batch.num_samples)
            return draws[batch.group_of] if self.keeps_groups else draws
        return batch.group_of % count if self.keeps_groups else least_requests(batch, count)

    def policy(self, memory: LengthModel, batch: Batch) -> RoutingPolicy:
        """Return the decisions during the rollout of a step."""
        return RoutingPolicy(self, memory, self.predict(memory, batch))

    def learn(self, memory: LengthModel, outcome: Outcome) -> LengthModel:
        """Return the memory with the step's lengths."""
        return learn(memory, outcome.batch, outcome.lengths) if self.learns else memory


@dataclass(frozen=True)
class RoutingPolicy:
    """Looks often, and moves what lets the last replica end sooner: what waits first, what runs only if it pays.

    Attributes:
        arm: What decides, and by which rules.
        memory: Lengths of earlier steps.
        prior: The prediction before the step's first token.
    """

    arm: Routing
    memory: LengthModel
    prior: Prediction

    def refine(self, view: RolloutView) -> Prediction:
        """Return the prediction given what has been generated."""
        if not self.arm.learns or self.arm.truth is not None:
            return self.prior
        finished = (view.state == FINISHED).astype(np.float64)
        return refine(self.memory, self.prior, view.batch, view.generated, finished)

    def react(self, view: RolloutView, plan: RolloutPlan) -> Reaction:
        """Return new places for what waits, or the migration that was chosen."""
        return self.route(view, self.foresee(view))

    def foresee(self, view: RolloutView) -> Foresight:
        """Return what is expected of the rollout from now on."""
        return Foresight(view, self.refine)

    def route(self, view: RolloutView, foresight: Foresight) -> Reaction:
        """Return what ``react`` does, of a foresight on the same samples."""
        moves: tuple[Move, ...] = ()
        reason = "waiting samples follow free replicas"
        if self.arm.dispatcher == "length_bucket":
            moves = self._even_out(view, foresight, WAITING)
        if not moves:
            moves, reason = self._migrate(view, foresight), self.arm.migration
        pause_s = _LOOK_S * max(1.0, view.batch.num_samples / _SAMPLES_PER_LOOK)
        return Reaction(view.now_s + pause_s, moves=moves, reason=reason if moves else "")

    def _migrate(self, view: RolloutView, foresight: Foresight) -> tuple[Move, ...]:
        """Return the moves of running samples under the arm's migration."""
        if self.arm.migration in RULES:
            return cut_by_rule(view, self.arm.migration, self.arm.tau)
        return self._even_out(view, foresight, RUNNING) if self.arm.migration == "cut_and_migrate" else ()

    def _even_out(self, view: RolloutView, foresight: Foresight, state: int) -> tuple[Move, ...]:
        """Return the moves of what is in one state, the best one first, when they save enough together.

        Args:
            view: The rollout now.
            foresight: What is expected of it.
            state: ``WAITING`` or ``RUNNING``.
        """
        ready = [replica.replica for replica in view.replicas if replica.state == READY]
        if not ready or not (view.state == state).any():
            return ()
        movable = _Movable(foresight, state, keeps_groups=state == WAITING and self.arm.keeps_groups)
        target_of: dict[int, int] = {}
        before_s = movable.work.end_s().max()
        while len(target_of) < _MOST_MOVES[state]:
            found = best_move(movable.work, movable.units_of, ready, movable.prefill)
            if found is None or found.gain < _LEAST_MOVE_GAIN[state]:
                break
            samples = movable.move(found.source, found.unit, found.target)
            target_of.update(dict.fromkeys(samples.tolist(), found.target))
        if movable.work.end_s().max() > before_s * (1 - _LEAST_GAIN):
            return ()
        return _moves(target_of)


class _Movable:
    """What may move in one look, each unit at most once: what a replica holds in one state, by group or by sample.

    A replica computes a sample's prompt, unless it did that for a sibling; where a sample moves to, its response so far
    is computed too.

    Attributes:
        work: What every replica has to do, after the moves so far.
    """

    def __init__(self, foresight: Foresight, state: int, *, keeps_groups: bool) -> None:
        view, self._outlook, self._keeps_groups = foresight.view, foresight.outlook, keeps_groups
        self._prompt, self._response = view.batch.prompt_tokens, view.generated.astype(np.float64)
        self._group_of, num_groups = view.batch.group_of, len(view.batch.prompt_ids)
        self._has_prompt = _computed_prompts(view)
        self._positions = np.flatnonzero(view.state[self._outlook.samples] == state)
        samples = self._outlook.samples[self._positions]
        self._replica_of = view.replica_of[samples]
        first = self._starts(self._replica_of * num_groups + self._group_of[samples])
        at = self._replica_of[first]
        self.work = foresight.workload()
        prompts = np.bincount(at, self._prompts(samples[first], at), self.work.num_replicas)
        self.work.add_prefill(slice(None), prompts.astype(np.float64))
        self._units: dict[int, WorkUnits] = {}

    def units_of(self, replica: int) -> WorkUnits:
        """Return the units that may still leave a replica."""
        if replica not in self._units:
            at = self._positions[
                self._replica_of == replica
            ]  # side by side: the outlook is sorted by replica and state
            samples = self._outlook.samples[at]
            first = self._starts(self._group_of[samples])
            part = slice(at[0], at[-1] + 1) if len(at) else slice(0)
            self._units[replica] = self._outlook.units(part, first, self._prompts(samples[first], replica))
        return self._units[replica]

    def prefill(self, units: WorkUnits, replica: int) -> FloatArray:
        """Return [U] tokens that another replica computes for units that move to it."""
        responses: FloatArray = np.add.reduceat(self._response[units.samples], units.first)
        return self._prompts(units.leaders, replica) + responses

    def move(self, source: int, unit: int, target: int) -> IntArray:
        """Move one of a replica's units; return its samples."""
        units = self._units[source]
        self.work.remove(source, units, unit)
        self.work.add(target, units.with_prefill(self.prefill(units, target)), unit)
        self._units[source] = units.without(unit)
        return units.members(unit)

    def _starts(self, key: IntArray) -> IntArray:
        """Return where units begin among samples that are sorted by ``key``: with each new key, or with each sample."""
        return run_starts(key) if self._keeps_groups else np.arange(len(key))

    def _prompts(self, leaders: IntArray, replica: IntArray | int) -> FloatArray:
        """Return [U] prompt tokens that the replica of each unit still computes for it."""
        tokens: FloatArray = np.where(self._has_prompt[replica, self._group_of[leaders]], 0.0, self._prompt[leaders])
        return tokens


def _computed_prompts(view: RolloutView) -> NDArray[np.bool_]:
    """Return [R, G] whether a replica has computed a group's prompt, for any of its samples."""
    began = ((view.state == RUNNING) | (view.state == FINISHED)) & (view.replica_of >= 0)
    has_prompt = np.zeros((len(view.replicas), len(view.batch.prompt_ids)), dtype=bool)
    has_prompt[view.replica_of[began], view.batch.group_of[began]] = True
    return has_prompt


def _moves(target_of: Mapping[int, int]) -> tuple[Move, ...]:
    """Return the moves that bring each sample to its target, one for each target."""
    samples, targets = (np.array(list(ids), dtype=np.int64) for ids in (target_of.keys(), target_of.values()))
    return tuple(Move(np.sort(samples[targets == target]), int(target)) for target in np.unique(targets).tolist())
