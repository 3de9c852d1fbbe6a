from __future__ import annotations

import pytest

from verl_rlhfless.errors import WeightStoreError
from verl_rlhfless.live.weight_capacity import HostMemory, check_capacity, required_bytes

GIB = 2**30


def test_every_version_and_what_is_on_its_way_need_room() -> None:
    assert required_bytes(model_bytes=7 * GIB, max_versions=2, bucket_bytes=GIB) == 17 * GIB


def test_a_model_that_just_fits_is_accepted() -> None:
    check_capacity(4 * GIB, 2, 0, HostMemory("node", object_store_bytes=10 * GIB, available_bytes=8 * GIB))


def test_an_object_store_that_would_spill_is_refused_with_the_shortage() -> None:
    with pytest.raises(WeightStoreError) as error:
        check_capacity(2 * GIB, 2, 2 * GIB, HostMemory("node", object_store_bytes=10 * GIB, available_bytes=100 * GIB))
    message = str(error.value)
    assert "needs 10.00 GiB" in message
    assert "keeps 8.00 GiB in memory (80 % of 10.00 GiB): 2.00 GiB short" in message
    assert f"at least {int(12.5 * GIB) + 1} bytes (--object-store-memory)" in message


def test_following_the_advice_is_enough() -> None:
    with pytest.raises(WeightStoreError) as error:
        check_capacity(4 * GIB + 123, 2, GIB, HostMemory("node", object_store_bytes=GIB, available_bytes=100 * GIB))
    advised = int(str(error.value).split("at least ")[1].split(" bytes")[0])
    check_capacity(4 * GIB + 123, 2, GIB, HostMemory("node", object_store_bytes=advised, available_bytes=100 * GIB))


def test_a_full_host_is_refused_with_the_shortage() -> None:
    with pytest.raises(WeightStoreError, match=r"only 6.00 GiB is free: 3.00 GiB short.*max_versions"):
        check_capacity(3 * GIB, 2, GIB, HostMemory("node", object_store_bytes=100 * GIB, available_bytes=6 * GIB))
