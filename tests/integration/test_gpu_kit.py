"""The GPU kit on a CPU with a tiny model: a real run of each engine, and a step that is what a model computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.device import CPU, Device
from benchmarks.gpu.workload import CHECK, TINY, write_model
from verl_rlhfless.policy.perf import EnginePerf

ROOT = Path(__file__).parents[2]
PERF = EnginePerf(TINY, CPU, 1)


def check(out: Path, engine: str) -> tuple[str, set[str]]:
    """Run the kit's check; return what it printed, and the top-level packages that its process imported."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['kit', '--check', '--engine', {engine!r}, '--out', {str(out)!r}, '--results', {str(out)!r}]\n"
        "try: runpy.run_module('benchmarks.gpu', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print('imported', *sorted({name.split('.')[0] for name in sys.modules}))\n"
    )
    environ = {name: value for name, value in os.environ.items() if name != "VERL_PLATFORM"}  # as on a GPU machine
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    printed, _, imported = done.stdout.partition("imported ")
    return printed, set(imported.split())


def measured(out: Path, engine: str) -> dict[str, list[dict[str, float]]]:
    parts: dict[str, list[dict[str, float]]] = json.loads((out / f"parts_tiny_{engine}.json").read_text())["parts"]
    assert all(row["seconds"] >= 0 for rows in parts.values() for row in rows)
    return parts


def test_transformers_is_measured_without_verl_ray_or_vllm(tmp_path: Path) -> None:
    printed, imported = check(tmp_path, "transformers")
    parts = measured(tmp_path, "transformers")
    assert set(parts) == {"decode", "prefill", "load", "start"}
    assert len(parts["decode"]) == len(CHECK.decode_points(PERF)) == 4
    assert "failed" not in printed
    assert json.loads((tmp_path / "calibration_tiny_transformers.json").read_text())["gpu"] == "CPU"
    assert list(tmp_path.glob("gpu_*")) == [], "figures of a CPU are no result"
    assert not imported & {"verl", "ray", "vllm", "hydra", "omegaconf"}, "a bare GPU machine lacks them"


@pytest.mark.slow
def test_a_real_vllm_engine_is_measured_from_its_start_to_a_pull_of_weights(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="needs vLLM")
    printed, _ = check(tmp_path, "vllm")
    parts = measured(tmp_path, "vllm")
    assert "failed" not in printed
    assert set(parts) == {"start", "decode", "prefill", "abort", "pull"}, "a CPU engine cannot sleep"
    assert {row["what"] for row in parts["pull"]} == {"publish", "pull"}
    (pull,) = (row for row in parts["pull"] if row["what"] == "pull")
    assert TINY.weight_bytes < pull["num_bytes"] < 1.01 * TINY.weight_bytes, "norms and biases are not in the shape"


def test_a_measured_step_attends_to_the_whole_context(tmp_path: Path) -> None:
    """It gives the token that the model gives for the same context, and another one when a far key changes."""
    import torch
    from transformers.cache_utils import Cache

    from benchmarks.gpu.transformers_subject import FullLayer, TransformersSubject

    subject = TransformersSubject(write_model(tmp_path, TINY), PERF, CHECK, Device("CPU", "", CPU))
    torch.manual_seed(1)
    model, context = subject._model, torch.randint(0, TINY.vocab, (3, 40))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)  # far from uniform attention, so that a lost key shows
        whole = model(context, use_cache=True)
    expected = whole.logits[:, -1].argmax(-1)

    def step(*lost: int) -> tuple[torch.Tensor, list[FullLayer]]:
        layers = []
        for layer in whole.past_key_values.layers:
            keys, values = layer.keys.clone(), layer.values.clone()
            for position in (39, *lost):  # the step itself writes the last one
                keys[:, :, position] = values[:, :, position] = 0
            layers.append(FullLayer(keys, values))
        return subject._forward(context[:, -1:], 39, Cache(layers=layers))(), layers

    tokens, layers = step()
    assert torch.equal(tokens, expected)
    for mine, real in zip(layers, whole.past_key_values.layers, strict=True):
        torch.testing.assert_close(mine.keys[:, :, 39], real.keys[:, :, 39], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(mine.values[:, :, 39], real.values[:, :, 39], rtol=1e-3, atol=1e-3)
    assert not torch.equal(step(*range(20))[0], expected)
