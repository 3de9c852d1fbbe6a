"""What an engine's worker says of its weights: sums of what came, of what it is to hold, and of what it holds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from verl_rlhfless.live import checksum, engine_worker
from verl_rlhfless.live.engine_worker import ElasticWorkerExtension, ReceivedWeights

BF16 = torch.bfloat16
PARALLEL = SimpleNamespace(world_size=1)
PLAIN = {"parallel_config": PARALLEL, "quant_config": None, "lora_config": None, "speculative_config": None}


class Model(torch.nn.Module):
    """A matrix and a norm in the engine's element type."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.zeros(6, 7, dtype=BF16))
        self.norm = torch.nn.Parameter(torch.zeros(7, dtype=BF16))


def checked(
    sent: dict[str, torch.Tensor], *, loads: bool = True, is_tied: bool = False, **config: Any
) -> dict[str, Any]:
    """Return the worker's answer after these weights have come, and were loaded or not."""
    worker: Any = ElasticWorkerExtension.__new__(ElasticWorkerExtension)
    model = Model()
    worker.rank, worker.rlhfless_received = 3, ReceivedWeights(BF16, is_tied)
    for name, tensor in sent.items():
        worker.rlhfless_received.add(name, tensor)
        if loads and hasattr(model, name):
            getattr(model, name).data.copy_(tensor)
    worker.model_runner = SimpleNamespace(model=model, vllm_config=SimpleNamespace(**{**PLAIN, **config}))
    answer: dict[str, Any] = worker.weights_checksum()
    return answer


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {"matrix": torch.randn(6, 7, generator=made), "norm": torch.randn(7, generator=made)}


def test_weights_that_are_cast_on_loading_are_expected_as_the_engine_holds_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checksum, "_PIECE_ELEMENTS", 5)  # most tensors are summed in many pieces
    answer = checked(weights())
    total = sum(int(tensor.to(BF16).view(torch.int16).sum(dtype=torch.int64)) for tensor in weights().values())
    assert answer["expected_sum"] == answer["loaded_sum"] == f"{total % 2**64:016x}"
    assert answer["rank"] == 3 and not answer["incomparable"]


def test_weights_that_did_not_reach_the_model_are_told_from_those_that_did() -> None:
    answer = checked(weights(), loads=False)
    assert answer["received"] == checked(weights())["received"] != checked(weights(seed=1))["received"]
    assert answer["loaded_sum"] == f"{0:016x}" != answer["expected_sum"] and not answer["incomparable"]


def test_a_head_that_is_the_embedding_is_expected_once() -> None:
    sent = weights()
    with_head = {**sent, "lm_head.weight": sent["matrix"]}
    tied = checked(with_head, is_tied=True)
    assert tied["expected_sum"] == tied["loaded_sum"] and not tied["incomparable"]
    assert checked(with_head)["incomparable"] == "91 elements for 49 parameters"


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"parallel_config": SimpleNamespace(world_size=2)}, "a shard of 2"),
        ({"quant_config": object()}, "quantised"),
        ({"lora_config": object()}, "with adapters"),
        ({"speculative_config": object()}, "with a draft model"),
    ],
)
def test_an_engine_that_holds_other_tensors_says_why(config: dict[str, Any], why: str) -> None:
    assert checked(weights(), **config)["incomparable"] == why


@pytest.mark.parametrize("is_host", [True, False])
def test_memory_in_use_is_that_of_the_whole_device_and_none_where_it_is_the_host(
    monkeypatch: pytest.MonkeyPatch, is_host: bool
) -> None:
    monkeypatch.setattr(engine_worker, "current_platform", SimpleNamespace(is_cpu=lambda: is_host))
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (30, 80), raising=False)
    worker: Any = None  # asked of its device alone
    assert ElasticWorkerExtension.device_memory(worker) == ((0, 0) if is_host else (50, 80))
