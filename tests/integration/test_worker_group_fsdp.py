"""verl's real FSDP2 training worker, suspended between two updates while another Ray job runs on its GPUs."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import torch
from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.ray.base import RayClassWithInitArgs, create_colocated_worker_cls
from verl.trainer.config import CheckpointConfig
from verl.trainer.ppo.v1 import trainer_base
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker

from tests.integration.conftest import Cluster, ForeignJob
from verl_rlhfless.demo.assets import arithmetic_problems, build_assets
from verl_rlhfless.live.pool import ElasticResourcePool
from verl_rlhfless.live.worker_group import ElasticWorkerGroup
from verl_rlhfless_patches import verl_worker_group

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers can't import a test module
pytestmark = pytest.mark.usefixtures("nothing_left")
WAIT_S = 240.0
CPU_ENV = {"VERL_PLATFORM": "cpu", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Updater(TrainingWorker):
    """verl's training worker with an update on seeded tokens, and a fingerprint of all that an update changes."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def update(self, seed: int) -> float:
        tokens = torch.randint(3, 100, (2, 16), generator=torch.Generator().manual_seed(seed + self.rank))
        with self.engine.train_mode():
            self.engine.optimizer_zero_grad()
            loss = self.engine.module(input_ids=tokens, labels=tokens).loss
            loss.backward()
            self.engine.optimizer_step()
        return float(loss)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def fingerprint(self) -> tuple[int, str, int]:
        digest, num_states = hashlib.sha256(), 0
        for parameter in self.engine.module.parameters():
            state = self.engine.optimizer.state.get(parameter, {})
            num_states += len(state)
            for tensor in (parameter, *(state[key] for key in sorted(state))):
                local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                digest.update(local.detach().contiguous().numpy().tobytes())
        return os.getpid(), digest.hexdigest(), num_states


@pytest.fixture
def config(tmp_path: Path) -> TrainingWorkerConfig:
    model = build_assets(tmp_path, arithmetic_problems(64, seed=0), seed=0).model
    return TrainingWorkerConfig(
        model_type="language_model",
        model_config=HFModelConfig(
            path=str(model), use_remove_padding=False, override_config={"attn_implementation": "sdpa"}
        ),
        engine_config=FSDPEngineConfig(strategy="fsdp2", use_torch_compile=False, dtype="float32"),
        optimizer_config=FSDPOptimizerConfig(lr=1e-2, total_training_steps=8),
        checkpoint_config=CheckpointConfig(),
    )


@pytest.fixture
def trainer(ray_cluster: Cluster, config: TrainingWorkerConfig) -> Iterator[ElasticWorkerGroup]:
    """The actor's role group of a colocated worker group, as verl's trainer makes it."""
    pool = ElasticResourcePool([2], name_prefix="fsdp")
    cls = create_colocated_worker_cls({"actor": RayClassWithInitArgs(ray.remote(Updater), config=config)})
    root = ElasticWorkerGroup(resource_pool=pool, ray_cls_with_init=cls, device_name="cpu", worker_env=CPU_ENV)
    try:
        yield root.spawn({"actor"})["actor"]
    finally:
        root.shutdown()


def test_training_goes_on_bit_for_bit_after_another_job_used_the_gpus(
    ray_cluster: Cluster, trainer: ElasticWorkerGroup, foreign_job: Callable[[int], ForeignJob]
) -> None:
    trainer.reset()
    undisturbed = [trainer.update(seed) for seed in (1, 2)]
    expected = trainer.fingerprint()

    trainer.reset()  # builds model and optimizer anew, from the same files
    losses = [trainer.update(1)]
    assert trainer.fingerprint() != expected, "the second update must change the fingerprint"
    suspended = trainer.suspend(WAIT_S)
    assert len(suspended.ranks) == 2
    job = foreign_job(4)
    job.leave()
    trainer.resume(WAIT_S, WAIT_S)
    losses.append(trainer.update(2))

    assert losses == undisturbed
    assert trainer.fingerprint() == expected
    assert all(num_states > 0 for _, _, num_states in expected), "Adam's state must be part of the comparison"


def test_the_installed_verl_builds_its_worker_groups_from_another_class_only_inside_the_block() -> None:
    stock, other = trainer_base.RayWorkerGroup, type("Other", (trainer_base.RayWorkerGroup,), {})
    with verl_worker_group.use(other):
        assert trainer_base.RayWorkerGroup is other
    assert trainer_base.RayWorkerGroup is stock
