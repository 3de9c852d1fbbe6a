"""verl worker groups on leases: ranks with a real process group, suspended while another Ray job uses their GPUs."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
import torch
import torch.distributed
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.ray.base import (
    RayClassWithInitArgs,
    RayResourcePool,
    create_colocated_worker_cls,
    create_colocated_worker_cls_fused,
    merge_resource_pool,
    split_resource_pool,
)

from tests.integration.conftest import Cluster, ForeignJob
from verl_rlhfless.config import SUSPEND_RESIDUAL_BYTES
from verl_rlhfless.errors import DeviceMismatchError, LeaseTimeoutError, RlhflessError, SuspendError, UnsupportedError
from verl_rlhfless.live.lease import Lease, LeaseRequest
from verl_rlhfless.live.pool import ElasticResourcePool, ElasticResourcePoolManager
from verl_rlhfless.live.residency import RankMemory
from verl_rlhfless.live.worker_group import ElasticWorkerGroup

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers can't import a test module
WAIT_S = 120.0


class Trainer(Worker):
    """A rank with a process group, a state that must survive, and a place where the state is."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.state = torch.full((4,), start + self.rank)
        self.place = "device"
        self.log: list[str] = []

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def train(self) -> float:
        """Add the mean over ranks, as an update that only a living process group can make."""
        assert self.place == "device", "trained while suspended"
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", rank=self.rank, world_size=self.world_size)
        total = self.state.clone()
        torch.distributed.all_reduce(total)
        self.state += total / self.world_size
        return float(self.state[0])

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def snapshot(self) -> dict[str, Any]:
        context = ray.get_runtime_context()
        return {
            "pid": os.getpid(),
            "state": self.state.tolist(),
            "place": self.place,
            "visible": os.environ["CUDA_VISIBLE_DEVICES"],
            "accelerator_ids": context.get_accelerator_ids()["GPU"],
            "gpu_ids": ray.get_gpu_ids(),
            "reserved_by_ray": context.get_assigned_resources(),
            "group": context.get_placement_group_id(),
            "noset": os.environ.get("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"),
        }


class Critic(Trainer):
    """A second role in the same processes."""


@dataclasses.dataclass(frozen=True)
class Tracked:
    """Residency of the workers above: it notes the place, and may leave memory behind or hang."""

    residue_bytes: int = 0
    hang_s: float = 0.0

    def offload(self, worker: Any) -> None:
        import time

        time.sleep(self.hang_s)
        for role in roles(worker):
            role.place = "host"

    def memory(self, worker: Any) -> RankMemory:
        return RankMemory(device_reserved_bytes=self.residue_bytes, pinned_host_bytes=0)

    def onload(self, worker: Any) -> None:
        for role in roles(worker):
            role.place = "device"


def roles(worker: Any) -> list[Any]:
    shared = getattr(worker, "worker_dict", None) or worker.fused_worker_dict
    return list(shared.values()) if shared else [worker]


def build(pool: RayResourcePool, cls: RayClassWithInitArgs | None = None, **kwargs: Any) -> ElasticWorkerGroup:
    trainer = cls or RayClassWithInitArgs(ray.remote(Trainer), start=1.0)
    group = ElasticWorkerGroup(resource_pool=pool, ray_cls_with_init=trainer, device_name="cpu", **kwargs)
    group.residency = Tracked()
    return group


def roles_of_one_process() -> dict[str, RayClassWithInitArgs]:
    return {
        "actor": RayClassWithInitArgs(ray.remote(Trainer), start=1.0),
        "critic": RayClassWithInitArgs(ray.remote(Critic), start=5.0),
    }


@pytest.fixture(scope="module")
def group(ray_cluster: Cluster) -> Iterator[ElasticWorkerGroup]:
    """Two ranks on a leased pool, resumed again after each test that suspends them."""
    noset = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}  # some clusters set it; a rank with it would break
    wg = build(ElasticResourcePool([2], name_prefix="plain"), worker_env=noset)
    wg.train()
    yield wg
    wg.shutdown()
    wg.shutdown()


@pytest.fixture
def resumed(group: ElasticWorkerGroup) -> Iterator[ElasticWorkerGroup]:
    """The group with its lease, before and after a test."""
    assert group.resource_pool.lease is not None
    yield group
    group.residency = Tracked()
    if group.resource_pool.lease is None:
        group.resume(WAIT_S, WAIT_S)


def bound_devices(group: ElasticWorkerGroup) -> set[str]:
    return {report["visible"] for report in group.snapshot()}


def test_ranks_own_the_leased_devices_outside_the_placement_group(
    ray_cluster: Cluster, resumed: ElasticWorkerGroup
) -> None:
    lease = resumed.resource_pool.lease
    reports = resumed.snapshot()
    assert [report["visible"] for report in reports] == list(lease.nodes[0].device_ids)
    for report in reports:
        assert report["accelerator_ids"] == report["gpu_ids"] == [report["visible"]]
        assert report["group"] is None
        assert report["reserved_by_ray"] == {}
        assert not report["noset"]
    assert ray_cluster.live_groups() == {lease.name: "CREATED"}
    assert lease.name.startswith("rlhfless/trainer/plain-")


def test_suspend_moves_every_rank_off_and_frees_the_gpus(ray_cluster: Cluster, resumed: ElasticWorkerGroup) -> None:
    result = resumed.suspend(WAIT_S)
    assert result.lease.released_s is not None and resumed.resource_pool.lease is None
    assert len(result.ranks) == 2
    assert [report["place"] for report in resumed.snapshot()] == ["host", "host"]
    assert ray_cluster.live_groups() == {}
    ray_cluster.wait_until(lambda: ray_cluster.free_gpus() == 4, "the trainer's GPUs to be free")
    with pytest.raises(RlhflessError, match="suspended already"):
        resumed.suspend(WAIT_S)


def test_another_job_uses_the_gpus_and_training_goes_on_unchanged(
    ray_cluster: Cluster, resumed: ElasticWorkerGroup, foreign_job: Callable[[int], ForeignJob]
) -> None:
    before = resumed.snapshot()
    devices = bound_devices(resumed)
    resumed.suspend(WAIT_S)
    job = foreign_job(2)
    assert job.devices == devices, "the other job must really run on the trainer's devices"
    assert job.job_id != ray.get_runtime_context().get_job_id()
    assert job.process.pid != os.getpid()

    outcome: list[Any] = []
    resuming = threading.Thread(target=lambda: outcome.append(resumed.resume(WAIT_S, WAIT_S)))
    resuming.start()
    ray_cluster.wait_until(lambda: "CREATED" in ray_cluster.live_groups().values(), "a grant of the wrong devices")
    job.leave()
    resuming.join(WAIT_S)

    (result,) = outcome
    assert result.wrong_leases and all(lease.released_s is not None for lease in result.wrong_leases)
    assert {device for node in result.lease.nodes for device in node.device_ids} == devices
    assert job.process.wait(WAIT_S) == 0, "the other job must not lose its GPUs before it leaves"
    assert resumed.snapshot() == before
    assert resumed.train() == pytest.approx([report["state"][0] + mean(before) for report in before])


def test_resume_waits_for_busy_gpus_and_may_be_tried_again(
    ray_cluster: Cluster, resumed: ElasticWorkerGroup, foreign_job: Callable[[int], ForeignJob]
) -> None:
    before = resumed.snapshot()
    resumed.suspend(WAIT_S)
    job = foreign_job(4)
    with pytest.raises(LeaseTimeoutError, match="0 of 4 GPU are available"):
        resumed.resume(timeout_s=1, same_device_wait_s=WAIT_S)
    assert ray_cluster.live_groups() == {}
    job.leave()
    assert resumed.resume(WAIT_S, WAIT_S).wrong_leases == ()
    assert resumed.snapshot() == before


def test_other_devices_are_refused_by_name_and_given_back(ray_cluster: Cluster, resumed: ElasticWorkerGroup) -> None:
    resumed.suspend(WAIT_S)
    with Lease.acquire(LeaseRequest("squatter", "replica", (1,)), 30) as squatter:
        (taken,) = squatter.nodes[0].device_ids
        assert taken in bound_devices(resumed)
        with pytest.raises(DeviceMismatchError) as refused:
            resumed.resume(WAIT_S, same_device_wait_s=0)
        assert list(ray_cluster.live_groups()) == [squatter.name]
    assert f"is bound to node {squatter.nodes[0].node_id[:8]} devices {sorted(bound_devices(resumed))}" in str(
        refused.value
    )
    assert "Ray granted" in str(refused.value)
    assert [report["place"] for report in resumed.snapshot()] == ["host", "host"]


def test_memory_that_stays_on_a_device_keeps_the_lease(ray_cluster: Cluster, resumed: ElasticWorkerGroup) -> None:
    resumed.residency = Tracked(residue_bytes=SUSPEND_RESIDUAL_BYTES + 1)
    with pytest.raises(SuspendError, match=r"device bytes still reserved by rank \{0: 536870913, 1: 536870913\}"):
        resumed.suspend(WAIT_S)
    assert resumed.resource_pool.lease is not None
    assert [report["place"] for report in resumed.snapshot()] == ["device", "device"]
    assert resumed.train()


def test_a_rank_that_does_not_answer_is_named_and_keeps_the_lease(resumed: ElasticWorkerGroup) -> None:
    resumed.residency = Tracked(hang_s=3.0)
    with pytest.raises(SuspendError, match=r"ranks \[0, 1\] did not offload within 0.5 s"):
        resumed.suspend(0.5)
    assert resumed.resource_pool.lease is not None
    resumed.residency = Tracked()
    resumed.suspend(WAIT_S)


def test_a_second_group_on_the_pool_is_refused(resumed: ElasticWorkerGroup) -> None:
    with pytest.raises(UnsupportedError, match=f"already runs worker group {resumed.name_prefix}"):
        build(resumed.resource_pool)
    assert resumed.resource_pool.lease is not None, "the refusal must not take the first group's lease"


def test_pools_that_need_placement_groups_are_refused_by_name(ray_cluster: Cluster) -> None:
    pool = ElasticResourcePool([2], name_prefix="whole")
    other = ElasticResourcePool([2], name_prefix="other")
    with pytest.raises(UnsupportedError, match="elastic pool whole has no placement groups: it can't be split, merged"):
        split_resource_pool(pool, 1)
    with pytest.raises(UnsupportedError, match="elastic pool whole has no placement groups"):
        merge_resource_pool(pool, other)
    for wrong, named in (
        ({"detached": True}, "detached=True"),
        ({"accelerator_type": "H100"}, "accelerator_type=H100"),
    ):
        with pytest.raises(UnsupportedError, match=named):
            ElasticResourcePool([2], **wrong)
    with pytest.raises(UnsupportedError, match="unequal nodes"):
        ElasticResourcePool([2, 1])
    assert ray_cluster.live_groups().keys() <= {group for group in ray_cluster.live_groups() if "plain-" in group}


@pytest.mark.parametrize("colocate", [create_colocated_worker_cls, create_colocated_worker_cls_fused])
def test_colocated_roles_suspend_together_whichever_is_asked(
    ray_cluster: Cluster, resumed: ElasticWorkerGroup, colocate: Callable[..., RayClassWithInitArgs]
) -> None:
    root = build(ElasticResourcePool([2], name_prefix="shared"), colocate(roles_of_one_process()))
    try:
        spawned = root.spawn({"actor", "critic"})
        before = {role: spawned[role].snapshot() for role in spawned}
        assert [a["pid"] for a in before["actor"]] == [c["pid"] for c in before["critic"]]
        assert [c["state"][0] for c in before["critic"]] == [5.0, 6.0]
        spawned["critic"].suspend(WAIT_S)
        assert {report["place"] for role in spawned.values() for report in role.snapshot()} == {"host"}
        assert root.resource_pool.lease is None
        assert all(getattr(role, "resource_pool", root.resource_pool).lease is None for role in spawned.values())
        ray_cluster.wait_until(lambda: ray_cluster.free_gpus() == 2, "the shared pool's GPUs to be free")
        spawned["actor"].resume(WAIT_S, WAIT_S)
        assert {role: spawned[role].snapshot() for role in spawned} == before
        assert spawned["actor"].train() == [2.5, 3.5]
    finally:
        root.shutdown()


def test_a_pool_that_is_not_elastic_is_verls_own(ray_cluster: Cluster, resumed: ElasticWorkerGroup) -> None:
    pool = RayResourcePool([1], name_prefix="stock", max_colocate_count=1)
    stock = build(pool)
    try:
        (report,) = stock.snapshot()
        assert report["group"] == pool.pgs[0].id.hex()
        assert report["reserved_by_ray"]["GPU"] == 1
        with pytest.raises(UnsupportedError, match="its resource pool is not elastic"):
            stock.suspend(WAIT_S)
    finally:
        ray.util.remove_placement_group(pool.pgs[0])
        ray_cluster.wait_until(lambda: len(ray_cluster.live_groups()) == 1, "the stock group's end")


def test_a_group_that_gets_no_gpus_leaves_nothing_behind(ray_cluster: Cluster, resumed: ElasticWorkerGroup) -> None:
    before = ray_cluster.live_groups()
    pool = ElasticResourcePool([4], name_prefix="starved", grant_timeout_s=1)
    with pytest.raises(LeaseTimeoutError, match="rlhfless/trainer/starved"):
        build(pool)
    assert ray_cluster.live_groups() == before
    assert pool.tenant is None, "the pool may be used again"


def test_the_manager_makes_only_the_trainers_pool_elastic_and_waits_for_busy_gpus(
    ray_cluster: Cluster, resumed: ElasticWorkerGroup
) -> None:
    spec = {"global_pool": [4], "reward_pool": [1]}
    manager = ElasticResourcePoolManager(resource_pool_spec=spec, mapping={}, grant_timeout_s=1)
    manager.create_resource_pool()  # verl's own manager raises here: 2 of the 5 GPUs are busy
    assert type(manager.resource_pool_dict["reward_pool"]) is RayResourcePool
    trainer_pool = manager.resource_pool_dict["global_pool"]
    assert trainer_pool.store == [4] and trainer_pool.lease is None
    with pytest.raises(LeaseTimeoutError):
        trainer_pool.acquire(trainer_pool.grant_timeout_s)
    with pytest.raises(ValueError, match="Total available GPUs"):
        ElasticResourcePoolManager(
            resource_pool_spec={"global_pool": [1], "reward_pool": [9]}, mapping={}
        ).create_resource_pool()
    with pytest.raises(UnsupportedError, match="global_pool"):
        ElasticResourcePoolManager(resource_pool_spec={"actor_pool": [1]}, mapping={}).create_resource_pool()


def test_ranks_end_and_the_lease_with_them(ray_cluster: Cluster, group: ElasticWorkerGroup) -> None:
    pids = [report["pid"] for report in group.snapshot()]
    group.shutdown()
    ray_cluster.wait_until(
        lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), "the ranks' processes to end"
    )
    assert ray_cluster.live_groups() == {}
    ray_cluster.wait_until(lambda: ray_cluster.free_gpus() == 4, "all GPUs to be free")


def mean(reports: list[dict[str, Any]]) -> float:
    return sum(report["state"][0] for report in reports) / len(reports)
