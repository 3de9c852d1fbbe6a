"""Computes every forward-only phase of a fused step twice: as verl alone would, then with what fusion knows already.

Loaded through ``VERL_USE_EXTERNAL_MODULES``. Same samples, same weights: what differs is fusion's. In between, every
result of the first time is overwritten, so that fusion has to deliver each one itself. Writes an event for each phase.
"""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import torch
import transfer_queue as tq
import wrapt
from tensordict import TensorDict

import benchmarks.cpu_critic  # noqa: F401  loads critics

_RESULTS = {
    "_compute_old_log_prob": ("old_log_probs", "entropy"),
    "_compute_ref_log_prob": ("ref_log_prob",),
    "_compute_values": ("values",),
}


def _inject(module: ModuleType) -> None:
    for method in _RESULTS:
        setattr(module.FusionTrainer, method, _twice(method, getattr(module.FusionTrainer, method)))


def _twice(method: str, original: Any) -> Any:
    def compute(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        if self._memory.is_open:  # a chunk beside the rollout
            return original(self, batch, metrics)
        alone: dict[str, Any] = {}
        phases, self._phases = self._phases, {}
        original(self, copy.deepcopy(batch), alone)
        self._phases = phases
        expected = _read(batch, method)
        _overwrite(batch, expected, phases[method].fields)
        output = original(self, batch, metrics)
        found = _read(batch, method)
        known = self._memory.of(phases[method])
        self._events.write(
            "twice",
            method=method,
            step=self.global_steps,
            num_recalled=known.num_recalled,
            num_computed=known.num_computed,
            largest={name: float(column.values().abs().max()) for name, column in expected.items()},
            off={name: _relative(found[name].values(), expected[name].values()) for name in expected.keys()},  # noqa: SIM118
            off_metrics={name: _relative(torch.tensor(metrics[name]), torch.tensor(alone[name])) for name in alone},
        )
        return output

    return compute


def _read(batch: Any, method: str) -> Any:
    return tq.kv_batch_get(batch.keys, batch.partition_id, select_fields=list(_RESULTS[method]))


def _overwrite(batch: Any, results: Any, raw: tuple[str, ...]) -> None:
    data = {
        name: torch.nested.nested_tensor_from_jagged(torch.full_like(c.values(), 1e30), c.offsets())
        for name, c in results.items()
    }
    stale = tq.kv_batch_get(batch.keys, batch.partition_id, select_fields=list(raw))
    for name in set(raw) - set(data):
        column = stale[name]
        data[name] = torch.nested.nested_tensor_from_jagged(torch.full_like(column.values(), 1e30), column.offsets())
    tq.kv_batch_put(batch.keys, batch.partition_id, TensorDict(data, batch_size=len(batch)))


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference over the largest magnitude: single elements may be next to zero."""
    scale = expected.abs().double().max().clamp(min=1e-3)
    return float((found.double() - expected.double()).abs().max() / scale)


wrapt.register_post_import_hook(_inject, "verl_rlhfless.live.fusion_trainer")
