"""Weights from a trainer through the store into engine workers: real Ray, verl's own transfer, a small torch model."""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from tests.integration.conftest import Cluster
from tests.integration.weight_actors import WAIT_S, Server, Trainer, state
from verl_rlhfless.config import WeightsConfig
from verl_rlhfless.errors import WeightStoreError
from verl_rlhfless.live.checksum import verify
from verl_rlhfless.live.weight_store import create_store
from verl_rlhfless.live.weights import PullReport


@dataclass
class Run:
    """A run's store, trainer and replica."""

    name: str
    store: Any
    trainer: Any
    server: Any

    def publish(self, version: int, **kwargs: Any) -> Any:
        return ray.get(self.trainer.publish.remote(version, **kwargs), timeout=WAIT_S)

    def pull(self, version: int, timeout_s: float = WAIT_S) -> PullReport:
        report: PullReport = ray.get(self.server.pull.remote(version, self.name, timeout_s), timeout=2 * WAIT_S)
        return report

    def versions(self) -> tuple[int, ...]:
        held: tuple[int, ...] = ray.get(self.store.versions.remote(), timeout=WAIT_S)
        return held


@pytest.fixture(scope="module")
def actors(ray_cluster: Cluster) -> tuple[Any, Any]:
    return Trainer.remote(), Server.options(name="vllm_server_7_0").remote()


@pytest.fixture
def run(actors: tuple[Any, Any]) -> Run:
    name = f"weights-{uuid.uuid4().hex[:8]}"
    store = create_store(name, WeightsConfig(name="store", bucket_mib=1, max_versions=2))
    trainer, server = actors
    ray.get([trainer.join.remote(name), server.start.remote()], timeout=2 * WAIT_S)
    return Run(name, store, trainer, server)


def test_pulled_weights_are_the_published_ones(run: Run) -> None:
    published = run.publish(3)
    report = run.pull(3)
    assert (report.version, report.checksum, report.compared) == (3, published["checksum"], "loaded")
    assert report.num_bytes == published["num_bytes"] == sum(tensor.nbytes for tensor in state(3).values())
    weights, loaded = state(3), ray.get(run.server.parameters.remote())
    assert torch.equal(loaded["embed"], weights["embed"])
    assert torch.equal(loaded["qkv"], torch.cat([weights["q"], weights["k"], weights["v"]]))
    assert loaded["scalar"] == 3.0


def test_a_tensor_larger_than_any_bucket_arrives_whole(run: Run) -> None:
    ray.get(run.trainer.split_above.remote(500_000), timeout=WAIT_S)
    try:
        run.publish(2)
    finally:
        ray.get(run.trainer.split_above.remote(2**30), timeout=WAIT_S)
    manifest = ray.get(run.store.manifest.remote(2, WAIT_S), timeout=WAIT_S)
    assert max(len(tensor.parts) for tensor in manifest.tensors) == 4
    assert run.pull(2).compared == "loaded"
    assert torch.equal(ray.get(run.server.parameters.remote())["embed"], state(2)["embed"])


@pytest.mark.parametrize("is_stuck", [False, True], ids=["complete", "broken off"])
def test_a_pull_leaves_no_shared_memory_and_no_socket(run: Run, is_stuck: bool) -> None:
    run.publish(1)
    if is_stuck:
        ray.get(run.server.get_stuck.remote(), timeout=WAIT_S)
    used = ray.get(run.server.paths_of_a_pull.remote(1, run.name, 2.0 if is_stuck else WAIT_S), timeout=WAIT_S)
    assert len(used) == 2
    assert [path for path in used if Path(path).exists()] == []


def is_lost(reference: Any) -> bool:
    try:
        ray.get(reference, timeout=WAIT_S)
    except ray.exceptions.ObjectLostError:
        return True
    return False


def test_weights_outlive_the_trainer_that_published_them(run: Run, ray_cluster: Cluster) -> None:
    trainer = Trainer.remote()
    ray.get(trainer.join.remote(run.name), timeout=WAIT_S)
    ray.get(trainer.publish.remote(1), timeout=WAIT_S)
    (owned,) = ray.get(trainer.own_something.remote(), timeout=WAIT_S)
    ray.kill(trainer)
    ray_cluster.wait_until(lambda: is_lost(owned), "Ray to free what belonged to the trainer")
    assert run.pull(1).compared == "loaded"
    assert ray.get(run.server.parameters.remote())["scalar"] == 1.0


def test_a_replica_waits_for_a_version_that_is_still_being_published(run: Run) -> None:
    pulling = run.server.pull.remote(5, run.name, WAIT_S)
    run.publish(5)
    assert ray.get(pulling, timeout=WAIT_S).version == 5


def test_the_last_two_versions_are_held_and_an_older_one_is_refused(run: Run) -> None:
    for version in (1, 2, 3):
        run.publish(version)
    assert run.versions() == (2, 3)
    assert run.pull(2).checksum != run.pull(3).checksum
    with pytest.raises(WeightStoreError, match=r"vllm_server_7_0, weight version 1: .*held: \(2, 3\)"):
        run.pull(1)


def test_an_engine_with_the_previous_version_is_found_out(run: Run) -> None:
    run.publish(1)
    run.publish(2)
    old = run.pull(1)
    newest = ray.get(run.store.pin.remote(2, "test", WAIT_S), timeout=WAIT_S)
    with pytest.raises(
        WeightStoreError, match=f"checksum {old.checksum}, but version 2 was published with {newest.checksum}"
    ):
        verify(newest, ray.get(run.server.checksums.remote(), timeout=WAIT_S))


def test_an_engine_that_drops_a_tensor_is_found_out(run: Run) -> None:
    run.publish(1)
    ray.get(run.server.drop.remote("norm"), timeout=WAIT_S)
    with pytest.raises(WeightStoreError, match="weight version 1: worker 0 holds parameters with bit sum"):
        run.pull(1)


def test_an_engine_in_another_element_type_is_compared_after_the_conversion(run: Run) -> None:
    ray.get(run.server.start.remote(dtype=torch.bfloat16), timeout=WAIT_S)
    run.publish(1)
    assert run.pull(1).compared == "loaded"
    ray.get(run.server.drop.remote("v"), timeout=WAIT_S)
    run.publish(2)
    with pytest.raises(WeightStoreError, match="did not load all that it received"):
        run.pull(2)


def test_large_matrices_travel_in_the_engines_element_type(run: Run) -> None:
    ray.get(run.server.start.remote(dtype=torch.bfloat16), timeout=WAIT_S)
    ray.get(run.trainer.join.remote(run.name, rollout_dtype="bfloat16"), timeout=WAIT_S)
    embedding = torch.randn(600, 600)
    published = ray.get(run.trainer.publish_this.remote(1, {"embed": embedding, "norm": torch.ones(5)}), timeout=WAIT_S)
    assert published["num_bytes"] == 2 * embedding.numel() + 4 * 5
    received = ray.get(run.trainer.receive.remote(1), timeout=WAIT_S)
    assert torch.equal(received["embed"], embedding.to(torch.bfloat16))
    assert received["norm"].dtype == torch.float32


def test_every_worker_of_a_sharded_engine_gets_all_weights(run: Run) -> None:
    ray.get(run.server.start.remote(tp=2), timeout=WAIT_S)
    published = run.publish(1)
    assert run.pull(1).compared == "received (a shard of 2)"
    assert [reply.received for reply in ray.get(run.server.checksums.remote())] == [published["checksum"]] * 2


def test_a_version_that_broke_off_is_never_seen_and_can_be_published_again(run: Run) -> None:
    run.publish(1)
    with pytest.raises(RuntimeError, match="failed in the middle"):
        run.publish(2, fail_after=3)
    assert run.versions() == (1,)
    with pytest.raises(WeightStoreError, match=r"version 2 was not published within 0.2 s; held: \(1,\)"):
        run.pull(2, timeout_s=0.2)
    run.publish(2)
    assert run.pull(2).compared == "loaded"


def test_a_version_is_published_once(run: Run) -> None:
    run.publish(2)
    for version in (2, 1):
        with pytest.raises(WeightStoreError, match=f"version {version} is not newer than version 2"):
            run.publish(version)


def test_other_ranks_walk_the_weights_and_publish_nothing(run: Run) -> None:
    ray.get(run.trainer.join.remote(run.name, is_master=False), timeout=WAIT_S)
    assert run.publish(1) == {}
    with pytest.raises(RuntimeError, match="failed in the middle"):  # so it does walk
        run.publish(1, fail_after=6)
    assert run.versions() == ()


def test_an_engine_that_never_answers_ends_the_pull(run: Run) -> None:
    run.publish(1)
    ray.get(run.server.get_stuck.remote(), timeout=WAIT_S)
    with pytest.raises(WeightStoreError, match=r"vllm_server_7_0, weight version 1: .*in time"):
        run.pull(1, timeout_s=2.0)


def test_verls_own_worker_can_receive_too(run: Run) -> None:
    run.publish(4)
    received = ray.get(run.trainer.receive.remote(4), timeout=WAIT_S)
    assert received.keys() == state(4).keys()
    assert all(torch.equal(received[name], tensor) for name, tensor in state(4).items())


def test_a_missing_store_is_an_error_that_names_it(run: Run) -> None:
    with pytest.raises(WeightStoreError, match="no weight store named 'elsewhere'"):
        ray.get(run.server.pull.remote(1, "elsewhere", WAIT_S), timeout=WAIT_S)


def test_a_store_that_ends_is_an_error_not_a_wait(run: Run) -> None:
    run.publish(1)
    pulling = run.server.pull.remote(2, run.name, WAIT_S)
    ray.kill(run.store)
    with contextlib.suppress(ray.exceptions.RayActorError):
        ray.get(run.store.versions.remote(), timeout=WAIT_S)
    with pytest.raises(WeightStoreError, match=r"its process is gone|no weight store named"):
        ray.get(pulling, timeout=WAIT_S)
