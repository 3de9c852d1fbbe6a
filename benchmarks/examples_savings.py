"""What the elastic arm is expected to save in each example, on two GPU types at their list prices. All simulated.

    python -m benchmarks.examples_savings      # writes the record and the table in examples/README.md

The arms are those of the scripts: ``stock``, verl's synchronous trainer with the recipe's tensor-parallel size;
``elastic``, which leases replicas in the steps for which that pays and runs them beside the trainer in the others;
``leased`` (in the record only), the same with ``rlhfless.pool.share_trainer=never``; ``resident``, our routing on
stock's own engines. Beside them stands the best static size, which a user could find by trial. Response lengths are
synthetic, from the statistics named with each example. Turns, waits for tools and fused inference are not modelled, and
Megatron's training is priced as FSDP's.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import command
from benchmarks.record import write_result
from verl_rlhfless.policy.arm import Arm
from verl_rlhfless.policy.baselines.stock import StockSync
from verl_rlhfless.policy.gpus import GPUS
from verl_rlhfless.policy.ours import Ours
from verl_rlhfless.policy.routing import Routing
from verl_rlhfless.policy.shapes import MODELS
from verl_rlhfless.policy.snapshot import PoolSnapshot
from verl_rlhfless.policy.transitions import RECIPES, LeaseTimes
from verl_rlhfless.sim.cell import Cell
from verl_rlhfless.sim.cluster import Cluster
from verl_rlhfless.sim.generate import TraceSpec, write_trace
from verl_rlhfless.sim.run import ArmRun
from verl_rlhfless.sim.workload import load_steps

README = Path(__file__).parents[1] / "examples" / "README.md"
GPU_TYPES = ("L40S", "H100")
OTHERS = {"elastic": "Elastic", "resident": "Resident", "best_static": "Best static size"}
"""Arms that are held against stock, with their titles."""
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
        kept_gpus: GPUs of an elastic trainer that keeps its lease during the rollout; 0 = it leaves all of them.
        lengths: Groups, responses of a group and caps are the recipe's; mean, tail and ICC are assumed.
    """

    name: str
    model: str
    recipe: str
    tp: int
    nodes: int
    lengths: TraceSpec
    kept_gpus: int = 0


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
    Example("megatron_gsm8k_qwen2_5_7b", "qwen2.5-7b", "grpo", 2, 1, _gsm8k(1024, 5, 2048), kept_gpus=4),
)


def cell_of(example: Example, gpu: str, folder: Path) -> Cell:
    """Return the simulated world of an example on one GPU type."""
    path = folder / f"{example.name}.jsonl.gz"
    if not path.exists():
        write_trace(example.lengths, path)
    price = GPUS[gpu].usd_per_h
    cluster = Cluster(f"{gpu}-{example.nodes * _GPUS_PER_NODE}", GPUS[gpu], example.nodes, _GPUS_PER_NODE, price)
    return Cell(load_steps(path), cluster, MODELS[example.model], LeaseTimes(), recipe=RECIPES[example.recipe])


def elastic_pool(example: Example, cell: Cell) -> PoolSnapshot:
    """Return what the elastic arm leases; a trainer that could leave may also stay and share its lease."""
    pool = replace(cell.pool, shares_engines=True)
    if not example.kept_gpus:
        return pool
    trainer = replace(pool.trainer, num_gpus=example.kept_gpus)
    replica_gpus = pool.num_gpus - example.kept_gpus
    return replace(pool, num_gpus=replica_gpus, trainer=trainer, keeps_trainer=True, has_resident=False)


def savings(example: Example, gpu: str, folder: Path) -> dict[str, Any]:
    """Return seconds and dollars of a mean step of each arm, and both relative to stock's."""
    cell = cell_of(example, gpu, folder)
    num_engines = cell.cluster.num_gpus // example.tp
    arms: dict[str, tuple[Arm, PoolSnapshot]] = {
        "stock": (StockSync(example.tp), cell.pool),
        "best_static": (cell.arm("stock_sync_best_tp"), cell.pool),
        "elastic": (Ours(can_fuse=False), elastic_pool(example, cell)),
        "leased": (Ours(can_fuse=False), replace(elastic_pool(example, cell), has_resident=False)),
        "resident": (Routing((example.tp,) * num_engines, migration="cut_and_migrate"), cell.pool),
    }
    row: dict[str, Any] = {"example": example.name, "gpu": gpu, "gpus": cell.cluster.num_gpus}
    row |= {"usd_per_gpu_h": cell.cluster.usd_per_gpu_h, "best_static_tp": cell.best_tp}
    for name, (arm, pool) in arms.items():
        steps = ArmRun(arm, cell.cluster, pool, cell.data).run().steps
        row[f"{name}_step_s"] = round(float(np.mean([step.step_s for step in steps])), 2)
        row[f"{name}_usd_per_step"] = round(float(np.mean([step.gpu_lease_usd for step in steps])), 5)
    for name in (*OTHERS, "leased"):
        for figure in ("step_s", "usd_per_step"):
            row[f"{name}_{figure}_to_stock"] = round(row[f"{name}_{figure}"] / row[f"stock_{figure}"] - 1, 3)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    titles = (
        "Example",
        "GPUs, list price",
        "Stock: step, cost",
        *(f"{title}: time, cost" for title in OTHERS.values()),
    )
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        price = f"{row['gpus']} x {row['gpu']}, ${row['usd_per_gpu_h']:.2f}/h"
        stock = f"{row['stock_step_s']:.1f} s, ${row['stock_usd_per_step']:.3f}"
        others = [
            f"{_percent(row[f'{arm}_step_s_to_stock'])}, {_percent(row[f'{arm}_usd_per_step_to_stock'])}"
            for arm in OTHERS
        ]
        name = f"`{row['example']}`"
        lines.append(f"| {' | '.join((name, price, stock, *others))} |")
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
    command.run(main, __doc__)
