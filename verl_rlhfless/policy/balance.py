"""How long replicas still need for what they have, and who should do what so that the last one ends early.

Lengths are uncertain, so work is a survival curve: how many requests of a replica are expected to be alive at each
further depth, and how likely any is. An iteration costs a fixed time while any request is alive, a part for each one
and a part per token of context; more requests than run at once take turns. A request that is probably long therefore
belongs where few others are.

Invariants: pure; ties go to the lower sample id, then to the lower replica id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from verl_rlhfless.policy.affinity import PrefixBook
from verl_rlhfless.policy.perf import EnginePerf
from verl_rlhfless.policy.predict import Prediction
from verl_rlhfless.policy.snapshot import FINISHED, Batch, FloatArray, IntArray, RolloutView

_DEPTHS, _FEW = 32, 16
_MANY_SAMPLES = 4096
"""Of more than these, the curves of replicas are smooth enough for few depths (within 0.5 % of their seconds)."""

_BLOCK = 1024  # samples whose curves are computed together: what they take stays in the processor's cache


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is expected of samples from now on.

    Attributes:
        samples: [N] their ids, in the order that suits the caller.
        width: [K] tokens between two depths.
        curves: [3, N, K] float64 at each depth: the probability that a sample is alive, the log of the probability that
            it is not, and the tokens of context that an iteration reads for it.
    """

    samples: IntArray
    width: FloatArray
    curves: FloatArray

    @classmethod
    def build(cls, prediction: Prediction, batch: Batch, generated: IntArray, samples: IntArray) -> Outlook:
        """Return the outlook on ``samples``, none of which is complete; ``generated`` is [B] tokens so far."""
        reached = np.minimum(generated[samples], prediction.cap - 1).astype(np.float64)
        depths = _DEPTHS if len(samples) <= _MANY_SAMPLES else _FEW
        edges = (prediction.cap - reached.min(initial=prediction.cap)) * np.linspace(0.0, 1.0, depths + 1) ** 1.5
        middle = (edges[1:] + edges[:-1]) / 2
        context = (batch.prompt_tokens + generated)[samples].astype(np.float64)
        curves = np.empty((3, len(samples), depths))
        for begin in range(0, len(samples), _BLOCK):
            rows = slice(begin, begin + _BLOCK)
            part, depth = prediction.of(samples[rows]), reached[rows, None]
            now = np.maximum(part.alive_at(depth), 1e-9)
            alive = np.minimum(part.alive_at(depth + middle) / now, 1.0)
            curves[0, rows], curves[1, rows] = alive, np.log1p(-np.minimum(alive, 1 - 1e-9))
            curves[2, rows] = (context[rows, None] + middle) * alive
        return cls(samples, np.diff(edges), curves)

    def units(self, rows: slice, first: IntArray, prefill: FloatArray) -> Units:
        """Return the samples of some rows as units, each from ``first``, [U], of these rows on.

        Args:
            rows: Which rows.
            first: Increasing, from 0.
            prefill: [U] tokens that have to be computed before a unit decodes.
        """
        curves = self.curves[:, rows]
        if len(first) < curves.shape[1]:
            curves = np.add.reduceat(curves, first, axis=1)
        return Units(self.samples[rows], first, curves, prefill)


@dataclass(frozen=True, slots=True)
class Units:
    """Sets of samples, U of them, each placed as a whole, as what they add to a replica's work.

    Attributes:
        samples: [N] ids, one unit's after the other's.
        first: [U] where each begins in ``samples``.
        curves: [3, U, K] as in ``Outlook``, summed.
        prefill: [U] tokens to compute before the first decode.
    """

    samples: IntArray
    first: IntArray
    curves: FloatArray
    prefill: FloatArray

    @property
    def leaders(self) -> IntArray:
        """The first sample of each, [U]."""
        return self.samples[self.first]

    @property
    def sizes(self) -> IntArray:
        """Samples of each, [U]."""
        return np.diff(self.first, append=len(self.samples))

    def members(self, unit: int) -> IntArray:
        """Return the ids of a unit's samples."""
        return self.samples[self.first[unit] :][: self.sizes[unit]]

    def without(self, unit: int) -> Units:
        """Return all units but one."""
        rest = np.arange(len(self.first)) != unit
        samples = self.samples[np.repeat(rest, self.sizes)]
        sizes = self.sizes[rest]
        return Units(samples, np.cumsum(sizes) - sizes, self.curves[:, rest], self.prefill[rest])


class Workload:
    """What each of R replicas still has to do; grows with every unit that is added."""

    def __init__(self, perf: Sequence[EnginePerf], width: FloatArray) -> None:
        self.width = width
        self._slots = np.array([[float(p.limits.max_num_seqs)] for p in perf])
        self._fixed_s = np.array([[p.iteration_s(0, 0)] for p in perf])
        full_s = np.array([[p.iteration_s(p.limits.max_num_seqs, 0)] for p in perf])
        self._per_request_s = (full_s - self._fixed_s) / self._slots
        self._per_read_s = np.array([[p.kv_s_per_token] for p in perf])
        self._per_prefill_s = np.array([p.prefill_s_per_token for p in perf])
        self.curves = np.zeros((3, len(perf), len(width)))
        self.prefill = np.zeros(len(perf))

    @property
    def num_replicas(self) -> int:
        """How many replicas there are (R)."""
        return len(self.prefill)

    def add(self, replica: int, curves: FloatArray, prefill: float) -> None:
        """Give a replica a unit of these curves, [3, K], that lets it compute ``prefill`` tokens first."""
        self.curves[:, replica] += curves
        self.prefill[replica] += prefill

    def remove(self, replica: int, curves: FloatArray, prefill: float) -> None:
        """Take from a replica what ``add`` gave."""
        self.add(replica, -curves, -prefill)

    def end_s(self) -> FloatArray:
        """Return [R] expected seconds until each replica is done."""
        return self._seconds(slice(None), self.curves, self.prefill)

    def end_with_s(self, curves: FloatArray, prefill: FloatArray) -> FloatArray:
        """Return [R] expected seconds until each replica is done if it alone took a unit as well.

        Args:
            curves: [3, K] of the unit.
            prefill: [R] tokens that each replica would compute first.
        """
        return self._seconds(slice(None), self.curves + curves[:, None], self.prefill + prefill)

    def end_after_move_s(
        self, source: int, target: int, units: Units, prefill: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Return [U] seconds of source and of target for each of the source's units, if that one alone moved.

        Args:
            source: Replica that has the units.
            target: Replica that one moves to.
            units: The units.
            prefill: [U] tokens that the target computes before each of them decodes.
        """
        rest, more = (self.curves[:, at, None] for at in (source, target))
        stays = self._seconds(source, rest - units.curves, self.prefill[source] - units.prefill)
        return stays, self._seconds(target, more + units.curves, self.prefill[target] + prefill)

    def _seconds(self, at: int | slice, curves: FloatArray, prefill: FloatArray) -> FloatArray:
        alive, log_none, reads = curves
        turns = np.maximum(-np.expm1(log_none), alive / self._slots[at])
        iteration_s = turns * self._fixed_s[at] + alive * self._per_request_s[at] + reads * self._per_read_s[at]
        seconds: FloatArray = iteration_s @ self.width + prefill * self._per_prefill_s[at]
        return seconds


class Foresight:
    """What is expected of a rollout from one look on; each part is computed when it is first asked for.

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
        """The outlook on what is unfinished and has a replica: by replica, state, group and id."""
        view = self.view
        held = np.flatnonzero((view.state != FINISHED) & (view.replica_of >= 0))
        order = np.lexsort((held, view.batch.group_of[held], view.state[held], view.replica_of[held]))
        return Outlook.build(self.prediction, view.batch, view.generated, held[order])

    @cached_property
    def _curves(self) -> FloatArray:
        replica_of = self.view.replica_of[self.outlook.samples]
        curves = np.zeros((3, len(self.view.replicas), len(self.outlook.width)))
        for begin, end in pairwise([*bounds(replica_of).tolist(), len(replica_of)]):
            curves[:, replica_of[begin]] = np.ones(end - begin) @ self.outlook.curves[:, begin:end]
        return curves

    def workload(self) -> Workload:
        """Return what every replica of the rollout has to do, its prompts' computation apart."""
        work = Workload([self.view.pool.perf[replica.tp] for replica in self.view.replicas], self.outlook.width)
        work.curves += self._curves
        return work

    def remaining_s(self) -> float:
        """Return the expected seconds until the last sample is complete if each stays on the replica that has it."""
        return float(self.workload().end_s().max(initial=0.0))


def bounds(key: IntArray) -> IntArray:
    """Return where each run of equal values of a key, [N], begins."""
    return np.flatnonzero(np.diff(key, prepend=-1))


def assign(work: Workload, units: Units, book: PrefixBook | None = None) -> list[int]:
    """Return the replica of each unit; ``work`` takes them.

    What lasts longest goes first, each to the replica that is done first with it.

    Args:
        work: What the replicas have already.
        units: What to place.
        book: Which prompts replicas have; ``None`` when groups share nothing.
    """
    lasts = -np.expm1(units.curves[1]) @ work.width
    leaders, replica_of = units.leaders, [0] * len(units.first)
    for unit in np.lexsort((leaders, -lasts)).tolist():
        curves, prefill = units.curves[:, unit], np.full(work.num_replicas, units.prefill[unit])
        if book is not None:
            prefill -= book.known_tokens(int(leaders[unit]))
        replica = replica_of[unit] = int(np.argmin(work.end_with_s(curves, prefill)))
        work.add(replica, curves, float(prefill[replica]))
        if book is not None:
            book.add(int(leaders[unit]), replica)
    return replica_of


def best_move(
    work: Workload,
    held: Callable[[int], Units],
    targets: Sequence[int],
    prefill: Callable[[Units, int], FloatArray],
) -> tuple[int, int, int, float] | None:
    """Return ``(source, position, target, gain)``: which unit of the last replica should go to the one that ends first.

    ``gain`` is the share of the time that the later of the two saves. ``None`` when no move saves any.

    Args:
        work: The work of all replicas.
        held: Units of a replica that may move.
        targets: Replicas that may get one.
        prefill: [U] tokens that a replica would compute for each unit.
    """
    end_s = work.end_s()
    source = int(np.argmax(end_s))
    target = min(targets, key=lambda replica: float(end_s[replica]))
    units = held(source)
    if source == target or not len(units.first):
        return None
    after_s = np.maximum(*work.end_after_move_s(source, target, units, prefill(units, target)))
    best = int(np.argmin(after_s))
    gain = 1.0 - float(after_s[best] / end_s[source])
    return (source, best, target, gain) if gain > 0 else None
