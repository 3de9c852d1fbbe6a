"""What was inferred during the rollout is not inferred again: a worker group that remembers, phase by phase.

verl's own methods (``_compute_old_log_prob`` and its kin) run unchanged, first on chunks beside the rollout and then on
the whole batch. Only the call into the worker group is in between: it returns what is known and computes the rest, so
that verl's post-processing and metrics see exactly what they would see without fusion.

Invariants: a result belongs to one sample key and one phase; a call that fails is remembered by nobody.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions

from verl_rlhfless.policy.fuse import CallCost, fit_cost

_CALLS_KEPT = 16  # enough for a line, few enough to forget the first calls, which are slow


@dataclass(frozen=True, slots=True)
class Phase:
    """One forward-only phase of verl's step.

    Attributes:
        method: verl's method of the trainer.
        group: Attribute of the trainer that holds the phase's worker group.
        call: The worker group's method.
        mesh: Name of its dispatch mesh.
        fields: What the workers write to the transfer queue, which later phases overwrite: [B] jagged tensors.
        micro_batch: Samples of a rank must be a multiple of this; 1 with dynamic batches.
    """

    method: str
    group: str
    call: str
    mesh: str
    fields: tuple[str, ...]
    micro_batch: int = 1

    def dp_size(self, group: Any) -> int:
        """Return the data-parallel size of the phase in ``group``, as verl's dispatch asks for it."""
        if self.mesh not in group._dispatch_info:
            group._dispatch_info[self.mesh] = group._query_dispatch_info(self.mesh)
        return int(max(group._dispatch_info[self.mesh])) + 1

    def quantum(self, group: Any) -> int:
        """Return what the number of samples of a call must be a multiple of."""
        return self.dp_size(group) * self.micro_batch


@dataclass(slots=True)
class PhaseMemory:
    """What is known of one phase: raw results by sample key, and how long calls took, also those of earlier steps.

    Attributes:
        results: One tensor for each of the phase's fields.
        calls: Tokens and seconds of the last worker calls.
        num_recalled: Samples of the last call, in the end the whole batch, that were not computed.
        num_computed: Samples of it that were.
    """

    results: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    calls: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_CALLS_KEPT))
    num_recalled: int = 0
    num_computed: int = 0


class InferenceMemory:
    """Results of the running step and cost of every phase.

    Attributes:
        is_open: Whether what is computed is kept: while the rollout runs.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._phases: defaultdict[str, PhaseMemory] = defaultdict(PhaseMemory)

    def of(self, phase: Phase) -> PhaseMemory:
        """Return what is known of a phase."""
        return self._phases[phase.method]

    def cost(self, phases: Sequence[Phase]) -> CallCost | None:
        """Return the cost of a chunk in all ``phases``; ``None`` when one of them was never measured."""
        calls = [self.of(phase).calls for phase in phases]
        return sum((fit_cost(list(known)) for known in calls), CallCost(0.0, 0.0)) if all(calls) else None

    def clear(self) -> None:
        """Forget results and counts; the cost of calls is kept."""
        self.is_open = False
        for memory in self._phases.values():
            memory.results.clear()
            memory.num_recalled = memory.num_computed = 0


@dataclass(frozen=True, slots=True)
class Inferred:
    """What verl asks of a finished call: how many samples it had, and that nothing is left to wait for."""

    num_samples: int
    futures: list[Any] = field(default_factory=list)

    def __len__(self) -> int:
        return self.num_samples


class RecallingGroup:
    """Stands in for a worker group during one phase; everything but the phase's call is the group's own."""

    def __init__(self, group: Any, phase: Phase, memory: InferenceMemory) -> None:
        self._group, self._phase, self._memory = group, phase, memory

    def __getattr__(self, name: str) -> Any:
        return self._infer if name == self._phase.call else getattr(self._group, name)

    def _infer(self, batch: KVBatchMeta) -> Inferred:
        memory, phase = self._memory.of(self._phase), self._phase
        unknown = _aligned(batch.keys, memory.results, phase.quantum(self._group))
        recalled = [key for key in batch.keys if key not in unknown]
        if unknown:
            is_verls_own = not recalled and not self._memory.is_open  # in verl's order, so that not a bit differs
            self._compute(batch if is_verls_own else self._balanced(batch, unknown), memory)
        if recalled:
            columns = zip(*(memory.results[key] for key in recalled), strict=True)
            fields = {name: _jagged(column) for name, column in zip(phase.fields, columns, strict=True)}
            tq.kv_batch_put(recalled, batch.partition_id, TensorDict(fields, batch_size=len(recalled)))
        memory.num_recalled, memory.num_computed = len(recalled), len(unknown)
        return Inferred(len(batch))

    def _balanced(self, batch: KVBatchMeta, keys: set[str]) -> KVBatchMeta:
        part = batch.select_keys([key for key in batch.keys if key in keys])
        balance(part, self._phase.dp_size(self._group))
        return part

    def _compute(self, batch: KVBatchMeta, memory: PhaseMemory) -> None:
        began_s = time.monotonic()
        output = getattr(self._group, self._phase.call)(batch)
        if futures := getattr(output, "futures", None):  # verl's critic returns before its workers are done
            ray.get(futures)
        memory.calls.append((num_tokens(batch), time.monotonic() - began_s))
        if self._memory.is_open:
            fields = list(self._phase.fields)
            data = tq.kv_batch_get(batch.keys, batch.partition_id, select_fields=fields)
            rows = zip(*(data[name].unbind() for name in fields), strict=True)
            memory.results.update(zip(batch.keys, rows, strict=True))


def num_tokens(batch: KVBatchMeta) -> int:
    """Return the tokens of all samples of a batch."""
    return sum(tag["seq_len"] for tag in batch.tags)


def balance(batch: KVBatchMeta, dp_size: int) -> None:
    """Order a batch so that ranks get equal numbers of samples and about equal work, as verl does the whole one."""
    lengths = torch.tensor([tag["seq_len"] for tag in batch.tags], dtype=torch.int64)
    parts = get_seqlen_balanced_partitions(calculate_workload(lengths), k_partitions=dp_size, equal_size=True)
    batch.reorder([row for part in parts for row in part])


def _aligned(keys: Sequence[str], known: dict[str, Any], quantum: int) -> set[str]:
    """Return the keys to compute: unknown ones, and as many known ones as their number needs to be a multiple."""
    unknown = {key for key in keys if key not in known}
    spare = [key for key in keys if key in known]
    return unknown.union(spare[: -len(unknown) % quantum])


def _jagged(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)
