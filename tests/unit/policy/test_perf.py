"""The performance model: legal sizes, closed forms, memory, calibration."""

from __future__ import annotations

from dataclasses import replace

import pytest

from verl_rlhfless.errors import ConfigError, DataError
from verl_rlhfless.policy.calibrate import IterationSample, calibrate
from verl_rlhfless.policy.gpus import GPUS
from verl_rlhfless.policy.perf import EnginePerf
from verl_rlhfless.policy.shapes import MODELS, parse_model_config
from verl_rlhfless.policy.transitions import RECIPES, Recipe, TrainerPerf, optimizer_state_bytes

PERF = EnginePerf(MODELS["qwen2.5-7b"], GPUS["L40S"], 2)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("qwen2.5-3b", (1, 2, 4, 8)),
        ("qwen2.5-7b", (1, 2, 4)),
        ("qwen2.5-32b", (1, 2, 4, 8)),
        ("llama2-70b", (1, 2, 4, 8)),
    ],
)
def test_tensor_parallel_divides_heads_and_stays_in_a_node(model: str, expected: tuple[int, ...]) -> None:
    assert MODELS[model].legal_tp(8) == expected
    assert MODELS[model].legal_tp(2) == tuple(tp for tp in expected if tp <= 2)


@pytest.mark.parametrize(
    ("model", "billions"), [("qwen2.5-3b", 3.09), ("qwen2.5-7b", 7.62), ("qwen2.5-32b", 32.8), ("llama2-70b", 69.0)]
)
def test_parameter_counts_are_those_of_the_model_cards(model: str, billions: float) -> None:
    assert MODELS[model].params / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_vision_encoder_is_split_too() -> None:
    decoder = {
        "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
        "intermediate_size": 11008, "vocab_size": 151936,
    }  # fmt: skip
    seeing = decoder | {"vision_config": {"num_heads": 16, "intermediate_size": 3420}}  # Qwen2.5-VL-3B
    assert parse_model_config(decoder, "m").split_sizes(8) == (1, 2, 4, 8)
    assert parse_model_config(seeing, "m").split_sizes(8) == (1, 2, 4)


def test_kv_bytes_replicate_beyond_the_number_of_kv_heads() -> None:
    shape, gpu = MODELS["qwen2.5-3b"], GPUS["H100"]
    assert EnginePerf(shape, gpu, 4).kv_s_per_token == EnginePerf(shape, gpu, 2).kv_s_per_token
    assert EnginePerf(shape, gpu, 2).kv_s_per_token == pytest.approx(EnginePerf(shape, gpu, 1).kv_s_per_token / 2)


def test_decoding_one_sequence_is_bound_by_reading_the_weights() -> None:
    perf = EnginePerf(MODELS["qwen2.5-7b"], GPUS["L40S"], 1)
    weights_s = 2 * perf.shape.matmul_params / (864e9 * 0.8)
    assert perf.iteration_s(1, 100) == pytest.approx(weights_s + 1.5e-3, rel=0.01)


def test_the_closed_form_equals_the_sum_of_iterations() -> None:
    steps = sum(PERF.iteration_s(7, 5000 + 7 * i) for i in range(300))
    assert PERF.decode_s(7, 5000, 300) == pytest.approx(steps, rel=1e-12)
    assert PERF.iterations_within(7, 5000, steps) == 300
    assert PERF.iterations_within(7, 5000, steps * 0.999) == 299


def test_weights_that_do_not_fit_are_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"leave no KV cache.*larger tensor-parallel"):
        EnginePerf(MODELS["qwen2.5-32b"], GPUS["L40S"], 1)


def test_calibration_recovers_known_efficiencies() -> None:
    truth = replace(
        PERF, efficiencies=replace(PERF.efficiencies, hbm=0.62, launch_s=3.1e-3, per_seq_s=2e-5, prefill=0.4)
    )
    shapes = [(b, b * c, 0) for b in (1, 8, 64, 256) for c in (100, 2000)] + [(0, 0, t) for t in (512, 2048, 8192)]
    samples = [IterationSample(b, c, t, truth.iteration_s(b, c, t, t * (t + 1) // 2)) for b, c, t in shapes]
    fitted = calibrate(PERF, samples)
    assert fitted.mean_error < 0.02
    assert fitted.max_error < 0.06
    assert fitted.perf.efficiencies.hbm == pytest.approx(0.62, rel=0.05)


def test_calibration_reports_the_error_that_remains() -> None:
    samples = [IterationSample(b, b * 500, 0, 0.01 * (1 + b % 2)) for b in (1, 2, 3, 4, 5, 6)]
    assert calibrate(PERF, samples).mean_error > 0.1


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_calibration_refuses_impossible_samples(seconds: float) -> None:
    with pytest.raises(DataError, match="sample 2"):
        calibrate(PERF, [IterationSample(1, 1, 0, 1.0)] * 2 + [IterationSample(1, 1, 0, seconds)] * 2)


def test_ppo_takes_longer_than_grpo_and_the_critic_has_its_own_state() -> None:
    grpo = TrainerPerf(MODELS["qwen2.5-7b"], GPUS["H100"], 16, 8)
    ppo = replace(grpo, recipe=Recipe(has_critic=True))
    assert ppo.update_s(1e6, 2000) == pytest.approx(2 * grpo.update_s(1e6, 2000))
    assert ppo.inference_s(1e6, 2000) == pytest.approx(1.5 * grpo.inference_s(1e6, 2000))
    assert ppo.state_copy_s > grpo.state_copy_s


@pytest.mark.parametrize(
    ("gpu", "num_gpus", "link"),
    [
        ("L40S", 8, 32e9),  # PCIe between peers
        ("L40S", 16, 32e9),  # slower than the node's 400 Gbit/s
        ("A100-80G", 8, 300e9),  # NVLink
        ("A100-80G", 16, 50e9),  # 400 Gbit/s into a node, however fast its NVLink
        ("H100", 8, 450e9),
        ("H100", 16, 400e9),
    ],
)
def test_the_trainer_gathers_over_the_slowest_link_between_its_gpus(gpu: str, num_gpus: int, link: float) -> None:
    trainer = TrainerPerf(MODELS["qwen2.5-7b"], GPUS[gpu], num_gpus, 8)
    received = trainer.shape.weight_bytes * (num_gpus - 1) / num_gpus
    assert trainer.reshard_s == pytest.approx(received / (link * trainer.efficiencies.peer))


def test_a_slower_network_makes_only_a_trainer_of_several_nodes_slower() -> None:
    fast = TrainerPerf(MODELS["qwen2.5-7b"], GPUS["H100"], 16, 8)
    slow = replace(fast, gpu=replace(fast.gpu, network_bytes_per_s=1e9))
    assert slow.reshard_s > 10 * fast.reshard_s
    assert slow.update_s(1e6, 2000) > fast.update_s(1e6, 2000)
    assert slow.fuse_load_s == fast.fuse_load_s  # a freed GPU loads whole models and gathers nothing
    assert replace(slow, num_gpus=8).reshard_s == replace(fast, num_gpus=8).reshard_s


def test_a_moved_sample_is_recomputed_unless_the_pool_can_transfer_and_transfer_is_faster() -> None:
    recompute_s = 2000 * PERF.prefill_s_per_token
    assert PERF.move_s(2000, has_kv_transfer=False) == recompute_s
    assert PERF.move_s(2000, has_kv_transfer=True) == PERF.transfer_s(2000) < recompute_s
    assert PERF.move_s(10, has_kv_transfer=True) == 10 * PERF.prefill_s_per_token < PERF.transfer_s(10)


def test_a_transfer_is_bound_by_the_slower_of_peer_link_and_network() -> None:
    one, two = (EnginePerf(MODELS["qwen2.5-7b"], GPUS["L40S"], tp) for tp in (1, 2))
    kv_bytes = 1e5 * 2 * 28 * 4 * 128 * 2
    assert one.transfer_s(1e5) == pytest.approx(5e-3 + kv_bytes / (6.25e9 * 0.7))
    assert two.transfer_s(1e5) - 5e-3 == pytest.approx((one.transfer_s(1e5) - 5e-3) / 2)


def test_a_model_reward_is_one_more_forward_phase_with_its_own_weights() -> None:
    rule = TrainerPerf(MODELS["qwen2.5-7b"], GPUS["H100"], 16, 8, RECIPES["ppo"])
    model = replace(rule, recipe=RECIPES["ppo-rm"])
    assert model.inference_s(1e6, 2000) == pytest.approx(4 / 3 * rule.inference_s(1e6, 2000))
    assert model.update_s(1e6, 2000) == rule.update_s(1e6, 2000)
    assert model.fuse_tokens_per_s(2000) == pytest.approx(3 / 4 * rule.fuse_tokens_per_s(2000))
    assert model.fuse_bytes - rule.fuse_bytes == model.shape.weight_bytes
    assert model.state_copy_s > rule.state_copy_s
    needs = [optimizer_state_bytes(rule.shape, RECIPES[name]) for name in ("ppo", "ppo-rm")]
    assert needs[1] - needs[0] == model.shape.weight_bytes
