"""A paced trainer phase takes its declared time, and stays the method that verl dispatches."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transfer_queue import KVBatchMeta
from verl.utils import transferqueue_utils

from verl_rlhfless.errors import UnsupportedError
from verl_rlhfless.live.pacing import PaceModel
from verl_rlhfless_patches import verl_training_pace


class _Worker:
    def infer_batch(self, data: Any) -> str:
        return "inferred"

    def train_mini_batch(self, data: Any) -> str:
        return "trained"


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    naps: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: 100.0, sleep=naps.append)
    monkeypatch.setattr(verl_training_pace, "time", clock)
    return naps


@pytest.fixture
def worker() -> _Worker:
    module = ModuleType("engine_workers")
    module.TrainingWorker = type("TrainingWorker", (_Worker,), dict(vars(_Worker)))  # type: ignore[attr-defined]
    module.TrainingWorker.infer_batch.verl_mark = "dispatch"
    model = PaceModel(base_ms=1, per_inference_token_us=10, per_update_token_us=1000)
    verl_training_pace._patch(model, module)
    verl_training_pace._patch(model, module)  # a second time changes nothing
    return module.TrainingWorker()


def test_phases_wait_for_their_tokens(worker: _Worker, slept: list[float]) -> None:
    jagged = torch.nested.as_nested_tensor([torch.zeros(3), torch.zeros(5)], layout=torch.jagged)
    assert worker.infer_batch({"input_ids": jagged}) == "inferred"
    assert worker.train_mini_batch({"input_ids": torch.zeros(2, 10)}) == "trained"
    assert slept == pytest.approx([8 * 10e-6, 20 * 1000e-6])


def test_a_batch_that_comes_as_keys_of_the_data_queue_is_fetched_before_its_tokens_are_counted(
    worker: _Worker, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = KVBatchMeta(keys=["a"], tags=[{}], partition_id="train")
    fetched = {"input_ids": torch.zeros(4, 10)}
    monkeypatch.setattr(transferqueue_utils, "TQ_INITIALIZED", True)
    monkeypatch.setattr(transferqueue_utils, "kv_batch_meta2batch_meta", lambda _: SimpleNamespace(size=1))
    monkeypatch.setattr(transferqueue_utils, "_meta_to_realdata", lambda _: fetched)
    assert worker.infer_batch(meta) == "inferred"
    assert slept == pytest.approx([40 * 10e-6])


def test_verls_marks_survive(worker: _Worker) -> None:
    assert worker.infer_batch.verl_mark == "dispatch"  # type: ignore[attr-defined]


def test_changed_method_is_refused() -> None:
    module = ModuleType("engine_workers")
    module.TrainingWorker = type("TrainingWorker", (), {"infer_batch": lambda self, batch: None})  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedError, match="infer_batch"):
        verl_training_pace._patch(PaceModel(base_ms=1), module)
