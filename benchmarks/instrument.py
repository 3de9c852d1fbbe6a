"""What the instrument (pacing off) costs a real engine: the same generation with its probe and without, in turn.

python -m benchmarks.instrument          # about 2 minutes; writes benchmarks/results/instrument.json
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.record import write_result
from verl_rlhfless.demo.assets import arithmetic_problems, build_assets
from verl_rlhfless.demo.recipe import CPU_ENVIRONMENT
from verl_rlhfless.live.variables import OBSERVER_DIR_VARIABLE

_PAIRS = 9
_BATCH = 8
_TOKENS = 128


class _NoProbe:
    """What a worker calls instead of its probe when nothing is recorded."""

    def begin(self, scheduler_output: Any) -> None: ...

    def end(self) -> None: ...


def _silence(worker: Any) -> None:
    worker._rlhfless_silenced, worker._rlhfless_probe = worker._rlhfless_probe, _NoProbe()


def _restore(worker: Any) -> None:
    worker._rlhfless_probe = worker._rlhfless_silenced


def measure(folder: Path) -> dict[str, float]:
    """Return the median seconds of one generation with and without the probe, and the median of their paired ratios."""
    from vllm import LLM, SamplingParams

    assets = build_assets(folder / "assets", arithmetic_problems(64, seed=1), seed=1)
    engine = LLM(str(assets.model), dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=32, seed=0)
    sampling = SamplingParams(temperature=0.0, max_tokens=_TOKENS, ignore_eos=True)
    prompts = [f"What is {index} + {index}?" for index in range(_BATCH)]

    def generate() -> float:
        start = time.perf_counter()
        engine.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    generate()
    probed, silent = [], []
    for _ in range(_PAIRS):
        probed.append(generate())
        engine.collective_rpc(_silence)
        silent.append(generate())
        engine.collective_rpc(_restore)
    return {
        "with_probe_s": statistics.median(probed),
        "without_probe_s": statistics.median(silent),
        "median_paired_ratio": statistics.median(a / b for a, b in zip(probed, silent, strict=True)),
        "batch": _BATCH,
        "tokens_per_request": _TOKENS,
        "pairs": _PAIRS,
    }


def main() -> None:
    """Measure and write the record."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(CPU_ENVIRONMENT)
        os.environ.update({OBSERVER_DIR_VARIABLE: folder, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"})
        results = measure(Path(folder))
    write_result("instrument", results, command="python -m benchmarks.instrument")


if __name__ == "__main__":
    command.run(main, __doc__)
