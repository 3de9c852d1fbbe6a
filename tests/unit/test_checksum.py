from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from verl_rlhfless.errors import WeightStoreError
from verl_rlhfless.live import checksum
from verl_rlhfless.live.checksum import EngineChecksum, TensorSum, as_unsigned, bit_sum, stream_digest, verify
from verl_rlhfless.live.weight_manifest import Manifest

MANIFEST = Manifest(4, (), "00ff", (), 1)
GOOD = EngineChecksum(rank=0, received="00ff", expected_sum="aa", loaded_sum="aa", incomparable="")
SHARD = replace(GOOD, rank=1, loaded_sum="11", incomparable="a shard of 2")
TENSORS = (TensorSum("a", "float32", (2, 3), 5), TensorSum("b", "float32", (6,), 7))


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.tensor([1.0], dtype=torch.float32), 0x3F800000),
        (torch.tensor([1.0, 1.0], dtype=torch.bfloat16), 2 * 0x3F80),
        (torch.tensor([-0.0], dtype=torch.float16), 2**64 - 0x8000),
        (torch.tensor([1.0], dtype=torch.float64), 0x3FF0000000000000),
        (torch.tensor([-1, -1], dtype=torch.int8), 2**64 - 2),
        (torch.tensor([2**63 - 1, 2**63 - 1, 3], dtype=torch.int64), 1),
        (torch.empty(0, dtype=torch.bfloat16), 0),
        (torch.tensor(1.0), 0x3F800000),
    ],
)
def test_the_bit_sum_adds_the_bits_as_signed_integers(tensor: torch.Tensor, expected: int) -> None:
    assert as_unsigned(bit_sum(tensor)) == expected


def test_zero_padding_adds_nothing() -> None:
    weight = torch.randn(5, 8)
    padded = torch.cat([weight, torch.zeros(3, 8)])
    assert bit_sum(padded) == bit_sum(weight)


def test_a_transposed_weight_has_the_same_sum() -> None:
    weight = torch.randn(5, 8)
    assert bit_sum(weight.t()) == bit_sum(weight)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["own type", "converted"])
def test_a_gpu_copies_no_more_than_a_piece(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None) -> None:
    sizes = []

    def on_device(bits: torch.Tensor) -> torch.Tensor:
        sizes.append(bits.numel())
        return checksum._sum_by_torch(bits)

    monkeypatch.setattr(checksum, "_PIECE_ELEMENTS", 7)
    monkeypatch.setattr(checksum, "_sum_by_numpy", on_device)
    weight = torch.randn(5, 8).t()
    bits = weight.numpy().view(np.int32) if dtype is None else weight.to(dtype).view(torch.int16).numpy()
    assert as_unsigned(bit_sum(weight, dtype)) == int(bits.sum(dtype=np.int64)) % 2**64
    assert sizes == [7, 7, 7, 7, 7, 5]


def test_a_host_sums_pieces_modulo_2_to_the_64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "_PIECE_ELEMENTS", 2)
    assert as_unsigned(bit_sum(torch.tensor([2**63 - 1] * 5))) == (5 * (2**63 - 1)) % 2**64


@pytest.mark.parametrize(
    "change",
    [{"name": "c"}, {"dtype": "int32"}, {"shape": (3, 2)}, {"bit_sum": 6}],
    ids=lambda change: next(iter(change)),
)
def test_the_digest_sees_every_property(change: dict[str, object]) -> None:
    changed = (replace(TENSORS[0], **change), TENSORS[1])  # type: ignore[arg-type]
    assert stream_digest(changed) != stream_digest(TENSORS)


def test_the_digest_sees_a_missing_tensor_and_two_that_were_exchanged() -> None:
    exchanged = (replace(TENSORS[0], bit_sum=7), replace(TENSORS[1], bit_sum=5))
    assert len({stream_digest(tensors) for tensors in (TENSORS, TENSORS[:1], exchanged)}) == 3


def test_the_same_weights_are_accepted() -> None:
    assert verify(MANIFEST, [GOOD]) == "loaded"


def test_shards_are_compared_by_what_they_received() -> None:
    assert verify(MANIFEST, [replace(SHARD, rank=0), SHARD]) == "received (a shard of 2)"


def test_other_weights_are_refused_with_both_checksums() -> None:
    with pytest.raises(WeightStoreError, match=r"worker 1 received weights with checksum beef, but version 4 .* 00ff"):
        verify(MANIFEST, [SHARD, replace(SHARD, received="beef")])


def test_weights_that_were_received_but_not_loaded_are_refused_with_both_sums() -> None:
    with pytest.raises(WeightStoreError, match=r"worker 0 holds parameters with bit sum bb, but version 4 .* aa"):
        verify(MANIFEST, [replace(GOOD, loaded_sum="bb")])


def test_an_engine_without_an_answer_is_not_confirmed() -> None:
    with pytest.raises(WeightStoreError, match="version 4 is unconfirmed"):
        verify(MANIFEST, [])
