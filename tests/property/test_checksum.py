"""What vLLM does to weights while it loads them must not change the checksum; anything else must."""

from __future__ import annotations

from random import Random

import torch
from hypothesis import given
from hypothesis import strategies as st

from verl_rlhfless.live.checksum import TensorSum, as_unsigned, bit_sum, stream_digest

FLOATS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Return any bit pattern, infinities and NaNs too: weights are moved, never computed with."""
    dtype = draw(st.sampled_from(list(FLOATS)))
    bits = FLOATS[dtype]
    limits = torch.iinfo(bits)
    values = draw(st.lists(st.integers(limits.min, limits.max), min_size=2, max_size=40))
    return torch.tensor(values, dtype=bits).view(dtype)


@given(weights(), st.data())
def test_concatenation_and_order_change_nothing(weight: torch.Tensor, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, weight.numel()))
    order = data.draw(st.permutations(range(weight.numel())))
    parts = as_unsigned(int(bit_sum(weight[:cut])) + int(bit_sum(weight[cut:])))
    assert parts == as_unsigned(bit_sum(weight)) == as_unsigned(bit_sum(weight[list(order)]))


@given(weights(), st.data())
def test_one_flipped_bit_changes_it(weight: torch.Tensor, data: st.DataObject) -> None:
    flipped = weight.clone().view(torch.uint8)
    index = data.draw(st.integers(0, flipped.numel() - 1))
    flipped[index] ^= 1 << data.draw(st.integers(0, 7))
    assert as_unsigned(bit_sum(flipped.view(weight.dtype))) != as_unsigned(bit_sum(weight))


@given(weights())
def test_the_way_over_a_processor_without_numpy_gives_the_same_sum(weight: torch.Tensor) -> None:
    on_device = weight.view(FLOATS[weight.dtype]).sum(dtype=torch.int64)
    assert as_unsigned(on_device) == as_unsigned(bit_sum(weight))


SUMS = st.builds(
    TensorSum,
    name=st.sampled_from("abcdefgh"),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    shape=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    bit_sum=st.integers(0, 2**64 - 1),
)


@given(st.lists(SUMS, unique_by=lambda item: item.name), st.randoms())
def test_the_digest_does_not_depend_on_the_order_of_tensors(tensors: list[TensorSum], random: Random) -> None:
    shuffled = list(tensors)
    random.shuffle(shuffled)
    assert stream_digest(shuffled) == stream_digest(tensors)


@given(st.lists(SUMS, unique_by=lambda item: item.name), st.lists(SUMS, unique_by=lambda item: item.name))
def test_other_tensors_have_another_digest(one: list[TensorSum], other: list[TensorSum]) -> None:
    assert (stream_digest(one) == stream_digest(other)) == (set(one) == set(other))
