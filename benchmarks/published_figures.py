"""How near the performance model, as shipped, comes to GPU measurements that others published (kind: simulated).

``published_figures.json`` beside this file has each figure with its source, its conditions and the line that it was
read from: 16-bit weights only. A ratio is the model's seconds over the published ones: above 1, the model is slower.

- ``decode``: one iteration of a running batch (time per output token). ``batch``: prompts and responses of a batch that
  starts at once or, at a fixed concurrency, of as many requests. ``prefill``: the prompts alone.
- ``all-reduce``: one, of a batch's hidden states among ``tp`` GPUs.
- ``wake`` and ``cold start``: of an engine, with its weights. ``weight load``: into a running engine.
- ``train``: a step of FSDP pre-training, priced as an update, which recomputes all activations.

An engine is ``old`` if it is older than those of May 2025; of vLLM that is up to 0.7.3.

A figure with a ``board`` comes from a relative of the GPU type whose data sheet prices it; its row is its own. None is
of an L40S itself, and of recent engines on several GPUs there is one.

Usage: python -m benchmarks.published_figures --json OUT
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import command
from benchmarks.record import write_simulated
from verl_rlhfless.policy.gpus import GPUS
from verl_rlhfless.policy.perf import EngineLimits, EnginePerf
from verl_rlhfless.policy.shapes import ModelShape, parse_model_config
from verl_rlhfless.policy.transitions import LeaseTimes, TrainerPerf

DATA = Path(__file__).with_suffix(".json")
ENGINE_KINDS = ("decode", "batch", "prefill")
"""Work of an engine; the rest is a part of it, a start, a load of weights or the trainer's."""
_LIMITS = EngineLimits(memory_utilization=0.95)
_GPUS_PER_NODE = 8
_TIMES = LeaseTimes()

Point = Mapping[str, Any]


def prefill_s(perf: EnginePerf, batch: int, prompt_tokens: int) -> float:
    """Return the seconds of computing ``batch`` prompts in iterations of the engine's token budget."""
    tokens = batch * prompt_tokens
    attended = tokens * (prompt_tokens + 1) // 2
    starts = range(0, tokens, perf.limits.max_batched_tokens)
    chunks = [min(perf.limits.max_batched_tokens, tokens - start) for start in starts]
    return sum(perf.iteration_s(0, 0, chunk, attended * chunk // tokens) for chunk in chunks)


def _batch_s(perf: EnginePerf, point: Point) -> float:
    batch, prompt, response = point["batch"], point["prompt_tokens"], point["response_tokens"]
    return prefill_s(perf, batch, prompt) + perf.decode_s(batch, batch * (prompt + 1), response - 1)


_ENGINE: dict[str, Callable[[EnginePerf, Point], float]] = {
    "decode": lambda perf, point: perf.iteration_s(point["batch"], point["batch"] * point["context"]),
    "batch": _batch_s,
    "prefill": lambda perf, point: prefill_s(perf, point["batch"], point["prompt_tokens"]),
    "all-reduce": lambda perf, point: perf.allreduce_s(point["batch"]) / (2 * perf.shape.layers),
    "wake": lambda perf, _: _TIMES.wake_s + perf.load_s,
    "cold start": lambda perf, _: _TIMES.cold_start_s + perf.load_s,
    "weight load": lambda perf, _: perf.load_s,
}


def _train_s(shape: ModelShape, point: Point) -> float:
    gpu = GPUS[point["gpu"]]
    if "node_network_gb_per_s" in point:
        gpu = replace(gpu, network_bytes_per_s=point["node_network_gb_per_s"] * 1e9 / _GPUS_PER_NODE)
    trainer = TrainerPerf(shape, gpu, point["num_gpus"], _GPUS_PER_NODE)
    return trainer.update_s(_train_tokens(point) * point["num_gpus"], point["sample_tokens"])


def _train_tokens(point: Point) -> int:
    """Return the tokens of a step on each GPU."""
    return int(point["samples_per_gpu"] * point["sample_tokens"])


def _request_tokens(point: Point) -> int:
    """Return the tokens of a request: of its prompt and, where the response counts, of that too."""
    return int(point["prompt_tokens"] + point.get("response_tokens", 0))


def predicted_s(point: Point, shape: ModelShape) -> float:
    """Return the model's seconds for what was measured."""
    if point["kind"] == "train":
        return _train_s(shape, point)
    return _ENGINE[point["kind"]](EnginePerf(shape, GPUS[point["gpu"]], point["tp"], limits=_LIMITS), point)


_SECONDS: dict[str, Callable[[Point], float]] = {
    "s": lambda point: point["published"],
    "ms": lambda point: point["published"] / 1e3,
    "output tok/s": lambda point: point["batch"] * point["response_tokens"] / point["published"],
    "total tok/s": lambda point: point["batch"] * _request_tokens(point) / point["published"],
    "tok/s/GPU": lambda point: _train_tokens(point) / point["published"],
}
"""Seconds of what a point measured, by the unit of its figure."""


def compared(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every point with the published and the predicted seconds and their ratio."""
    shapes = {name: parse_model_config(config, name) for name, config in data["models"].items()}
    rows = []
    for point in data["points"]:
        published, predicted = _SECONDS[point["unit"]](point), predicted_s(point, shapes[point["model"]])
        row = {key: value for key, value in point.items() if key not in ("published", "unit", "quote")}
        seconds = {"published_s": float(f"{published:.4g}"), "predicted_s": float(f"{predicted:.4g}")}
        rows.append(row | seconds | {"ratio": round(predicted / published, 3)})
    return rows


def spread(rows: list[dict[str, Any]], names: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """Return number, median and range of the ratios of each group of rows, in the order of their first row."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(names(row), []).append(row["ratio"])
    return {
        name: {"n": len(ratios), "median": round(float(np.median(ratios)), 2), "range": [min(ratios), max(ratios)]}
        for name, ratios in groups.items()
    }


def gpu_of(row: Mapping[str, Any]) -> str:
    """Return what was measured on: a GPU type, or a relative that is priced as one."""
    return f"{row['board']} as {row['gpu']}" if "board" in row else row["gpu"]


def _kind_and_gpu(row: Mapping[str, Any]) -> str:
    return f"{row['kind']}, {gpu_of(row)}"


def _age(data: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    return "old" if "is_old" in data["sources"][row["source"]] else "recent"


def main(out: Annotated[Path, typer.Option("--json")]) -> None:
    """Price each published measurement with the shipped efficiencies."""
    data = json.loads(DATA.read_text())
    rows = compared(data)
    engine = [row for row in rows if row["kind"] in ENGINE_KINDS]
    results = {
        "read_on": data["read_on"],
        "engine": spread(engine, lambda row: "all")["all"],
        "engine_by_age": spread(engine, lambda row: _age(data, row)),
        "engine_by_age_and_tp": spread(engine, lambda row: f"{_age(data, row)}, TP {row['tp']}"),
        "recent_by_kind_and_gpu": spread([row for row in engine if _age(data, row) == "recent"], _kind_and_gpu),
        "by_kind": spread(rows, lambda row: row["kind"]),
        "by_kind_and_gpu": spread(rows, _kind_and_gpu),
        "by_engine": spread(engine, lambda row: data["sources"][row["source"]]["engine"]),
        "sources": {name: source["url"] for name, source in data["sources"].items()},
        "points": rows,
    }
    told = f"python -m benchmarks.published_figures --json {out.name}"
    write_simulated(out, results, told, shown=["engine_by_age_and_tp", "by_kind_and_gpu"])


if __name__ == "__main__":
    command.run(main, __doc__)
