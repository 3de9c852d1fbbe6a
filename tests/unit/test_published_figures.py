"""Published measurements are cited, quoted and priced as what they measured."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import published_figures
from benchmarks.published_figures import DATA, compared, prefill_s, spread
from verl_rlhfless.policy.gpus import GPUS
from verl_rlhfless.policy.perf import EnginePerf
from verl_rlhfless.policy.shapes import MODELS
from verl_rlhfless.policy.transitions import LeaseTimes, TrainerPerf

_QWEN_7B = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
}
_H100 = EnginePerf(MODELS["qwen2.5-7b"], GPUS["H100"], 1)


def data() -> Any:
    return json.loads(DATA.read_text())


def row(**point: Any) -> dict[str, Any]:
    whole = {"source": "a", "gpu": "H100", "model": "m", "tp": 1, "quote": "", **point}
    (found,) = compared({"models": {"m": _QWEN_7B}, "points": [whole]})
    return found


def test_the_comparison_is_recorded(tmp_path: Path) -> None:
    published_figures.main(tmp_path / "published.json")
    found = json.loads((tmp_path / "published.json").read_text())
    assert found["kind"] == "simulated" and str(tmp_path) not in str(found)
    assert found["command"] == "python -m benchmarks.published_figures --json published.json"
    results = found["results"]
    assert len(results["points"]) == len(data()["points"]) and set(results["sources"]) == set(data()["sources"])
    assert results["by_kind"].keys() == {*published_figures._ENGINE, "train"}
    assert sum(group["n"] for group in results["engine_by_age"].values()) == results["engine"]["n"]


def test_every_figure_is_cited_and_stands_in_its_quote() -> None:
    found = data()
    assert {point["source"] for point in found["points"]} == found["sources"].keys()
    assert {point["model"] for point in found["points"]} == found["models"].keys()
    for name, source in found["sources"].items():
        assert source["url"].startswith("https://") and source["engine"] and source["says"], name
    for point in found["points"]:
        numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", point["quote"].replace(",", ""))]
        listed = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", point["quote"])]
        assert point["published"] in numbers + listed, point


@pytest.mark.parametrize(
    ("unit", "published", "seconds"),
    [("s", 2.0, 2.0), ("ms", 250.0, 0.25), ("output tok/s", 160.0, 0.5), ("total tok/s", 1680.0, 0.5)],
)
def test_a_batch_is_its_prompts_and_its_responses(unit: str, published: float, seconds: float) -> None:
    found = row(kind="batch", batch=8, prompt_tokens=95, response_tokens=10, unit=unit, published=published)
    assert found["published_s"] == seconds
    assert found["predicted_s"] == pytest.approx(prefill_s(_H100, 8, 95) + _H100.decode_s(8, 8 * 96, 9), rel=1e-3)
    assert found["ratio"] == pytest.approx(found["predicted_s"] / seconds, abs=1e-3)


def test_long_prompts_take_several_iterations() -> None:
    budget = _H100.limits.max_batched_tokens
    assert prefill_s(_H100, 1, 100) == _H100.iteration_s(0, 0, 100, 5050)
    whole = prefill_s(_H100, 1, 2 * budget)
    assert whole == pytest.approx(2 * _H100.iteration_s(0, 0, budget, budget * (2 * budget + 1) // 2), rel=1e-6)


def test_kinds_are_priced_as_what_they_are() -> None:
    times, load_s = LeaseTimes(), _H100.load_s
    parts = {"weight load": load_s, "wake": times.wake_s + load_s, "cold start": times.cold_start_s + load_s}
    for kind, seconds in parts.items():
        assert row(kind=kind, unit="s", published=1.0)["predicted_s"] == pytest.approx(seconds, rel=1e-3)
    decode = row(kind="decode", batch=4, context=100, unit="s", published=1.0)
    assert decode["predicted_s"] == pytest.approx(_H100.iteration_s(4, 400), rel=1e-3)
    pair = EnginePerf(MODELS["qwen2.5-7b"], GPUS["H100"], 2)
    one = row(kind="all-reduce", tp=2, batch=64, unit="s", published=1.0)
    assert one["predicted_s"] == pytest.approx(pair.allreduce_s(64) / 56, rel=1e-3)


def test_a_training_step_is_of_all_gpus() -> None:
    sizes = {"num_gpus": 16, "samples_per_gpu": 2, "sample_tokens": 4096, "node_network_gb_per_s": 8}
    found = row(kind="train", unit="tok/s/GPU", published=8192.0, **sizes)
    trainer = TrainerPerf(MODELS["qwen2.5-7b"], replace(GPUS["H100"], network_bytes_per_s=1e9), 16, 8)
    assert found["published_s"] == 1.0
    assert found["predicted_s"] == pytest.approx(trainer.update_s(16 * 2 * 4096, 4096), rel=1e-3)


def test_a_relative_of_a_gpu_has_its_own_row() -> None:
    rows = [{"gpu": "L40S", "ratio": 1.0}, {"gpu": "L40S", "board": "other", "ratio": 0.5}, {"gpu": "L40S", "ratio": 2}]
    groups = spread(rows, published_figures.gpu_of)
    assert groups["L40S"] == {"n": 2, "median": 1.5, "range": [1.0, 2]} and groups["other as L40S"]["n"] == 1
