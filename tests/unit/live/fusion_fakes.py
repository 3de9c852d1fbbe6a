"""verl's transfer queue and a worker group, as far as fusion uses them, in memory."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from transfer_queue import KVBatchMeta


class FakeQueue:
    """Fields and tags by key; answers only with fields that all asked keys have, as the real one does."""

    def __init__(self) -> None:
        self.fields: dict[str, dict[str, torch.Tensor]] = {}
        self.tags: dict[str, dict[str, Any]] = {}

    def finish(self, *keys: str, tokens: int = 3) -> None:
        for key in keys:
            self.fields[key] = {"input_ids": torch.arange(tokens) + 10 * len(self.fields)}
            self.tags[key] = {"status": "success", "seq_len": tokens}

    def batch(self, *keys: str) -> KVBatchMeta:
        return KVBatchMeta(partition_id="train", keys=list(keys), tags=[self.tags[key] for key in keys])

    def kv_list(self, partition_id: str) -> dict[str, dict[str, Any]]:
        return {partition_id: dict(self.tags)}

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str]) -> TensorDict:
        columns = {
            name: torch.nested.as_nested_tensor([self.fields[key][name] for key in keys], layout=torch.jagged)
            for name in select_fields
        }
        return TensorDict(columns, batch_size=len(keys))

    def kv_batch_put(self, keys: list[str], partition_id: str, fields: TensorDict) -> KVBatchMeta:
        for name, column in fields.items():
            for key, row in zip(keys, column.unbind(), strict=True):
                self.fields[key][name] = row
        return self.batch(*keys)


class FakeGroup:
    """A worker group of two ranks whose result for a sample is known: its ids times ``factor``, which may change."""

    def __init__(self, queue: FakeQueue, fields: tuple[str, ...] = ("log_probs",), world_size: int = 2) -> None:
        self._queue, self._fields = queue, fields
        self._dispatch_info: dict[str, list[int]] = {}
        self.world_size = world_size
        self.factor = 1.0
        self.calls: list[list[str]] = []
        self.failure: Exception | None = None

    def _query_dispatch_info(self, mesh: str) -> list[int]:
        return list(range(self.world_size))

    def compute_log_prob(self, batch: KVBatchMeta) -> KVBatchMeta:
        assert len(batch) % self.world_size == 0, "verl splits a batch evenly over its ranks"
        if self.failure is not None:
            raise self.failure
        self.calls.append(list(batch.keys))
        for key in batch.keys:
            for number, name in enumerate(self._fields, start=1):
                self._queue.fields[key][name] = self._queue.fields[key]["input_ids"] * self.factor * number
        return batch

    compute_ref_log_prob = infer_batch = compute_log_prob
