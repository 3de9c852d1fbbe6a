"""What moves when verl's workers leave their device and come back, on a recorded device."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from verl_rlhfless.errors import UnsupportedError
from verl_rlhfless.live import residency
from verl_rlhfless.live.residency import RankMemory, VerlResidency, device_bytes, expand_segments


class Engine:
    """Records its moves; offloads by itself what verl was configured to offload."""

    module: Any = None

    def __init__(self, journal: list[Any], name: str = "actor", param: bool = False, optimizer: bool = False) -> None:
        self.name, self.journal = name, journal
        self.is_param_offload_enabled, self.is_optimizer_offload_enabled = param, optimizer

    def to(self, device: str, *, model: bool, optimizer: bool, grad: bool) -> None:
        assert model or not grad, "verl refuses gradients without their model"
        self.journal.append((self.name, device, model, optimizer, grad))


class Device:
    """Stands for ``torch.cuda``."""

    def __init__(self, journal: list[Any]) -> None:
        self.journal = journal

    def synchronize(self) -> None:
        self.journal.append("synchronize")

    def empty_cache(self) -> None:
        self.journal.append("empty_cache")

    def memory_reserved(self) -> int:
        return 7 if "empty_cache" in self.journal else 10**9

    def mem_get_info(self) -> tuple[int, int]:
        return (60 if "empty_cache" in self.journal else 10), 80

    def host_memory_stats(self) -> dict[str, int]:
        return {"allocated_bytes.current": 42}


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    events: list[Any] = []
    monkeypatch.setattr(residency, "_device", lambda: Device(events))
    monkeypatch.setattr(residency, "_device_name", lambda: "cuda")
    return events


def training_worker(engine: Engine) -> Any:
    return SimpleNamespace(engine=engine, fused_worker_dict={})


def test_everything_goes_to_the_host_and_the_copies_are_complete(journal: list[Any]) -> None:
    VerlResidency().offload(training_worker(Engine(journal)))
    assert journal == [("actor", "cpu", True, True, True), "synchronize"]


def test_everything_comes_back(journal: list[Any]) -> None:
    VerlResidency().onload(training_worker(Engine(journal)))
    assert journal == [("actor", "cuda", True, True, True), "synchronize"]


def test_what_verl_keeps_on_the_host_between_phases_stays_there(journal: list[Any]) -> None:
    VerlResidency().onload(training_worker(Engine(journal, optimizer=True)))
    VerlResidency().onload(training_worker(Engine(journal, param=True, optimizer=True)))
    fsdp2_policy = Engine(journal)
    fsdp2_policy._uses_fsdp2_cpu_offload_policy = True  # type: ignore[attr-defined]
    VerlResidency().onload(training_worker(fsdp2_policy))
    moves = [event for event in journal if event != "synchronize"]
    assert moves == [("actor", "cuda", True, False, True)] + 2 * [("actor", "cuda", False, False, False)]


def test_buffers_that_fsdp2_keeps_on_the_device_beside_offloaded_weights_stay_there(journal: list[Any]) -> None:
    fsdp2_policy = Engine(journal)
    fsdp2_policy._uses_fsdp2_cpu_offload_policy = True  # type: ignore[attr-defined]
    VerlResidency().offload(training_worker(fsdp2_policy))
    assert journal == [("actor", "cpu", False, False, False), "synchronize"]


@pytest.mark.parametrize("attribute", ["worker_dict", "fused_worker_dict"])
def test_every_role_of_a_process_moves(journal: list[Any], attribute: str) -> None:
    actor_ref = SimpleNamespace(
        actor=training_worker(Engine(journal, "actor")), ref=training_worker(Engine(journal, "ref")), rollout=object()
    )
    critic = training_worker(Engine(journal, "critic"))
    worker = SimpleNamespace(**{"fused_worker_dict": {}, attribute: {"actor_rollout_ref": actor_ref, "critic": critic}})
    VerlResidency().offload(worker)
    assert [event[0] for event in journal[:-1]] == ["actor", "ref", "critic"]


def test_a_pure_reference_worker_without_an_actor_moves_its_reference(journal: list[Any]) -> None:
    worker = SimpleNamespace(fused_worker_dict={}, actor=None, ref=training_worker(Engine(journal, "ref")))
    VerlResidency().offload(worker)
    assert journal[0][0] == "ref"


def test_a_worker_without_an_engine_is_refused_by_name(journal: list[Any]) -> None:
    with pytest.raises(UnsupportedError, match="no training engine in worker SimpleNamespace"):
        VerlResidency().offload(SimpleNamespace(fused_worker_dict={}, actor=None, ref=None))
    assert journal == []


def test_memory_is_read_after_the_cache_was_given_back(journal: list[Any]) -> None:
    assert VerlResidency().memory(object()) == RankMemory(device_reserved_bytes=7, pinned_host_bytes=42)
    assert journal.index("empty_cache") < journal.index("synchronize")


def test_a_devices_memory_is_read_without_touching_it(journal: list[Any]) -> None:
    assert device_bytes(object()) == 80 and journal == []


def test_a_device_that_is_the_host_has_no_memory_of_its_own(
    journal: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "_device_name", lambda: "cpu")
    assert device_bytes(object()) == 0
    VerlResidency().offload(training_worker(Engine(journal)))
    assert VerlResidency().memory(object()) == RankMemory(device_reserved_bytes=0, pinned_host_bytes=0)
    assert "synchronize" not in journal


@pytest.mark.parametrize(("strategy", "device", "can_stay"), [
    ("fsdp2", "cuda", True), ("fsdp", "cuda", False), ("fsdp", "cpu", True), ("megatron", "cuda", False),
])  # fmt: skip
def test_verl_saves_a_suspended_model_from_the_host_where_that_is_possible(
    journal: list[Any], monkeypatch: pytest.MonkeyPatch, strategy: str, device: str, can_stay: bool
) -> None:
    monkeypatch.setattr(residency, "_device_name", lambda: device)
    engine: Any = Engine(journal)
    engine.engine_config = SimpleNamespace(strategy=strategy, forward_only=False)
    if can_stay:
        VerlResidency().stay(training_worker(engine))
        assert engine._uses_fsdp2_cpu_offload_policy, "else verl's save_checkpoint moves the model to the device"
    else:
        with pytest.raises(UnsupportedError, match=f"suspended {strategy} model can't be saved without its device"):
            VerlResidency().stay(training_worker(engine))


def test_a_reference_is_not_saved_whatever_its_strategy(journal: list[Any]) -> None:
    actor: Any = SimpleNamespace(engine_config=SimpleNamespace(strategy="fsdp2", forward_only=False))
    ref = SimpleNamespace(engine_config=SimpleNamespace(strategy="fsdp", forward_only=True))
    worker = SimpleNamespace(actor=SimpleNamespace(engine=actor), ref=SimpleNamespace(engine=ref))
    VerlResidency().stay(worker)
    assert actor._uses_fsdp2_cpu_offload_policy and not hasattr(ref, "_uses_fsdp2_cpu_offload_policy")


def test_memory_is_free_that_a_replica_could_have_once_the_cache_was_given_back(
    journal: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert VerlResidency().free_share(object()) == 0.75
    monkeypatch.setattr(residency, "_device_name", lambda: "cpu")
    assert VerlResidency().free_share(object()) == 1.0, "an engine's memory on the host is no share of a device"


def test_a_ranks_allocator_grows_its_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    platform = SimpleNamespace(set_allocator_settings=chosen.append)
    monkeypatch.setattr("verl.utils.device.get_platform", lambda: platform)
    expand_segments(object())
    assert chosen == ["expandable_segments:True"]


def _leave_after_a_forward_pass(url: str, rank: int, strategy: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    torch.distributed.init_process_group("gloo", init_method=url, rank=rank, world_size=2)
    torch.manual_seed(0)
    kinds: Any = {"sharding_strategy": ShardingStrategy[strategy], "device_id": torch.device("cpu")}
    inner = FullyShardedDataParallel(torch.nn.Linear(8, 8), **kinds)
    model = FullyShardedDataParallel(torch.nn.Sequential(torch.nn.Linear(8, 8), inner), **kinds).eval()
    engine = Engine([])
    engine.module = model
    residency._device_name = lambda: "cpu"

    def gathered_bytes() -> int:
        handles = [module._handle for module in FullyShardedDataParallel.fsdp_modules(model)]
        sharded = [handle.flat_param for handle in handles if handle is not None and handle.uses_sharded_strategy]
        return sum(int(weights._full_param_padded.untyped_storage().nbytes()) for weights in sharded)

    VerlResidency().offload(training_worker(engine))  # before it ever ran
    with torch.no_grad():
        output = model(torch.ones(2, 8))
        assert (gathered_bytes() > 0) == (strategy != "NO_SHARD")
        for _ in range(2):
            VerlResidency().offload(training_worker(engine))
            assert gathered_bytes() == 0
        assert torch.equal(model(torch.ones(2, 8)), output)


def _leave_fsdp2_after_a_forward_pass(url: str, rank: int, reshards: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.distributed.init_process_group("gloo", init_method=url, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)).eval()
    for part in (*model, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=reshards)
    engine = Engine([])  # as one that only infers it is not moved, which would reshard it
    engine.module = model
    residency._device_name = lambda: "cpu"
    with torch.no_grad():
        output = model(torch.ones(2, 8))
        assert all(isinstance(weights, DTensor) for weights in model.parameters()) == reshards
        VerlResidency().offload(training_worker(engine))
        assert all(isinstance(weights, DTensor) for weights in model.parameters())
        assert torch.equal(model(torch.ones(2, 8)), output)


def on_two_ranks(target: Any, tmp_path: Path, setting: Any) -> None:
    context, url = multiprocessing.get_context("fork"), f"file://{tmp_path}/meeting"
    ranks = [context.Process(target=target, args=(url, rank, setting)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"])
def test_no_gathered_weights_stay_behind_when_fsdp1_inferred_last(tmp_path: Path, strategy: str) -> None:
    on_two_ranks(_leave_after_a_forward_pass, tmp_path, strategy)


@pytest.mark.parametrize("reshards", [True, False])
def test_no_gathered_weights_stay_behind_when_fsdp2_inferred_last(tmp_path: Path, reshards: bool) -> None:
    on_two_ranks(_leave_fsdp2_after_a_forward_pass, tmp_path, reshards)
