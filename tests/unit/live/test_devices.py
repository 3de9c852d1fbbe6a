"""What policies believe of a replica is what it is declared to take."""

from __future__ import annotations

import pytest

from verl_rlhfless.live.devices import PoolBounds, declared_pool, find_gpu, gpu_pool, warn_of_several_types
from verl_rlhfless.live.pacing import PaceModel
from verl_rlhfless.policy.gpus import GPUS
from verl_rlhfless.policy.perf import EngineLimits
from verl_rlhfless.policy.shapes import MODELS

FLEET = PoolBounds(
    tps=(1, 2),
    num_gpus=4,
    gpus_per_node=4,
    limits=EngineLimits(max_num_seqs=32, max_batched_tokens=2048),
    kv_tokens=9000,
)
PACE = PaceModel(60.0, 2.0, 0.05, 1.0, tp_speedup={2: 1.6})


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(("batch", "context"), [(1, 40), (8, 4000), (32, 30_000)])
def test_a_declared_decode_takes_what_the_pace_declares(tp: int, batch: int, context: int) -> None:
    perf = declared_pool(FLEET, PACE).perf[tp]
    assert perf.iteration_s(batch, context) == pytest.approx(PACE.iteration_s(tp, batch, context, 0), rel=1e-3)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_declared_prefill_takes_what_the_pace_declares(tp: int) -> None:
    perf = declared_pool(FLEET, PACE).perf[tp]
    assert perf.iteration_s(0, 0, 200) == pytest.approx(PACE.iteration_s(tp, 0, 0, 200), rel=1e-2)


def test_without_a_part_per_context_or_prefill_token_neither_costs_anything() -> None:
    perf = declared_pool(FLEET, PaceModel(40.0)).perf[1]
    assert perf.iteration_s(16, 10_000) == pytest.approx(0.040, rel=1e-3)
    assert perf.iteration_s(0, 0, 500) == pytest.approx(0.040, rel=1e-3)


def test_a_declared_replica_holds_the_tokens_that_it_is_said_to_hold() -> None:
    for perf in declared_pool(FLEET, PACE).perf.values():
        assert 9000 <= perf.kv_blocks * 16 <= 9032


@pytest.mark.parametrize(
    ("resources", "name"),
    [
        (["CPU", "GPU", "accelerator_type:H100"], "H100"),
        (["accelerator_type:A100"], "A100-80G"),
        (["accelerator_type:A100-80G"], "A100-80G"),
        (["accelerator_type:RTX4090"], "L40S"),
    ],
)
def test_rays_name_of_a_gpu_finds_its_data_sheet(resources: list[str], name: str) -> None:
    gpu = find_gpu(resources)
    assert gpu is not None and gpu.name == name


@pytest.mark.parametrize(
    ("resources", "device_bytes", "memory_bytes"),
    [
        (["accelerator_type:A100"], 42_400_000_000, 42.4e9),
        (["accelerator_type:A100", "accelerator_type:A100-40G"], 42_400_000_000, 42.4e9),
        (["accelerator_type:H20"], 102_000_000_000, 102e9),
        (["accelerator_type:A100"], 0, 80e9),
        (["accelerator_type:A100", "accelerator_type:H200"], 151_000_000_000, 80e9),
        (["accelerator_type:A100", "accelerator_type:H200"], 42_400_000_000, 42.4e9),
    ],
)
def test_a_gpu_has_the_memory_that_was_measured_and_not_that_of_its_name(
    resources: list[str], device_bytes: int, memory_bytes: float
) -> None:
    gpu = find_gpu(resources, device_bytes)
    assert gpu is not None and gpu.memory_bytes == memory_bytes


def test_a_cluster_without_gpus_has_none() -> None:
    assert find_gpu(["CPU", "node:10.0.0.1", "memory"], 64 << 30) is None


def test_a_gpu_pool_has_the_engines_limits() -> None:
    perf = gpu_pool(FLEET, MODELS["qwen2.5-3b"], GPUS["H100"]).perf[2]
    assert (perf.tp, perf.limits.max_num_seqs) == (2, 32)


@pytest.mark.parametrize(
    ("types", "is_told"), [(["T4", "A100-80G"], True), (["A100-80G"], False), ([], False), (["H100", "H100"], False)]
)
def test_a_cluster_of_several_gpu_types_is_told_at_start(
    types: list[str], is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_several_types(["CPU", "GPU", "node:10.0.0.1", *(f"accelerator_type:{name}" for name in types)])
    assert ("several types (A100-80G, T4)" in caplog.text) == is_told
