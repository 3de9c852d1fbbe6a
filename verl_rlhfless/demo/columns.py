"""The three clocks under which the demo compares its arms, and one table over all of them.

A host without GPUs can stand for several only if every iteration takes as long as on a declared device; what a start
takes is then either the wake of a parked engine, or a real cold start of this host.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from verl_rlhfless.ab.arms import STOCK, Arm
from verl_rlhfless.live.pacing import PaceModel
from verl_rlhfless.report.table import WIDTH

PACE = PaceModel(
    base_ms=120.0,
    per_request_ms=4.0,
    per_prefill_token_ms=0.4,
    per_context_token_us=2.0,
    per_inference_token_us=400.0,
    per_update_token_us=1200.0,
)
"""Ratios of a 7B model on an L40S (22 ms for the weights, 0.07 ms a prompt token, an update of three times its forward
pass), slowed down until two cores can follow four of them."""

MAX_HOST_CPU = 70.0
"""Mean percent of all cores during a rollout, above which the host was late, not the device.

An arm is void when its median step exceeds it: a step that starts an engine on the host's own cores may."""

FORMAT = "rlhfless-columns/1"

WARM_UP = 1
"""Steps that no median holds: imports, and a length model that knows nothing."""


@dataclass(frozen=True, slots=True)
class Column:
    """One clock.

    Attributes:
        name: As in ``--columns``.
        title: What its figures mean.
        pace: The declared device; ``None`` = the host itself.
        overrides: Appended to the arms that lease their replicas.
    """

    name: str
    title: str
    pace: PaceModel | None = None
    overrides: tuple[str, ...] = ()

    def applied_to(self, arm: Arm) -> Arm:
        """Return the arm as this column runs it."""
        return arm.with_overrides(*self.overrides) if arm.pulls_weights else arm


COLUMNS: Mapping[str, Column] = {
    column.name: column
    for column in (
        Column("unpaced", "this host, as fast as it is"),
        Column("parked", "paced, replicas parked between steps", PACE, ("rlhfless.pool.park=always",)),
        Column("cold", "paced, cold starts", PACE, ("rlhfless.pool.park=never", "rlhfless.pool.warm_servers=0")),
    )
}


@dataclass(frozen=True, slots=True)
class Summary:
    """One arm in one column: medians over the steps after the warm-up.

    Attributes:
        column: Name of the column.
        arm: Name of the arm.
        step_s: Seconds of a step.
        gpu_s: GPU-seconds leased in a step.
        startup_gpu_s: Of these, until a replica or the trainer was usable.
        step_over_stock: ``step_s`` over stock's in the same column; ``None`` without a stock arm.
        gpu_over_stock: ``gpu_s`` over stock's.
        host_cpu_percent: Load of all cores during the rollout.
        is_void: Whether a paced arm kept the host too busy to be believed.
    """

    column: str
    arm: str
    step_s: float
    gpu_s: float
    startup_gpu_s: float
    step_over_stock: float | None
    gpu_over_stock: float | None
    host_cpu_percent: float | None
    is_void: bool

    @property
    def objective(self) -> float | None:
        """Half the relative time and half the relative cost; stock has 1."""
        if self.step_over_stock is None or self.gpu_over_stock is None:
            return None
        return (self.step_over_stock + self.gpu_over_stock) / 2


def summarise(records: Mapping[str, Mapping[str, Any]]) -> list[Summary]:
    """Return every arm of every column.

    Args:
        records: ``rlhfless-ab/1`` by name of the column. An arm without steps after the warm-up has no summary.
    """
    return [summary for name, record in records.items() for summary in _of_column(COLUMNS[name], record["arms"])]


def as_json(summaries: Sequence[Summary], made_by: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summaries as ``columns.json`` holds them; ``made_by`` says with what they were measured."""
    return {"format": FORMAT, **made_by, "arms": [asdict(summary) for summary in summaries]}


def _of_column(column: Column, arms: Mapping[str, Any]) -> list[Summary]:
    medians = {name: _medians(arm["steps"][WARM_UP:]) for name, arm in arms.items()}
    stock = medians.get(STOCK)
    summaries = []
    for name, figures in medians.items():
        if figures is None:
            continue
        step_s, gpu_s, startup_gpu_s = figures
        loads = [step["host_cpu_percent"] for step in arms[name]["steps"][WARM_UP:]]
        load = None if None in loads else statistics.median(loads)
        summaries.append(
            Summary(
                column=column.name,
                arm=name,
                step_s=step_s,
                gpu_s=gpu_s,
                startup_gpu_s=startup_gpu_s,
                step_over_stock=step_s / stock[0] if stock else None,
                gpu_over_stock=gpu_s / stock[1] if stock else None,
                host_cpu_percent=load,
                is_void=column.pace is not None and (load is None or load > MAX_HOST_CPU),
            )
        )
    return summaries


def _medians(steps: list[Mapping[str, Any]]) -> tuple[float, float, float] | None:
    keys = ("step_s", "gpu_s_allocated", "gpu_s_startup")
    if not steps or any(step[key] is None for step in steps for key in keys):
        return None
    step_s, gpu_s, startup_gpu_s = (statistics.median(step[key] for step in steps) for key in keys)
    return step_s, gpu_s, startup_gpu_s


def render_columns(summaries: list[Summary], width: int = WIDTH) -> str:
    """Return the summaries as plain text of at most ``width`` columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    for title in ("column", "arm"):
        table.add_column(title, no_wrap=True)
    for title in ("step\ns", "leased\nGPU-s", "start-up\nGPU-s", "step /\nstock", "GPU-s /\nstock", "objec-\ntive"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("host\nCPU", justify="right", no_wrap=True)
    for one in summaries:
        table.add_row(
            one.column,
            one.arm,
            f"{one.step_s:.1f}",
            f"{one.gpu_s:.1f}",
            f"{one.startup_gpu_s:.1f}",
            *("-" if ratio is None else f"{ratio:.2f}" for ratio in _ratios(one)),
            "-" if one.host_cpu_percent is None else f"{one.host_cpu_percent:.0f} %",
            end_section=one is summaries[-1] or summaries[summaries.index(one) + 1].column != one.column,
        )
    shown = [COLUMNS[name] for name in dict.fromkeys(one.column for one in summaries)]
    legend = [f"{column.name}: {column.title}." for column in shown]
    void = [
        f"{one.arm} in {one.column} is void: the host was busy above {MAX_HOST_CPU:g} %."
        for one in summaries
        if one.is_void
    ]
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
        console.print("\n".join([f"Medians over the steps after the first {WARM_UP}.", *legend, *void]))
    return capture.get()


def _ratios(one: Summary) -> tuple[float | None, ...]:
    return one.step_over_stock, one.gpu_over_stock, one.objective
