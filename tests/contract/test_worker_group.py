"""Workers do the same on verl's resource pool and on a leased one: dispatch, padding, futures, fused roles, ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
import torch
from tensordict import TensorDict
from verl import DataProto
from verl.protocol import DataProtoConfig, DataProtoFuture
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, Execute, make_nd_compute_dataproto_dispatch_fn, register
from verl.single_controller.ray.base import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    create_colocated_worker_cls_fused,
)

from tests.integration.conftest import Cluster
from verl_rlhfless.live.pool import ElasticResourcePool
from verl_rlhfless.live.worker_group import ElasticWorkerGroup

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers can't import a test module
RANKS = 2


class Actor(Worker):
    """What verl's tests of its single controller ask of a worker."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.start = start
        self._register_dispatch_collect_info(mesh_name="train", dp_rank=self.rank, is_collect=True)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def ranks(self) -> tuple[int, int]:
        return self.rank, self.world_size

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, execute_mode=Execute.RANK_ZERO)
    def only_first(self) -> int:
        return self.rank

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def add(self, data: DataProto) -> DataProto:
        data.batch["out"] = data.batch["in"] + self.start + self.rank
        return data

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False)
    async def add_later(self, data: DataProto) -> DataProto:
        data.batch["out"] = data.batch["in"] * 2 + self.start + self.rank
        return data

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"))
    def add_on_mesh(self, data: DataProto) -> DataProto:
        return self.add(data)


class Critic(Worker):
    """A second role in the same processes."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def judged(self) -> float:
        return self.value + self.rank


def verls(cls: RayClassWithInitArgs) -> RayWorkerGroup:
    pool = RayResourcePool([RANKS], use_gpu=True, max_colocate_count=1)
    return RayWorkerGroup(resource_pool=pool, ray_cls_with_init=cls, device_name="cpu")


def ours(cls: RayClassWithInitArgs) -> RayWorkerGroup:
    pool = ElasticResourcePool([RANKS])
    return ElasticWorkerGroup(resource_pool=pool, ray_cls_with_init=cls, device_name="cpu")


def end(group: Any) -> None:
    """Give the GPUs back: verl has no call for it."""
    if isinstance(group, ElasticWorkerGroup):
        group.shutdown()
        return
    for worker in group._workers:
        ray.kill(worker)
    for placement_group in group.resource_pool.pgs:
        ray.util.remove_placement_group(placement_group)


@pytest.fixture(scope="module", params=[verls, ours], ids=["verl", "ours"])
def build(request: pytest.FixtureRequest, ray_cluster: Cluster) -> Callable[[RayClassWithInitArgs], RayWorkerGroup]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def group(build: Callable[[RayClassWithInitArgs], RayWorkerGroup], ray_cluster: Cluster) -> Iterator[RayWorkerGroup]:
    group = build(RayClassWithInitArgs(ray.remote(Actor), start=10.0))
    yield group
    end(group)
    ray_cluster.wait_until(lambda: ray_cluster.live_groups() == {}, "the group's end")


def batch(count: int) -> DataProto:
    return DataProto(batch=TensorDict({"in": torch.arange(float(count))}, batch_size=[count]))


def test_ranks_know_each_other_and_answers_come_in_their_order(group: RayWorkerGroup) -> None:
    assert group.world_size == RANKS
    assert group.ranks() == [(0, 2), (1, 2)]
    assert group.only_first() == 0


@pytest.mark.parametrize("method", ["add", "add_on_mesh"])
def test_a_batch_is_split_over_the_ranks_and_put_together_again(group: RayWorkerGroup, method: str) -> None:
    output = getattr(group, method)(batch(4))
    assert output.batch["out"].tolist() == [10.0, 11.0, 13.0, 14.0]


def test_an_async_method_gives_a_future(group: RayWorkerGroup) -> None:
    future = group.add_later(batch(4))
    assert isinstance(future, DataProtoFuture)
    assert future.get().batch["out"].tolist() == [10.0, 12.0, 15.0, 17.0]


def test_an_uneven_batch_is_padded_when_it_says_so_and_refused_when_not(group: RayWorkerGroup) -> None:
    with pytest.raises(AssertionError):
        group.add(batch(3))
    uneven = batch(3)
    uneven.meta_info[DataProtoConfig.auto_padding_key] = True
    assert group.add(uneven).batch["out"].tolist() == [10.0, 11.0, 13.0]


def test_fused_roles_share_their_processes(
    build: Callable[[RayClassWithInitArgs], RayWorkerGroup], group: RayWorkerGroup
) -> None:
    roles = {
        "actor": RayClassWithInitArgs(ray.remote(Actor), start=1.0),
        "critic": RayClassWithInitArgs(ray.remote(Critic), value=5.0),
    }
    fused = build(create_colocated_worker_cls_fused(roles))
    try:
        spawned = fused.spawn(roles.keys())
        assert spawned["actor"].ranks() == [(0, 2), (1, 2)]
        assert spawned["critic"].judged() == [5.0, 6.0]
        assert spawned["actor"].add(batch(2)).batch["out"].tolist() == [1.0, 3.0]
    finally:
        end(fused)
