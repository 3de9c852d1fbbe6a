"""How long replicas still need for what they have, and who should do what so that the last one ends early.

Lengths are uncertain, so work is a survival curve: how many requests of a replica are expected to be alive at each
further depth, and how likely any is. An iteration costs a fixed time while any request is alive, a part for each one
and a part per token of context; more requests than run at once take turns. A request that is probably long therefore
belongs where few others are.

What samples add to this work is additive: they are summed over any set of samples (``WorkUnits``) and over any set of
units on a replica (``Workload``), so that a unit is priced on R replicas in O(R * K), whatever they have already.

Invariants: pure; ties go to the lower sample id, then to the lower replica id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from verl_rlhfless.policy.affinity import PrefixBook
from verl_rlhfless.policy.perf import EnginePerf
from verl_rlhfless.policy.prediction import Prediction
from verl_rlhfless.policy.shapes import ModelShape
from verl_rlhfless.policy.snapshot import FINISHED, Batch, FloatArray, IntArray, RolloutView
from verl_rlhfless.policy.stages import middle_of

_NUM_DEPTHS, _FEW_DEPTHS = 32, 16
_MANY_ROWS = 4096
"""With more rows, the curves of replicas are smooth enough for few depths (within 0.5 % of their seconds)."""

_FINER_AT_START = 1.5
"""Exponent of the depths: intervals are narrower near the present, where more samples are alive."""

_LEAST_ALIVE = 1e-9
"""Least probability that a sample is alive where it stands, and least one that it has ended: finite ratios and logs."""

_BLOCK = 1024  # rows whose curves are computed together: what they take stays in the processor's cache

_ALIVE, _LOG_NONE = 0, 1
"""Rows of ``curves``: expected samples that are alive, and the log of the probability that none is."""

_PREFILLS = 2
"""Row of ``volume`` with tokens to prefill; before it are tokens to decode, and tokens of context to read for them."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is expected of N samples from now on.

    Neighbours that look alike, such as siblings that wait, share one of M rows.

    Attributes:
        samples: [N] int64 ids, in the order that suits the caller.
        row_of: [N] int64, row of each sample; never decreasing.
        width: [K] tokens of each interval of further depth, the same for all rows.
        curves: [2, M, K] float64 of one sample of each row, in the middle of each interval: the probability that it is
            alive, and the log of the probability that it is not.
        volume: [2, M] float64 of one sample of each row: tokens that it decodes, and tokens of context that it reads
            for them, each as expected.
    """

    samples: IntArray
    row_of: IntArray
    width: FloatArray
    curves: FloatArray
    volume: FloatArray

    @classmethod
    def build(
        cls,
        prediction: Prediction,
        batch: Batch,
        generated: IntArray,
        samples: IntArray,
        shape: ModelShape,
    ) -> Outlook:
        """Return the outlook on ``samples``, [N] ids of which none is complete; ``generated`` is [B] tokens so far.

        Tokens of context that only some layers of ``shape`` read count as their part.
        """
        reached = np.minimum(generated[samples], prediction.cap - 1).astype(np.float64)
        context = (batch.prompt_tokens + generated)[samples].astype(np.float64)
        looks = np.stack((prediction.mu[samples], prediction.sigma[samples], reached, context))
        is_new = (np.diff(looks, prepend=-1.0) != 0).any(axis=0)
        reached, context, leaders = reached[is_new], context[is_new], samples[is_new]
        depths = _NUM_DEPTHS if len(leaders) <= _MANY_ROWS else _FEW_DEPTHS
        longest = prediction.cap - reached.min(initial=prediction.cap)
        edges = longest * np.linspace(0.0, 1.0, depths + 1) ** _FINER_AT_START
        width, middle = np.diff(edges), middle_of(edges)
        curves = np.empty((2, len(leaders), depths))
        for begin in range(0, len(leaders), _BLOCK):
            rows = slice(begin, begin + _BLOCK)
            part, depth = prediction.of(leaders[rows]), reached[rows, None]
            now = np.maximum(part.alive_at(depth), _LEAST_ALIVE)
            alive = np.minimum(part.alive_at(depth + middle) / now, 1.0)  # given that it got as far as it is
            curves[_ALIVE, rows] = alive
            curves[_LOG_NONE, rows] = np.log1p(-np.minimum(alive, 1 - _LEAST_ALIVE))
        decodes = curves[_ALIVE] @ width
        reads = context * decodes + curves[_ALIVE] @ (middle * width)
        if shape.window:
            at = context[:, None] + middle
            reads -= (curves[_ALIVE] * (at - shape.attended(at))) @ width
        return cls(samples, np.cumsum(is_new) - 1, width, curves, np.stack((decodes, reads)))

    def units(self, part: slice, first: IntArray, prefill: FloatArray) -> WorkUnits:
        """Return the samples at some positions as U units, each a run of them.

        Args:
            part: Which of the N positions.
            first: [U] where each unit begins, counted from the part's own beginning; increasing from 0.
            prefill: [U] tokens that have to be computed before a unit decodes.
        """
        samples, row_of = self.samples[part], self.row_of[part]
        begins = np.diff(row_of, prepend=-1) != 0
        begins[first] = True
        run = np.flatnonzero(begins)  # where samples begin that are alike and of one unit
        count, rows = np.diff(run, append=len(samples)).astype(np.float64), row_of[run]
        if len(run) == len(first):  # every unit is one run
            curves, volume = self.curves[:, rows] * count[:, None], self.volume[:, rows] * count
        else:
            runs_of = [slice(*ends) for ends in pairwise([*np.searchsorted(run, first).tolist(), len(run)])]
            curves = np.stack([count[runs] @ self.curves[:, rows[runs]] for runs in runs_of], axis=1)
            volume = np.stack([self.volume[:, rows[runs]] @ count[runs] for runs in runs_of], axis=1)
        return WorkUnits(samples, first, curves, np.concatenate((volume, prefill[None])))


@dataclass(frozen=True, slots=True)
class WorkUnits:
    """U sets of samples, each placed as a whole, and what each adds to a replica's work.

    Attributes:
        samples: [N] int64 ids, one unit's after the other's.
        first: [U] int64, where each unit begins in ``samples``.
        curves: [2, U, K] float64 at each further depth: expected samples that are alive, and the log of the probability
            that none is (a sum of logs, as samples end independently).
        volume: [3, U] float64 tokens to decode, tokens of context to read for them, tokens to prefill before the first
            decode.
    """

    samples: IntArray
    first: IntArray
    curves: FloatArray
    volume: FloatArray

    @property
    def leaders(self) -> IntArray:
        """Id of the first sample of each, [U]."""
        return self.samples[self.first]

    @property
    def sizes(self) -> IntArray:
        """Samples of each, [U]."""
        return np.diff(self.first, append=len(self.samples))

    def members(self, unit: int) -> IntArray:
        """Return the ids of a unit's samples."""
        return self.samples[self.first[unit] :][: self.sizes[unit]]

    def with_prefill(self, tokens: FloatArray | float) -> WorkUnits:
        """Return the same units with other tokens, [U], to prefill."""
        volume = self.volume.copy()
        volume[_PREFILLS] = tokens
        return replace(self, volume=volume)

    def without(self, unit: int) -> WorkUnits:
        """Return all units but one."""
        rest = np.arange(len(self.first)) != unit
        samples = self.samples[np.repeat(rest, self.sizes)]
        sizes = self.sizes[rest]
        return WorkUnits(samples, np.cumsum(sizes) - sizes, self.curves[:, rest], self.volume[:, rest])


class Workload:
    """What each of R replicas still has to do; grows with every unit that is added.

    Attributes:
        width: [K] tokens of each interval of further depth.
        curves: [2, R, K] as in ``WorkUnits``.
        volume: [3, R] as in ``WorkUnits``.
    """

    def __init__(self, perf: Sequence[EnginePerf], width: FloatArray) -> None:
        self.width = width
        slots = np.array([float(p.limits.max_num_seqs) for p in perf])
        self._per_slot = np.repeat(1 / slots[:, None], len(width), axis=1)  # [R, K]: a product of equal shapes is fast
        self._fixed_s = np.array([p.iteration_s(0, 0) for p in perf])
        full_s = np.array([p.iteration_s(p.limits.max_num_seqs, 0) for p in perf])
        per_decode_s = (full_s - self._fixed_s) / slots
        per_read_s, per_prefill_s = [p.kv_s_per_token for p in perf], [p.prefill_s_per_token for p in perf]
        self._per_token_s = np.array((per_decode_s, per_read_s, per_prefill_s))  # [3, R], rows as those of volume
        self.curves = np.zeros((2, len(perf), len(width)))
        self.volume = np.zeros((3, len(perf)))

    @property
    def num_replicas(self) -> int:
        """How many replicas there are (R)."""
        return len(self._fixed_s)

    def add(self, replica: int, units: WorkUnits, unit: int) -> None:
        """Give a replica a unit."""
        self.curves[:, replica] += units.curves[:, unit]
        self.volume[:, replica] += units.volume[:, unit]

    def add_prefill(self, replica: int | slice, tokens: FloatArray | float) -> None:
        """Give replicas tokens to prefill; negative ones are taken from them."""
        self.volume[_PREFILLS, replica] += tokens

    def remove(self, replica: int, units: WorkUnits, unit: int) -> None:
        """Take from a replica what ``add`` gave."""
        self.curves[:, replica] -= units.curves[:, unit]
        self.volume[:, replica] -= units.volume[:, unit]

    def end_s(self) -> FloatArray:
        """Return [R] expected seconds until each replica is done."""
        return self._seconds(slice(None), self.curves, self.volume)

    def end_with_s(self, units: WorkUnits, unit: int, known_tokens: FloatArray | float = 0.0) -> FloatArray:
        """Return [R] expected seconds until each replica is done if it alone took a unit as well.

        Of the unit's prefill each replica has ``known_tokens``, [R], already.
        """
        volume = self.volume + units.volume[:, unit, None]
        volume[_PREFILLS] -= known_tokens
        return self._seconds(slice(None), self.curves + units.curves[:, unit, None], volume)

    def end_after_move_s(
        self, source: int, target: int, units: WorkUnits, prefill: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Return [U] seconds of source and of target for each of the source's units, if that one alone moved.

        Args:
            source: Replica that has the units.
            target: Replica that one moves to.
            units: The units.
            prefill: [U] tokens that the target computes before each of them decodes.
        """
        (rest, left), (more, taken) = ((self.curves[:, at, None], self.volume[:, at, None]) for at in (source, target))
        stays = self._seconds(source, rest - units.curves, left - units.volume)
        return stays, self._seconds(target, more + units.curves, taken + units.with_prefill(prefill).volume)

    def _seconds(self, at: int | slice, curves: FloatArray, volume: FloatArray) -> FloatArray:
        """Return the expected seconds of some work on the replicas ``at``.

        Iterations are as many as the longest sample has tokens, or more where samples take turns: at each depth the
        probability that any sample is alive, at least the number of alive ones over the slots. Each takes the fixed
        time; the rest of the time is in proportion to tokens.
        """
        alive, log_none = curves
        turns = np.maximum(-np.expm1(log_none), alive * self._per_slot[at])
        per_token_s = self._per_token_s[:, at].reshape(3, -1)
        seconds: FloatArray = (turns @ self.width) * self._fixed_s[at] + (volume * per_token_s).sum(axis=0)
        return seconds


class BestMove(NamedTuple):
    """Which unit of the last replica should go to the one that ends first, and the share of the time that it saves.

    The time is that until both have ended.
    """

    source: int
    unit: int
    target: int
    gain: float


class Foresight:
    """What is expected of a rollout from one look on; each part is computed once, when it is first asked for.

    Attributes:
        view: The rollout at that moment.
    """

    def __init__(self, view: RolloutView, refine: Callable[[RolloutView], Prediction]) -> None:
        self.view = view
        self._refine = refine

    @cached_property
    def prediction(self) -> Prediction:
        """Lengths given what has been generated."""
        return self._refine(self.view)

    @cached_property
    def outlook(self) -> Outlook:
        """The outlook on what is unfinished and has a replica, sorted by replica, state, group and id."""
        view = self.view
        held = np.flatnonzero((view.state != FINISHED) & (view.replica_of >= 0))
        order = np.lexsort((held, view.batch.group_of[held], view.state[held], view.replica_of[held]))
        return Outlook.build(self.prediction, view.batch, view.generated, held[order], view.pool.trainer.shape)

    @cached_property
    def _held(self) -> tuple[IntArray, WorkUnits]:
        """The replicas that hold samples, and what each holds as one unit, its prompts' computation apart."""
        replica_of = self.view.replica_of[self.outlook.samples]
        first = run_starts(replica_of)
        return replica_of[first], self.outlook.units(slice(None), first, np.zeros(len(first)))

    def workload(self) -> Workload:
        """Return what every replica of the rollout has to do, its prompts' computation apart."""
        work = Workload([self.view.pool.perf[replica.tp] for replica in self.view.replicas], self.outlook.width)
        replicas, units = self._held
        work.curves[:, replicas], work.volume[:, replicas] = units.curves, units.volume
        return work

    def remaining_s(self) -> float:
        """Return the expected seconds until the last sample is complete if each stays on the replica that has it."""
        return float(self.workload().end_s().max(initial=0.0))


def run_starts(key: IntArray) -> IntArray:
    """Return the positions at which runs of equal values of ``key``, [N] and >= 0, begin."""
    return np.flatnonzero(np.diff(key, prepend=-1))


def assign(work: Workload, units: WorkUnits, book: PrefixBook | None = None) -> list[int]:
    """Return the replica of each of U units; ``work`` and ``book`` take them.

    What lasts longest goes first, each to the replica that is done first with it.

    Args:
        work: What the replicas have already.
        units: What to place.
        book: Which shared prefixes replicas have; ``None`` when groups share nothing.
    """
    longest = -np.expm1(units.curves[_LOG_NONE]) @ work.width  # [U] expected tokens until all of a unit have ended
    leaders, replica_of = units.leaders, [0] * len(units.first)
    known = np.zeros(work.num_replicas)
    for unit in np.lexsort((leaders, -longest)).tolist():
        leader = int(leaders[unit])
        if book is not None:
            known = book.known_tokens(leader)
        replica = replica_of[unit] = int(work.end_with_s(units, unit, known).argmin())
        work.add(replica, units, unit)
        if book is not None:
            work.add_prefill(replica, -known[replica])
            book.add(leader, replica)
    return replica_of


def best_move(
    work: Workload,
    held: Callable[[int], WorkUnits],
    targets: Sequence[int],
    prefill: Callable[[WorkUnits, int], FloatArray],
) -> BestMove | None:
    """Return the move from the replica that ends last to the target that ends first; ``None`` when none saves time.

    Args:
        work: The work of all replicas.
        held: Returns the units of a replica that may move.
        targets: Replicas that may get one.
        prefill: Returns [U] tokens that a replica would compute for each unit.
    """
    end_s = work.end_s()
    source = int(np.argmax(end_s))
    target = min(targets, key=lambda replica: float(end_s[replica]))
    units = held(source)
    if source == target or not len(units.first):
        return None
    later_s = np.maximum(*work.end_after_move_s(source, target, units, prefill(units, target)))
    unit = int(np.argmin(later_s))
    gain = 1.0 - float(later_s[unit] / end_s[source])
    return BestMove(source, unit, target, gain) if gain > 0 else None
