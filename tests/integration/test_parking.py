"""Real engines that sleep between leases, on a real cluster with a real weight store; and what they leave behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import ray

from tests.temporary_files import files_of_engines
from verl_rlhfless.ab.cluster import Cluster, private_cluster
from verl_rlhfless.config import PoolConfig, WeightsConfig
from verl_rlhfless.demo.assets import arithmetic_problems, build_assets
from verl_rlhfless.demo.recipe import CPU_ENVIRONMENT, common_overrides
from verl_rlhfless.live.events import EventLog

pytest.importorskip("vllm", reason="needs vLLM")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers can't import a test module
STORE, NUM_GPUS, WAIT_S = "weights-of-parking", 3, 60.0
PROMPT = list(range(5, 25))


@ray.remote(num_cpus=0)
class Publisher:
    """Publishes a model's weights as verl's trainer does."""

    async def publish(self, model: str, version: int) -> str:
        from transformers import AutoModelForCausalLM

        from verl_rlhfless.live.weight_engine import StoreCheckpointEngine

        engine = StoreCheckpointEngine(1 << 30, is_master=True, store_name=STORE, bucket_mib=16, timeout_s=WAIT_S)
        weights = AutoModelForCausalLM.from_pretrained(model).state_dict()
        report = await engine.send_weights(iter(weights.items()), global_steps=version)
        return str(report["checksum"])


@dataclass
class Trial:
    """A lot on a cluster, and everything that a replica is made of."""

    cluster: Cluster
    lot: Any
    warm_servers: Any
    config: Any
    publisher: Any
    store: Any
    files_before: set[str]
    num_started: int = 0

    def new_files(self) -> set[str]:
        return files_of_engines() - self.files_before

    def publish(self, version: int) -> str:
        model = self.config.actor_rollout_ref.model.path
        return str(ray.get(self.publisher.publish.remote(model, version), timeout=WAIT_S))

    async def start(self, version: int) -> tuple[Any, Any]:
        from verl_rlhfless.live.replica import ElasticReplica
        from verl_rlhfless.live.replica_life import WeightSource
        from verl_rlhfless.types import FleetDecision, ReplicaSpec

        self.lot.expect(FleetDecision(1, (ReplicaSpec(1),), "test"))
        role = self.config.actor_rollout_ref
        fresh = ElasticReplica(self.num_started, role.rollout, role.model, _POOL, self.warm_servers)
        self.num_started += 1
        return await self.lot.bring_up(fresh, WeightSource(STORE, version, WAIT_S))

    async def generate(self, replica: Any) -> list[int]:
        params = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
        output = await replica.server_handle.generate.remote(PROMPT, params, f"q{time.monotonic_ns()}")
        return list(output.token_ids)

    def gpus(self) -> float:
        return float(ray.available_resources().get("GPU", 0))

    def wait_until(self, condition: Any, what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, f"waited for {what}"
            time.sleep(0.05)


_POOL = PoolConfig(name="elastic", park="always", same_device_wait_s=0.5)


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    from hydra import compose, initialize_config_module

    folder = tmp_path_factory.mktemp("parking")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CPU_ENVIRONMENT.items():
            patch.setenv(name, value)
        assets = build_assets(folder / "assets", arithmetic_problems(64, seed=1), seed=1)
        overrides = common_overrides(assets, folder, steps=1, seed=1)[:-1]
        few_blocks = "++actor_rollout_ref.rollout.engine_kwargs.vllm.num_gpu_blocks_override=512"
        with initialize_config_module("verl.trainer.config", version_base=None):
            config = compose("ppo_trainer", [*overrides, few_blocks])
        files = files_of_engines()
        with private_cluster(NUM_GPUS, CPU_ENVIRONMENT) as cluster:
            from verl_rlhfless.live.parking import ParkingLot
            from verl_rlhfless.live.warm_pool import WarmPool
            from verl_rlhfless.live.weight_store import create_store

            store = create_store(STORE, WeightsConfig(name="store", bucket_mib=16))
            warm_servers = WarmPool(2, config.actor_rollout_ref.rollout.max_num_seqs)
            warm_servers.fill()
            lot = ParkingLot(_POOL, EventLog(None))
            trial = Trial(cluster, lot, warm_servers, config, Publisher.remote(), store, files)
            yield trial
            run(lot.close())
            warm_servers.close()
            trial.wait_until(lambda: not cluster.leftovers(), f"engines to end: {cluster.leftovers()}")
            trial.wait_until(lambda: trial.gpus() == NUM_GPUS, "all leases to end")
        assert trial.new_files() == set(), "an engine left files"


def run(what: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(what)


def processes_of(replica: Any) -> list[int]:
    return [pid for pid, _ in replica._engine_processes]


def runs(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def test_a_parked_engine_wakes_with_new_weights_and_serves_as_before(trial: Trial) -> None:
    trial.publish(1)

    async def first_step() -> tuple[Any, list[int]]:
        replica, _ = await trial.start(version=1)
        tokens = await trial.generate(replica)
        await trial.lot.retire(replica)
        return replica, tokens

    parked, tokens = run(first_step())
    start_s = parked.engine_s
    trial.wait_until(lambda: trial.gpus() == NUM_GPUS, "the parked engine's lease to end")
    assert all(runs(pid) for pid in processes_of(parked))
    assert trial.new_files() == set(), "a running engine has no file either"
    checksum = trial.publish(2)

    async def second_step() -> None:
        woken, report = await trial.start(version=2)
        assert woken is parked, "the same processes"
        assert (report.version, report.checksum, report.compared) == (2, checksum, "loaded")
        assert await trial.generate(woken) == tokens, "the same weights under another version"
        await trial.lot.retire(woken)

    run(second_step())
    assert parked.engine_s < start_s / 2, f"wake {parked.engine_s:.2f} s, start {start_s:.2f} s"


def test_an_engine_whose_devices_went_to_someone_else_is_started_again_elsewhere(trial: Trial) -> None:
    from verl_rlhfless.live.lease import Lease, LeaseRequest

    (parked,) = trial.lot._parked
    pids = processes_of(parked)
    with Lease.acquire(LeaseRequest("foreign", "replica", (1,)), WAIT_S) as foreign:
        assert foreign.device_key() == parked.lease.device_key(), "Ray gives the lowest free device"

        async def step() -> Any:
            replica, _ = await trial.start(version=2)
            await trial.generate(replica)
            await trial.lot.retire(replica)
            return replica

        replica = run(step())
    assert replica is not parked and replica.lease.device_key() != foreign.device_key()
    assert not any(runs(pid) for pid in pids), "the one that could not move is ended"


@pytest.mark.parametrize("victim", ["engine", "server"])
def test_what_was_killed_in_its_sleep_costs_a_start_and_nothing_else(trial: Trial, victim: str) -> None:
    async def sleeping() -> Any:
        replica, _ = await trial.start(version=2)
        await trial.lot.retire(replica)
        return replica

    parked = run(sleeping())
    assert trial.lot.parked.total() == 1
    pids = processes_of(parked) if victim == "engine" else [parked._server_process[0]]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)

    async def step() -> Any:
        replica, _ = await trial.start(version=2)
        tokens = await trial.generate(replica)
        await trial.lot.retire(replica)
        return replica, tokens

    replica, tokens = run(step())
    assert replica is not parked and len(tokens) == 8
    trial.wait_until(lambda: trial.gpus() == NUM_GPUS, "no lease to be kept")
    assert not any(runs(pid) for pid in processes_of(parked))
    assert trial.new_files() == set()


def test_a_host_without_memory_ends_what_sleeps(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trial.lot.parked.total() == 1
    monkeypatch.setattr(trial.lot, "_version_bytes", 1 << 50)
    run(trial.lot.make_room())
    assert trial.lot.parked.total() == 0
