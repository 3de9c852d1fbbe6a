"""Bad clusters, model configs and traces are refused with key, value and rule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from verl_rlhfless.errors import ConfigError, DataError
from verl_rlhfless.policy.shapes import MODELS, parse_model_config
from verl_rlhfless.policy.transitions import LeaseTimes
from verl_rlhfless.sim.cell import load_model, make_pool
from verl_rlhfless.sim.cluster import CLUSTERS, load_cluster, parse_cluster
from verl_rlhfless.sim.workload import load_steps

GOOD = {"format": "rlhfless-cluster/1", "gpu": "H100", "num_nodes": 2, "gpus_per_node": 8}
MODEL = {
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 4096,
    "vocab_size": 1000,
}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"gpu": "H101"}, "gpu"),
        ({"gpu": []}, "gpu"),
        ({"gpu": ["L40S"]}, "gpu"),
        ({"num_nodes": 0}, "num_nodes"),
        ({"num_nodes": True}, "num_nodes"),
        ({"gpus_per_node": 2.5}, "gpus_per_node"),
        ({"usd_per_gpu_h": -1}, "usd_per_gpu_h"),
        ({"usd_per_gpu_h": 0}, "usd_per_gpu_h"),  # prices are compared as ratios
        ({"usd_per_gpu_h": float("nan")}, "usd_per_gpu_h"),
        ({"outages": [[[5, 1]]]}, "outages"),
        ({"outages": [[[1, 2]], [[1, 2]]]}, "outages"),
        ({"outages": 3}, "outages"),
        ({"outages": [[[10, 10**400]]]}, "outages"),
        ({"nodes": 2}, "nodes"),
        ({"format": "x"}, "format"),
        ({"kv_transfer": "yes"}, "kv_transfer"),
    ],
)
def test_a_bad_cluster_file_names_the_key(change: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_cluster(GOOD | change, "c.json")
    assert caught.value.key == f"c.json: {key}"
    assert "c.json" in str(caught.value)


def test_a_good_cluster_file_keeps_its_figures(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(GOOD | {"usd_per_gpu_h": 2.0, "outages": [[[10, 20]]]}))
    cluster = load_cluster(str(path))
    assert (cluster.num_gpus, cluster.trainer_gpus, cluster.usd_per_gpu_h) == (16, 8, 2.0)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_file_that_is_no_cluster_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises((ConfigError, DataError), match=r"c\.json"):
        load_cluster(str(path))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"vocab_size": "1000"}, "vocab_size"),
        ({"kv_lora_rank": 512}, "kv_lora_rank"),
        ({"num_experts": "8"}, "num_experts"),
        ({"num_experts": 8, "num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": 3}, "mlp_only_layers"),
        ({"num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": "x"}, "decoder_sparse_step"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"hidden_size": 1025}, "hidden_size"),
    ],
)
def test_a_bad_model_config_names_the_key(change: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_model_config(MODEL | change, "config.json")
    assert caught.value.key == f"config.json: {key}"


def test_of_a_vision_language_model_the_decoder_counts() -> None:
    seeing = {"text_config": MODEL | {"tie_word_embeddings": None}, "vision_config": {}, "tie_word_embeddings": True}
    assert parse_model_config(seeing, "a") == parse_model_config(MODEL | {"tie_word_embeddings": True}, "a")
    with pytest.raises(ConfigError, match="kv_lora_rank=512: multi-head latent attention"):
        parse_model_config({"text_config": MODEL | {"kv_lora_rank": 512}}, "a")


def test_a_bad_vision_encoder_is_named() -> None:
    with pytest.raises(ConfigError, match=r"config\.json: vision_config: num_heads='16'"):
        parse_model_config(MODEL | {"vision_config": {"num_heads": "16"}}, "config.json")


def test_a_missing_model_key_is_named() -> None:
    with pytest.raises(DataError, match=r"^config\.json: intermediate_size: is missing"):
        parse_model_config({k: v for k, v in MODEL.items() if k != "intermediate_size"}, "config.json")


@pytest.mark.parametrize("load", [load_model, load_cluster])
def test_an_unknown_name_lists_the_known_ones(load) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match="must be one of"):
        load("nowhere")
    with pytest.raises(ConfigError, match=r"'nowhere\.json': no such file"):
        load("nowhere.json")


def test_a_model_whose_training_state_does_not_fit_is_refused_with_the_figures() -> None:
    with pytest.raises(ConfigError, match=r"needs \d+ GB"):
        make_pool(CLUSTERS["l40s-16"], MODELS["qwen2.5-32b"], LeaseTimes()) and make_pool(
            CLUSTERS["l40s-16"], MODELS["llama2-70b"], LeaseTimes()
        )


def test_a_sample_that_no_engine_can_ever_hold_is_refused_before_anything_runs() -> None:
    pool = make_pool(CLUSTERS["l40s-16"], MODELS["qwen2.5-32b"], LeaseTimes(), context_tokens=50_000)
    assert min(pool.perf) == 4  # two GPUs hold the weights but not 50,000 tokens beside them
    with pytest.raises(ConfigError, match=r"up to 9000000 tokens exceed the \d+.*Use GPUs with more memory"):
        make_pool(CLUSTERS["l40s-16"], MODELS["qwen2.5-7b"], LeaseTimes(), context_tokens=9_000_000)


def test_a_bad_trace_names_line_and_rule(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    header = {"format": "rlhfless-trace/1", "name": "t", "unit": "tokens", "max_response_tokens": 10, "n": 1}
    header |= {"kind": "composed", "source": "s", "licence": "l", "note": ""}
    group = {"prompt_id": "a", "prompt_tokens": 3, "response_tokens": [11]}
    path.write_text(json.dumps(header) + "\n" + json.dumps({"step": 1, "epoch": 1, "groups": [group]}) + "\n")
    with pytest.raises(DataError, match="line 2"):
        load_steps(path)
