"""How long replicas still need for what they have, and who should do what so that the last one ends early.

Lengths are uncertain, so work is a survival curve: how many requests of a replica are expected to be alive at each
further depth, and how likely any is. An iteration costs a fixed time while any request is alive, a part for each one
and a part per token of context; more requests than run at once take turns. A request that is probably long therefore
belongs where few others are.

Invariants: pure; ties go to the lower sample id, then to the lower replica id.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from verl_rlhfless.policy.affinity import PrefixBook
from verl_rlhfless.policy.perf import EnginePerf
from verl_rlhfless.policy.predict import Prediction
from verl_rlhfless.policy.snapshot import FINISHED, FloatArray, IntArray, RolloutView

_DEPTHS = 32


@dataclass(frozen=True)
class Outlook:
    """What is expected of every sample of a batch from now on.

    Attributes:
        width: [K] tokens between two depths.
        middle: [K] depths, in further tokens.
        alive: [B, K] float64, probability that a sample is alive at each depth.
        context: [B] float64, tokens of prompt and response so far.
    """

    width: FloatArray
    middle: FloatArray
    alive: FloatArray
    context: FloatArray

    @classmethod
    def build(cls, prediction: Prediction, generated: IntArray, prompt_tokens: IntArray) -> Outlook:
        """Return the outlook on samples that have ``generated`` tokens, [B], and are not complete."""
        reached = np.minimum(generated, prediction.cap - 1).astype(np.float64)
        edges = (prediction.cap - reached.min()) * np.linspace(0.0, 1.0, _DEPTHS + 1) ** 1.5
        middle = (edges[1:] + edges[:-1]) / 2
        now = np.maximum(prediction.alive_at(reached[:, None]), 1e-9)
        alive = np.minimum(prediction.alive_at(reached[:, None] + middle) / now, 1.0)
        return cls(np.diff(edges), middle, alive, (prompt_tokens + generated).astype(np.float64))

    def unit(self, samples: IntArray, prefill_tokens: float) -> Unit:
        """Return ``samples`` as one unit, of which ``prefill_tokens`` have to be computed before they decode."""
        alive = self.alive[samples]
        reads = self.context[samples] @ alive + alive.sum(axis=0) * self.middle
        return Unit(samples, alive.sum(axis=0), _log_none(alive).sum(axis=0), reads, prefill_tokens)


@dataclass(frozen=True, slots=True)
class Unit:
    """Samples that are placed together, as what they add to a replica's work.

    Attributes:
        samples: Their ids.
        alive: [K] expected samples alive at each depth.
        log_none: [K] log probability that none is.
        reads: [K] tokens of context that an iteration reads.
        prefill: Tokens to compute before the first decode.
    """

    samples: IntArray
    alive: FloatArray
    log_none: FloatArray
    reads: FloatArray
    prefill: float


class Workload:
    """What each of R replicas still has to do; grows with every unit that is added."""

    def __init__(self, perf: Sequence[EnginePerf], outlook: Outlook) -> None:
        self._width = outlook.width
        self._slots = np.array([[float(p.limits.max_num_seqs)] for p in perf])
        self._fixed_s = np.array([[p.iteration_s(0, 0)] for p in perf])
        full_s = np.array([[p.iteration_s(p.limits.max_num_seqs, 0)] for p in perf])
        self._per_request_s = (full_s - self._fixed_s) / self._slots
        self._per_read_s = np.array([[p.kv_s_per_token] for p in perf])
        self._per_prefill_s = np.array([p.prefill_s_per_token for p in perf])
        self.alive, self.log_none, self.reads = np.zeros((3, len(perf), len(outlook.width)))
        self.prefill = np.zeros(len(perf))

    @property
    def num_replicas(self) -> int:
        """How many replicas there are (R)."""
        return len(self.prefill)

    def copy(self) -> Workload:
        """Return a workload that can be tried out."""
        other = copy.copy(self)
        other.alive, other.log_none = self.alive.copy(), self.log_none.copy()
        other.reads, other.prefill = self.reads.copy(), self.prefill.copy()
        return other

    def add(self, replica: int, unit: Unit) -> None:
        """Give a unit to a replica."""
        self.alive[replica] += unit.alive
        self.log_none[replica] += unit.log_none
        self.reads[replica] += unit.reads
        self.prefill[replica] += unit.prefill

    def remove(self, replica: int, unit: Unit) -> None:
        """Take a unit from a replica that has it."""
        self.alive[replica] -= unit.alive
        self.log_none[replica] -= unit.log_none
        self.reads[replica] -= unit.reads
        self.prefill[replica] -= unit.prefill

    def end_s(self) -> FloatArray:
        """Return [R] expected seconds until each replica is done."""
        return self._seconds(slice(None), (self.alive, self.log_none, self.reads), self.prefill)

    def end_with_s(self, unit: Unit, known_tokens: FloatArray | float = 0.0) -> FloatArray:
        """Return [R] expected seconds until each replica is done if it alone took ``unit`` as well.

        Of its prefill each replica has ``known_tokens`` already.
        """
        curves = (self.alive + unit.alive, self.log_none + unit.log_none, self.reads + unit.reads)
        return self._seconds(slice(None), curves, self.prefill + unit.prefill - known_tokens)

    def end_after_move_s(
        self, source: int, target: int, units: Sequence[Unit], prefill: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Return [U] seconds of source and of target for each of the source's units, if that one alone moved.

        Args:
            source: Replica that has the units.
            target: Replica that one moves to.
            units: The units.
            prefill: [U] tokens that the target computes before each of them decodes.
        """
        alive = np.stack([unit.alive for unit in units])
        log_none = np.stack([unit.log_none for unit in units])
        reads = np.stack([unit.reads for unit in units])
        saved = np.array([unit.prefill for unit in units])
        rest = (self.alive[source] - alive, self.log_none[source] - log_none, self.reads[source] - reads)
        more = (self.alive[target] + alive, self.log_none[target] + log_none, self.reads[target] + reads)
        stays = self._seconds(source, rest, self.prefill[source] - saved)
        return stays, self._seconds(target, more, self.prefill[target] + prefill)

    def _seconds(self, at: int | slice, curves: Sequence[FloatArray], prefill: FloatArray) -> FloatArray:
        alive, log_none, reads = curves
        turns = np.maximum(-np.expm1(log_none), alive / self._slots[at])
        iteration_s = turns * self._fixed_s[at] + alive * self._per_request_s[at] + reads * self._per_read_s[at]
        seconds: FloatArray = iteration_s @ self._width + prefill * self._per_prefill_s[at]
        return seconds


def remaining_s(view: RolloutView, prediction: Prediction) -> float:
    """Return the expected seconds until the last sample is complete if each stays on the replica that has it."""
    outlook = Outlook.build(prediction, view.generated, view.batch.prompt_tokens)
    work = Workload([view.pool.perf[replica.tp] for replica in view.replicas], outlook)
    for replica in view.replicas:
        here = np.flatnonzero((view.replica_of == replica.replica) & (view.state != FINISHED))
        if len(here):
            work.add(replica.replica, outlook.unit(here, 0.0))
    return float(work.end_s().max(initial=0.0))


def _log_none(alive: FloatArray) -> FloatArray:
    log_none: FloatArray = np.log1p(-np.minimum(alive, 1 - 1e-9))
    return log_none


def assign(work: Workload, units: Sequence[Unit], width: FloatArray, book: PrefixBook | None = None) -> list[int]:
    """Return the replica of each unit; ``work`` takes them.

    What lasts longest goes first, each to the replica that is done first with it.

    Args:
        work: What the replicas have already.
        units: What to place.
        width: [K] tokens between two depths.
        book: Which prompts replicas have; ``None`` when groups share nothing.
    """
    lasts = [float(-np.expm1(unit.log_none) @ width) for unit in units]
    replica_of = [0] * len(units)
    for i in sorted(range(len(units)), key=lambda i: (-lasts[i], int(units[i].samples[0]))):
        unit = units[i]
        first = int(unit.samples[0])
        known = np.zeros(work.num_replicas) if book is None else book.known_tokens(first)
        replica = replica_of[i] = int(np.argmin(work.end_with_s(unit, known)))
        work.add(replica, replace(unit, prefill=unit.prefill - float(known[replica])))
        if book is not None:
            book.add(first, replica)
    return replica_of


def best_move(
    work: Workload, held: Sequence[Sequence[Unit]], targets: Sequence[int], prefill: Callable[[Unit, int], float]
) -> tuple[int, int, int, float] | None:
    """Return ``(source, position, target, gain)``: which unit of the last replica should go to the one that ends first.

    ``gain`` is the share of the time that the later of the two saves. ``None`` when no move saves any.

    Args:
        work: The work of all replicas.
        held: Units of each replica that may move.
        targets: Replicas that may get one.
        prefill: Tokens that a replica would compute for a unit.
    """
    end_s = work.end_s()
    source = int(np.argmax(end_s))
    target = min(targets, key=lambda replica: end_s[replica])
    units = held[source]
    if source == target or not units:
        return None
    tokens = np.array([prefill(unit, target) for unit in units])
    after_s = np.maximum(*work.end_after_move_s(source, target, units, tokens))
    best = int(np.argmin(after_s))
    gain = 1.0 - float(after_s[best] / end_s[source])
    return (source, best, target, gain) if gain > 0 else None
