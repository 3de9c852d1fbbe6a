"""What of the trainer's weights travels in the engine's element type, and what is left as it is."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module

from verl_rlhfless.config import parse_config
from verl_rlhfless.live import weight_engine
from verl_rlhfless.live.trainer import _use_weight_store
from verl_rlhfless.live.weight_engine import BACKEND, Publication, StoreCheckpointEngine, narrowed

BF16 = torch.bfloat16


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(("hidden", "kv", "intermediate", "layers", "vocab"), [
    (896, 128, 4864, 24, 151936), (2048, 256, 11008, 36, 151936), (3584, 512, 18944, 28, 152064),
], ids=["0.5B", "3B", "7B"])  # fmt: skip
def test_nearly_all_bytes_of_qwen_are_cast(hidden: int, kv: int, intermediate: int, layers: int, vocab: int) -> None:
    layer = [(hidden, hidden)] * 2 + [(kv, hidden)] * 2 + [(intermediate, hidden)] * 3 + [(hidden,)] * 3 + [(kv,)] * 2
    shapes = [(vocab, hidden), *layer * layers]
    cast = sum(math.prod(shape) for shape in shapes if narrowed(weight(*shape), BF16).dtype == BF16)
    assert cast >= 0.98 * sum(math.prod(shape) for shape in shapes)


@pytest.mark.parametrize(("kind", "shape"), [
    ("router", (256, 7168)), ("router of 512 experts", (512, 2048)), ("norm", (7168,)), ("scalar", ()),
    ("convolution", (8192, 1, 4)), ("state space", (8192, 16)), ("nothing", (0, 8)),
])  # fmt: skip
def test_what_an_engine_may_hold_in_fp32_is_left_as_it_is(kind: str, shape: tuple[int, ...]) -> None:
    assert narrowed(weight(*shape), BF16).dtype == torch.float32, kind


@pytest.mark.parametrize(("trained", "served"), [
    (torch.float32, None), (torch.float32, torch.float32), (BF16, torch.float32), (BF16, torch.float16),
    (torch.int64, BF16), (torch.float8_e4m3fn, BF16),
])  # fmt: skip
def test_nothing_is_cast_to_a_type_that_is_no_narrower(trained: torch.dtype, served: torch.dtype | None) -> None:
    matrix = weight(2048, 2048, dtype=trained)
    assert narrowed(matrix, served) is matrix


def test_fused_experts_are_cast_whatever_their_width() -> None:
    assert narrowed(weight(512, 2048, 512), BF16).dtype == BF16


def test_a_cast_matrix_is_what_an_engine_makes_of_the_published_one() -> None:
    published, loaded = torch.randn(600, 600), torch.empty(600, 600, dtype=BF16)
    loaded.copy_(published)
    assert torch.equal(narrowed(published, BF16), loaded)


def test_the_trainers_workers_learn_the_type_of_the_rollout() -> None:
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=["actor_rollout_ref.rollout.dtype=float16"])
    _use_weight_store(config, parse_config({}), "store")
    assert config.actor_rollout_ref.rollout.checkpoint_engine.engine_kwargs[BACKEND].rollout_dtype == "float16"


def test_a_tensor_is_summed_where_it_is_and_its_sum_is_not_read_before_the_commit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    summed, bit_sum = [], weight_engine.bit_sum

    def sum_of(tensor: torch.Tensor) -> torch.Tensor:
        summed.append(tensor.data_ptr())
        return bit_sum(tensor)

    def read(total: torch.Tensor) -> int:
        raise AssertionError("a GPU is waited for")

    monkeypatch.setattr(weight_engine, "bit_sum", sum_of)
    monkeypatch.setattr(weight_engine, "as_unsigned", read)
    tensor = torch.ones(3)
    publication = Publication(None, 1, torch.empty(64, dtype=torch.uint8), 1.0)
    asyncio.run(publication.add("a", tensor))
    assert summed == [tensor.data_ptr()]
    assert publication.num_bytes == 12


def test_what_is_published_travels_in_the_type_of_the_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[torch.Tensor] = []

    class Published:
        num_bytes = 0

        async def begin(self) -> None:
            pass

        async def add(self, name: str, tensor: torch.Tensor) -> None:
            added.append(tensor)

        async def commit(self) -> str:
            return "checksum"

    monkeypatch.setattr(weight_engine, "connect", lambda _: None)
    monkeypatch.setattr(weight_engine, "Publication", lambda *_: Published())
    sent = [torch.randn(600, 600), torch.randn(600)]
    for dtype, expected in (("bfloat16", [BF16, torch.float32]), ("auto", [torch.float32] * 2)):
        added.clear()
        engine = StoreCheckpointEngine(1, True, store_name="store", bucket_mib=1, rollout_dtype=dtype)
        asyncio.run(engine.send_weights(zip("ab", sent, strict=True), global_steps=1))
        assert [tensor.dtype for tensor in added] == expected


@pytest.mark.parametrize(("has_gpu", "is_master"), [(True, True), (True, False), (False, True)])
def test_only_a_publisher_with_an_accelerator_pins_its_staging_buffer(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool, is_master: bool
) -> None:
    asked, empty = [], torch.empty

    def allocated(size: int, *, pin_memory: bool, **kwargs: Any) -> torch.Tensor:
        asked.append(pin_memory)
        return empty(size, **kwargs)

    monkeypatch.setattr(weight_engine, "connect", lambda _: None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch, "empty", allocated)
    StoreCheckpointEngine(1, is_master, store_name="store", bucket_mib=1)
    assert asked == [has_gpu and is_master]
