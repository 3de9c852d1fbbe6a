"""Where requests run on a fleet that is given: stock's rule, a random one, or by predicted length with priced affinity.

The fleet is verl's own resident replicas, or what a fixed schedule leases. Nothing here starts or ends a replica.

Invariants: every unfinished sample has a replica; a group is split only when that saves more time than computing its
prompt once more costs; nothing moves for less than a least gain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from verl_rlhfless.policy.affinity import PrefixBook
from verl_rlhfless.policy.arm import Outcome, Policy
from verl_rlhfless.policy.balance import Outlook, Unit, Workload, assign, best_move
from verl_rlhfless.policy.dispatch import least_requests, longest_first
from verl_rlhfless.policy.migrate import RULES, cut_by_rule
from verl_rlhfless.policy.predict import LengthModel, Prediction, learn, predict, refine
from verl_rlhfless.policy.snapshot import (
    FINISHED,
    GONE,
    READY,
    RUNNING,
    WAITING,
    Batch,
    IntArray,
    Move,
    PoolSnapshot,
    Reaction,
    RolloutPlan,
    RolloutView,
)

_LEAST_GAIN = 0.08
"""Least share of the time left that the moves of a look must save together: predictions are no better."""
_LEAST_STEP = {WAITING: 0.08, RUNNING: 0.05}
"""Least share that each of them must save: a prompt is computed twice, a cut sample stands still on its way."""

_LOOK_S = 0.5
_SAMPLES_PER_LOOK = 2048  # a look takes about 10 us a sample: with more of them, looks are as much rarer
_EXACT = 0.01  # spread of the log of a length that is known
_MOST_MOVES = {WAITING: 64, RUNNING: 8}  # progress is up to one interval old: some moves, then look again
_UNITS_PER_REPLICA = 8  # units are small enough to even out
_SPLITS = (1, 2, 4, 8, 16)


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
            exact = np.full(batch.num_samples, _EXACT)
            return Prediction(np.log(self.truth + 0.5), exact, batch.max_response_tokens + 1)
        return predict(memory, batch)

    def refine(self, memory: LengthModel, view: RolloutView) -> Prediction:
        """Return the prediction given what has been generated."""
        prior = self.predict(memory, view.batch)
        if not self.learns or self.truth is not None:
            return prior
        finished = (view.state == FINISHED).astype(np.float64)
        return refine(memory, prior, view.batch, view.generated, finished)

    def begin(self, pool: PoolSnapshot, first: Batch) -> LengthModel:
        """Return an empty memory."""
        return LengthModel()

    def layout(self, memory: LengthModel, pool: PoolSnapshot) -> Mapping[int, int]:
        """Return the fleet itself."""
        return {tp: self.fleet.count(tp) for tp in set(self.fleet)}

    def plan(self, memory: LengthModel, pool: PoolSnapshot, batch: Batch) -> RolloutPlan:
        """Return the fleet with a placement of every sample."""
        prediction = self.predict(memory, batch)
        order = np.arange(batch.num_samples)
        if self.dispatcher == "length_bucket":
            order = longest_first(order, prediction.mu)
        return RolloutPlan(
            fleet=self.fleet,
            replica_of=self._place(pool, batch, prediction),
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
        placed = self.plan(memory, pool, batch)
        is_whole = sorted(planned.fleet) == sorted(self.fleet)
        if self.dispatcher == "length_bucket" and self.keeps_groups and is_whole:
            came_as = np.empty(len(self.fleet), dtype=np.int64)
            came_as[np.argsort(planned.fleet, kind="stable")] = np.argsort(self.fleet, kind="stable")
            placed = replace(placed, replica_of=came_as[planned.replica_of])
        expected_s, reason = planned.predicted_step_s, planned.reason
        return replace(placed, price=planned.price, predicted_step_s=expected_s, reason=reason)

    def _place(self, pool: PoolSnapshot, batch: Batch, prediction: Prediction) -> IntArray:
        count = len(self.fleet)
        if self.dispatcher == "length_bucket":
            every = np.arange(batch.num_samples)
            outlook = Outlook.build(prediction, np.zeros_like(every), batch.prompt_tokens)
            idle = Workload([pool.perf[tp] for tp in self.fleet], outlook)
            return place(batch, every, (idle, outlook), self.keeps_groups)
        if self.dispatcher == "random":
            draws = np.random.default_rng((self.seed, batch.step)).integers(count, size=batch.num_samples)
            return draws[batch.group_of] if self.keeps_groups else draws
        return batch.group_of % count if self.keeps_groups else least_requests(batch, count)

    def policy(self, memory: LengthModel) -> Policy:
        """Return the decisions during the rollout."""
        return RoutingPolicy(self, memory)

    def learn(self, memory: LengthModel, outcome: Outcome) -> LengthModel:
        """Return the memory with the step's lengths."""
        return learn(memory, outcome.batch, outcome.lengths) if self.learns else memory


@dataclass(frozen=True)
class RoutingPolicy:
    """Looks often, and moves what lets the last replica end sooner: what waits first, what runs only if it pays."""

    arm: Routing
    memory: LengthModel

    def react(self, view: RolloutView, plan: RolloutPlan) -> Reaction:
        """Return new places for what waits, or the migration that was chosen."""
        moves: tuple[Move, ...] = ()
        reason = "waiting samples follow free replicas"
        if self.arm.dispatcher == "length_bucket":
            moves = self._even_out(view, WAITING)
        if not moves:
            moves, reason = self._migrate(view), self.arm.migration
        pause_s = _LOOK_S * max(1.0, view.batch.num_samples / _SAMPLES_PER_LOOK)
        return Reaction(view.now_s + pause_s, moves=moves, reason=reason if moves else "")

    def _migrate(self, view: RolloutView) -> tuple[Move, ...]:
        if self.arm.migration in RULES:
            return cut_by_rule(view, self.arm.migration, self.arm.tau)
        return self._even_out(view, RUNNING) if self.arm.migration == "cut_and_migrate" else ()

    def _even_out(self, view: RolloutView, state: int) -> tuple[Move, ...]:
        """Return the moves of what is in one state, one by one the best, when they save enough together."""
        open_to = [r.replica for r in view.replicas if r.state != GONE]
        ready = [at for at, replica in enumerate(open_to) if view.replicas[replica].state == READY]
        if not ready or not (view.state == state).any():
            return ()
        refined = self.arm.refine(self.memory, view)
        outlook = Outlook.build(refined, view.generated, view.batch.prompt_tokens)
        work = Workload([view.pool.perf[view.replicas[r].tp] for r in open_to], outlook)
        prefill = _Prefill(view, open_to)
        held = []
        for at, replica in enumerate(open_to):
            here = (view.replica_of == replica) & (view.state != FINISHED)
            work.add(at, outlook.unit(np.flatnonzero(here & (view.state != state)), 0.0))
            in_state = np.flatnonzero(here & (view.state == state))
            keeps = state == WAITING and self.arm.keeps_groups
            sets = _by_group(view.batch, in_state) if keeps else np.split(in_state, np.arange(1, len(in_state)))
            held.append([outlook.unit(part, prefill.at_home(part, at)) for part in sets if len(part)])
            for unit in held[at]:
                work.add(at, unit)
        moved: dict[int, int] = {}
        before_s = work.end_s().max(initial=0.0)
        while len(moved) < _MOST_MOVES[state]:
            found = best_move(work, held, ready, prefill)
            if found is None or found[3] < _LEAST_STEP[state]:
                break
            source, position, target, _ = found
            unit = held[source].pop(position)
            work.remove(source, unit)
            work.add(target, outlook.unit(unit.samples, prefill(unit, target)))
            moved.update(dict.fromkeys(unit.samples.tolist(), open_to[target]))
        if work.end_s().max(initial=0.0) > before_s * (1 - _LEAST_GAIN):
            return ()
        return _moves(np.array(list(moved), dtype=np.int64), np.array(list(moved.values()), dtype=np.int64))


class _Prefill:
    """Tokens that a replica computes before samples decode on it: their prompt, unless it did that for a sibling."""

    def __init__(self, view: RolloutView, replicas: list[int]) -> None:
        self._group_of, self._prompt = view.batch.group_of, view.batch.prompt_tokens
        self._generated = view.generated
        began = (view.state == RUNNING) | (view.state == FINISHED)
        self._known = [set(self._group_of[began & (view.replica_of == r)].tolist()) for r in replicas]

    def at_home(self, samples: IntArray, replica: int) -> float:
        """Return what samples still compute where they are."""
        first = int(samples[0])
        return 0.0 if self._group_of[first] in self._known[replica] else float(self._prompt[first])

    def __call__(self, unit: Unit, replica: int) -> float:
        """Return what siblings compute on another replica: their responses so far too."""
        return self.at_home(unit.samples, replica) + float(self._generated[unit.samples].sum())


def place(batch: Batch, samples: IntArray, onto: tuple[Workload, Outlook], keeps_groups: bool) -> IntArray:
    """Return the position in the workload for each of ``samples``.

    Groups are split into ever smaller pieces while that lets the last replica end sooner, the prompts that are then
    computed more than once included.

    Args:
        batch: The prompts.
        samples: What to place.
        onto: What the replicas have already, and what is expected of every sample.
        keeps_groups: Whether siblings find their prompt computed; without, every sample is placed for itself.
    """
    work, outlook = onto
    best: tuple[float, IntArray] | None = None
    for pieces in _SPLITS if keeps_groups else _SPLITS[-1:]:
        units = _units(batch, samples, outlook, pieces)
        trial = work.copy()
        book = PrefixBook(batch, work.num_replicas) if batch.prefixes and keeps_groups else None
        chosen = assign(trial, units, outlook.width, book)
        end_s = float(trial.end_s().max())
        if best is None or end_s < best[0] * (1 - _LEAST_GAIN):
            position = np.empty(batch.num_samples, dtype=np.int64)
            for unit, replica in zip(units, chosen, strict=True):
                position[unit.samples] = replica
            best = end_s, position[samples]
        if len(units) == len(samples) or len(units) >= _UNITS_PER_REPLICA * work.num_replicas:
            break
    assert best is not None
    return best[1]


def _units(batch: Batch, samples: IntArray, outlook: Outlook, pieces: int) -> list[Unit]:
    return [
        outlook.unit(piece, float(batch.prompt_tokens[piece[0]]))
        for group in _by_group(batch, samples)
        for piece in np.array_split(group, min(pieces, len(group)))
    ]


def _by_group(batch: Batch, samples: IntArray) -> list[IntArray]:
    order = samples[np.lexsort((samples, batch.group_of[samples]))]
    return np.split(order, np.flatnonzero(np.diff(batch.group_of[order])) + 1)


def _moves(samples: IntArray, targets: IntArray) -> tuple[Move, ...]:
    return tuple(Move(np.sort(samples[targets == target]), int(target)) for target in np.unique(targets).tolist())
