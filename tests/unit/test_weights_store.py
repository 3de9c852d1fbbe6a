"""The rules of the store, without Ray: buckets are opaque to it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from verl_rlhfless.config import WeightsConfig
from verl_rlhfless.errors import WeightStoreError
from verl_rlhfless.live.weight_manifest import Part, StoredTensor
from verl_rlhfless.live.weight_store import WeightStore
from verl_rlhfless.policy.host_memory import HostMemory

MIB = 2**20
PLENTY = HostMemory("node", object_store_bytes=100 * MIB, available_bytes=100 * MIB)


def tensor(bucket: int) -> StoredTensor:
    return StoredTensor(f"w{bucket}", "float32", (1,), 0, (Part(bucket, 0, 4),))


async def publish(store: WeightStore, version: int, memory: HostMemory = PLENTY) -> None:
    await store.begin(version, memory)
    store.add(store.reserve(version, MIB), 0, f"bucket of {version}")
    await store.commit(version, (tensor(0),), f"checksum of {version}")


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 20))


def new_store(max_versions: int = 2) -> WeightStore:
    return WeightStore(WeightsConfig(name="store", bucket_mib=1, max_versions=max_versions))


async def blocked(task: asyncio.Task[Any]) -> bool:
    """Return whether a task still waits after it had every chance to run."""
    for _ in range(10):
        await asyncio.sleep(0)
    return not task.done()


def test_a_published_version_is_what_a_reader_gets() -> None:
    async def scenario() -> None:
        store = new_store()
        await publish(store, 0)
        manifest = await store.manifest(0, timeout_s=0)
        assert (manifest.version, manifest.checksum, manifest.buckets) == (0, "checksum of 0", ("bucket of 0",))

    run(scenario())


def test_a_version_is_invisible_until_it_is_committed() -> None:
    async def scenario() -> None:
        store = new_store()
        await store.begin(1, PLENTY)
        store.add(store.reserve(1, MIB), 0, "bucket")
        reader = asyncio.create_task(store.manifest(1, timeout_s=10))
        assert await blocked(reader)
        assert store.versions() == ()
        await store.commit(1, (tensor(0),), "sum")
        assert (await reader).version == 1

    run(scenario())


@pytest.mark.parametrize("again", [5, 4])
def test_versions_strictly_increase(again: int) -> None:
    async def scenario() -> None:
        store = new_store()
        await publish(store, 5)
        with pytest.raises(WeightStoreError, match=f"version {again} is not newer than version 5"):
            await store.begin(again, PLENTY)

    run(scenario())


@pytest.mark.parametrize(("max_versions", "held"), [(1, (3,)), (2, (2, 3))])
def test_the_oldest_version_makes_room(max_versions: int, held: tuple[int, ...]) -> None:
    async def scenario() -> None:
        store = new_store(max_versions)
        for version in (1, 2, 3):
            await publish(store, version)
        assert store.versions() == held
        with pytest.raises(WeightStoreError) as error:
            await store.manifest(1, timeout_s=10)
        assert f"version 1 was evicted or never published; held: {held}" in str(error.value)

    run(scenario())


def test_room_is_made_before_the_new_version_arrives() -> None:
    async def scenario() -> None:
        store = new_store()
        await publish(store, 1)
        await publish(store, 2)
        await store.begin(3, PLENTY)
        assert store.versions() == (2,)

    run(scenario())


def test_a_version_that_never_comes_is_an_error_that_names_those_held() -> None:
    async def scenario() -> None:
        store = new_store()
        await publish(store, 1)
        with pytest.raises(WeightStoreError, match=r"version 9 was not published within 0 s; held: \(1,\)"):
            await store.manifest(9, timeout_s=0)

    run(scenario())


def test_a_pinned_version_is_evicted_only_when_its_last_reader_lets_go() -> None:
    async def scenario() -> None:
        store = new_store(max_versions=1)
        await publish(store, 1)
        for reader in ("r0", "r1"):
            await store.pin(1, reader, timeout_s=10)
        publishing = asyncio.create_task(publish(store, 2))
        assert await blocked(publishing)
        await store.unpin(1, "r0")
        assert await blocked(publishing)
        assert store.versions() == (1,)
        await store.unpin(1, "r1")
        await publishing
        assert store.versions() == (2,)

    run(scenario())


def test_a_reader_that_died_holds_a_version_no_longer_than_a_pull_may_take() -> None:
    async def scenario() -> None:
        store = new_store(max_versions=1)
        await publish(store, 1)
        await store.pin(1, "dead", timeout_s=0.01)
        await publish(store, 2)
        assert store.versions() == (2,)

    run(scenario())


def test_letting_go_twice_or_of_something_unknown_is_fine() -> None:
    async def scenario() -> None:
        store = new_store()
        await publish(store, 1)
        await store.pin(1, "r0", timeout_s=10)
        for _ in range(2):
            await store.unpin(1, "r0")
        await store.unpin(7, "nobody")
        assert store.versions() == (1,)

    run(scenario())


def test_a_publisher_that_comes_back_starts_its_version_anew() -> None:
    async def scenario() -> None:
        store = new_store()
        await store.begin(1, PLENTY)
        late = store.reserve(1, MIB)
        await store.begin(1, PLENTY)
        with pytest.raises(WeightStoreError, match="given up"):
            store.add(late, 0, "half of a version")
        await publish(store, 1)
        assert (await store.manifest(1, timeout_s=0)).buckets == ("bucket of 1",)

    run(scenario())


def test_a_version_with_a_missing_bucket_is_not_committed() -> None:
    async def scenario() -> None:
        store = new_store()
        await store.begin(1, PLENTY)
        store.add(store.reserve(1, MIB), 0, "only bucket")
        with pytest.raises(WeightStoreError, match="1 buckets, but its tensors use 2"):
            await store.commit(1, (tensor(0), tensor(1)), "sum")
        assert store.versions() == ()

    run(scenario())


def test_buckets_may_arrive_in_any_order() -> None:
    async def scenario() -> None:
        store = new_store()
        await store.begin(1, PLENTY)
        store.add(store.reserve(1, MIB), 1, "second")
        store.add(store.reserve(1, MIB), 0, "first")
        await store.commit(1, (tensor(0), tensor(1)), "sum")
        assert (await store.manifest(1, timeout_s=0)).buckets == ("first", "second")

    run(scenario())


def test_buckets_of_a_version_that_was_not_begun_are_refused() -> None:
    async def scenario() -> None:
        store = new_store()
        await store.begin(2, PLENTY)
        with pytest.raises(WeightStoreError, match="version 1 is not being published"):
            store.reserve(1, MIB)

    run(scenario())


def test_a_model_that_does_not_fit_is_refused_while_its_first_version_arrives() -> None:
    async def scenario() -> None:
        store = new_store()
        memory = HostMemory("node", object_store_bytes=20 * MIB, available_bytes=100 * MIB)  # 16 MiB before Ray spills
        await store.begin(1, memory)
        store.reserve(1, 3 * MIB)  # 2 versions of 3 MiB and 3 buckets of 3 MiB: 15 MiB
        with pytest.raises(WeightStoreError, match="short"):
            store.reserve(1, MIB)

    run(scenario())


def test_later_versions_use_the_room_that_was_admitted() -> None:
    async def scenario() -> None:
        store = new_store()
        await publish(store, 1)
        await publish(
            store, 2, HostMemory("node", object_store_bytes=0, available_bytes=0)
        )  # the first one uses it now
        assert store.versions() == (1, 2)

    run(scenario())
