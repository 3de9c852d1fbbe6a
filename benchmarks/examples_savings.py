"""What the elastic arm is expected to save in each example, on two GPU types at their list prices. All simulated.

    python -m benchmarks.examples_savings      # writes the record and the table in examples/README.md

Response lengths are synthetic, from the statistics named with each example. The stock arm is verl's synchronous trainer
with the recipe's tensor-parallel size; beside it stand the best static size, which a user could find by trial, and our
routing alone on stock's own engines. Turns and waits for tools are not modelled, and Megatron's training is priced as
FSDP's.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import write_result
from verl_rlhfless.policy.arm import Arm
from verl_rlhfless.policy.baselines.stock import StockSync
from verl_rlhfless.policy.gpus import GPUS
from verl_rlhfless.policy.routing import Routing
from verl_rlhfless.policy.shapes import MODELS
from verl_rlhfless.policy.transitions import RECIPES, LeaseTimes
from verl_rlhfless.sim.cell import Cell
from verl_rlhfless.sim.cluster import Cluster
from verl_rlhfless.sim.generate import TraceSpec, write_trace
from verl_rlhfless.sim.workload import load_steps

README = Path(__file__).parents[1] / "examples" / "README.md"
GPU_TYPES = ("L40S", "H100")
_GPUS_PER_NODE = 8


@dataclass(frozen=True, slots=True)
class Example:
    """One script of ``examples/``, as far as a simulation needs it.

    Attributes:
        name: Of the script.
        model: Shape.
        recipe: What the trainer computes.
        tp: Tensor-parallel size of the rollout.
        nodes: Of eight GPUs.
        lengths: Groups, responses of a group and caps are the recipe's; mean, tail and ICC are assumed.
    """

    name: str
    model: str
    recipe: str
    tp: int
    nodes: int
    lengths: TraceSpec


def _gsm8k(groups: int, n: int, cap: int, mean: float = 300.0, tail: float = 0.35) -> TraceSpec:
    """Return short answers: recorded GSM8K answers have CV 0.2 within a prompt and ICC 0.6."""
    return TraceSpec(3, 2, groups, n, mean, tail, icc=0.6, max_response_tokens=cap, prompt_tokens=100)


EXAMPLES = (
    Example("grpo_gsm8k_qwen2_5_3b", "qwen2.5-3b", "grpo", 1, 1, _gsm8k(512, 5, 1024)),
    Example("grpo_gsm8k_qwen2_5_7b", "qwen2.5-7b", "grpo", 2, 1, _gsm8k(512, 5, 1024)),
    Example("ppo_gsm8k_qwen2_5_7b", "qwen2.5-7b", "ppo", 2, 1, _gsm8k(1024, 1, 2048)),
    Example(  # a real verl run with a cap of 8,096: means of 1,385 to 4,661, CV 0.7, ICC 0.2
        "dapo_math_qwen2_5_7b",
        "qwen2.5-7b",
        "grpo",
        2,
        2,
        TraceSpec(3, 2, 512, 12, 2500.0, 0.8, icc=0.2, max_response_tokens=8192, prompt_tokens=150),
    ),
    Example("multiturn_gsm8k_qwen2_5_3b", "qwen2.5-3b", "grpo", 1, 1, _gsm8k(256, 16, 1024, mean=450.0, tail=0.5)),
    Example("megatron_gsm8k_qwen2_5_7b", "qwen2.5-7b", "grpo", 2, 1, _gsm8k(1024, 5, 2048)),
)


def cell_of(example: Example, gpu: str, folder: Path) -> Cell:
    """Return the simulated world of an example on one GPU type."""
    path = folder / f"{example.name}.jsonl.gz"
    if not path.exists():
        write_trace(example.lengths, path)
    price = GPUS[gpu].usd_per_h
    cluster = Cluster(f"{gpu}-{example.nodes * _GPUS_PER_NODE}", GPUS[gpu], example.nodes, _GPUS_PER_NODE, price)
    return Cell(load_steps(path), cluster, MODELS[example.model], LeaseTimes(), recipe=RECIPES[example.recipe])


def savings(example: Example, gpu: str, folder: Path) -> dict[str, Any]:
    """Return seconds and dollars of a mean step for stock, the best static size, ours, and our routing alone."""
    cell = cell_of(example, gpu, folder)
    arms: dict[str, Arm] = {
        "stock": StockSync(example.tp),
        "best_static": cell.arm("stock_sync_best_tp"),
        "ours": cell.arm("ours"),
        "resident": Routing((example.tp,) * (cell.cluster.num_gpus // example.tp), migration="cut_and_migrate"),
    }
    row: dict[str, Any] = {"example": example.name, "gpu": gpu, "gpus": cell.cluster.num_gpus}
    row |= {"usd_per_gpu_h": cell.cluster.usd_per_gpu_h, "best_static_tp": cell.best_tp}
    for name, arm in arms.items():
        steps = cell.run(arm).steps
        row[f"{name}_step_s"] = round(float(np.mean([step.step_s for step in steps])), 2)
        row[f"{name}_usd_per_step"] = round(float(np.mean([step.gpu_lease_usd for step in steps])), 5)
    for other in ("stock", "best_static"):
        row[f"saving_to_{other}"] = round(1 - row["ours_usd_per_step"] / row[f"{other}_usd_per_step"], 3)
        row[f"time_to_{other}"] = round(row["ours_step_s"] / row[f"{other}_step_s"] - 1, 3)
    row["resident_to_stock"] = round(row["resident_step_s"] / row["stock_step_s"] - 1, 3)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    columns = ("Example", "GPUs, list price", "Stock: step, cost", "Ours: step, cost", "Ours to stock")
    lines = [
        f"| {' | '.join(columns)} | To the best static size | Resident to stock |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        price = f"{row['gpus']} x {row['gpu']}, ${row['usd_per_gpu_h']:.2f}/h"
        stock, ours = (f"{row[f'{arm}_step_s']:.1f} s, ${row[f'{arm}_usd_per_step']:.3f}" for arm in ("stock", "ours"))
        to_stock, to_static = (
            f"{_percent(-row[f'saving_to_{arm}'])} cost, {_percent(row[f'time_to_{arm}'])} time"
            for arm in ("stock", "best_static")
        )
        resident = _percent(row["resident_to_stock"])
        lines.append(f"| `{row['example']}` | {price} | {stock} | {ours} | {to_stock} | {to_static} | {resident} |")
    return "\n".join(lines)


def _percent(share: float) -> str:
    percent = round(100 * share)
    return f"{percent:+d}%" if percent else "0%"


def main() -> None:
    """Simulate every example, write the record, and print the table into the README of the examples."""
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for example in EXAMPLES:
            for gpu in GPU_TYPES:
                rows.append(savings(example, gpu, Path(folder)))
                print(json.dumps(rows[-1]), flush=True)
    write_result("examples_savings", {"rows": rows}, command="python -m benchmarks.examples_savings", kind="simulated")
    begin, end = "<!-- savings:begin -->", "<!-- savings:end -->"
    text = README.read_text(encoding="utf-8")
    new = re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{table(rows)}\n{end}", text, flags=re.DOTALL)
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
