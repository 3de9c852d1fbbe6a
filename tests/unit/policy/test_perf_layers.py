"""Prices of layers that are not plain attention: latents, windows and states."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.policy.test_shapes import shape
from verl_rlhfless.errors import ConfigError
from verl_rlhfless.policy.gpus import GPUS
from verl_rlhfless.policy.perf import EnginePerf
from verl_rlhfless.policy.transitions import TrainerPerf

H100 = GPUS["H100"]
HBM = H100.hbm_bytes_per_s * 0.8
GEMMA = EnginePerf(shape("Gemma-3-27B"), H100, 2)
STATES = EnginePerf(shape("Qwen3-Next-80B-A3B"), GPUS["H200"], 4)


def read_s(perf: EnginePerf, requests: int, context: int) -> float:
    return perf.iteration_s(requests, requests * context) - perf.iteration_s(requests, 0)


def test_latents_are_whole_on_every_gpu() -> None:
    engines = [EnginePerf(shape("DeepSeek-V2-Lite"), H100, tp) for tp in (1, 2, 8)]
    for perf in engines:
        assert perf.kv_s_per_token == pytest.approx(2 * 27 * 576 / HBM)
    assert engines[2].kv_blocks < 2 * engines[0].kv_blocks  # more GPUs hold no more tokens, but for the weights' room


def test_projections_to_latents_are_loaded_and_read_on_every_gpu() -> None:
    v3 = shape("DeepSeek-V3")
    perf = EnginePerf(v3, GPUS["H200"], 16)
    each = v3.weight_bytes / 16 + 2 * v3.replicated_params * 15 / 16
    assert perf.load_s == pytest.approx(each / (perf.gpu.host_bytes_per_s * 0.65))
    read = 2 * (v3.read_params(1) + 15 * v3.replicated_params) / 16
    weights_s = perf.iteration_s(1, 0) - perf.allreduce_s(1) - perf.efficiencies.launch_s - perf.efficiencies.per_seq_s
    assert weights_s == pytest.approx(read / (perf.gpu.hbm_bytes_per_s * 0.8))


def test_reads_end_with_the_window() -> None:
    kv_s, window = GEMMA.kv_s_per_token, 1024
    assert read_s(GEMMA, 8, 1000) == pytest.approx(8 * 1000 * kv_s)
    assert read_s(GEMMA, 8, 9000) == pytest.approx(8 * kv_s * (10 / 62 * 9000 + 52 / 62 * window))
    mistral = EnginePerf(shape("Mistral-7B"), H100, 1)
    assert read_s(mistral, 8, 9000) == pytest.approx(read_s(mistral, 8, 4096))


@pytest.mark.parametrize("context", [0, 6_500, 7_167, 7_168, 7_169, 30_000])
def test_the_closed_form_is_the_sum_on_both_sides_of_the_window(context: int) -> None:
    each_s = [GEMMA.iteration_s(7, context + 7 * i) for i in range(400)]
    for count in (1, 95, 96, 97, 400):
        taken_s = GEMMA.decode_s(7, context, count)
        assert taken_s == pytest.approx(sum(each_s[:count]), rel=1e-12)
        assert GEMMA.iterations_within(7, context, taken_s) == count
        assert GEMMA.iterations_within(7, context, taken_s * 0.9999) == count - 1


def test_more_long_contexts_fit_where_layers_keep_windows() -> None:
    assert GEMMA.blocks_of(1) > 5 * GEMMA.kv_blocks
    assert GEMMA.blocks_of(10_000) == GEMMA.kv_blocks  # all of them short
    GEMMA.check_holds(GEMMA.kv_blocks * 16 * 5)
    with pytest.raises(ConfigError, match="exceed the"):
        GEMMA.check_holds(GEMMA.kv_blocks * 16 * 7)


def test_a_state_is_read_and_written_and_kept_twice() -> None:
    one_s, two_s = (STATES.iteration_s(count, 0) - STATES._matmul_s(count) for count in (1, 2))
    state_s = 2 * STATES.shape.state_bytes / 4 / (STATES.gpu.hbm_bytes_per_s * 0.8)
    assert two_s - one_s == pytest.approx(state_s + STATES.efficiencies.per_seq_s)
    per_token = STATES.shape.kv_bytes_per_token / 2  # two KV heads on four GPUs
    states = -(-2 * STATES.shape.state_bytes / 4 / per_token // 16)
    assert STATES.kv_blocks - STATES.blocks_of(3) == pytest.approx(3 * states)


def test_fewer_requests_run_at_once_where_each_has_a_state() -> None:
    many = np.array([float(STATES.limits.max_num_seqs)])
    held = STATES.kv_blocks * 16 / (30_000 + 2 * STATES.shape.state_bytes / 4 / (STATES.shape.kv_bytes_per_token / 2))
    assert held < many[0]
    alone_s = STATES.fluid_iteration_s(np.array([held]), np.array([30_000.0]))
    assert STATES.fluid_iteration_s(many, np.array([30_000.0])) == pytest.approx(alone_s * many / held)


def test_a_move_copies_what_is_kept() -> None:
    link = min(H100.peer_bytes_per_s, H100.network_bytes_per_s) * 0.7
    kept = 10 / 62 * 9000 + 52 / 62 * 1024
    assert GEMMA.transfer_s(9000) == pytest.approx(5e-3 + kept * GEMMA.shape.kv_bytes_per_token / 2 / link)


def test_a_trainer_attends_with_the_heads_of_latent_attention() -> None:
    moonlight = shape("Moonlight-16B-A3B")
    trainer = TrainerPerf(moonlight, H100, 8, 8)
    flops = 2 * moonlight.matmul_params + 27 * 16 * 2 * (128 + 64 + 128) * 2000 / 2
    assert trainer._forward_flops(1.0, 2000) == pytest.approx(flops)
