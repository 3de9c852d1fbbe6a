"""How the requests of a step were served: rollout time, prompt tokens computed, migrations, and what routing took."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from verl_rlhfless.report.observed import HostSample, Observed
from verl_rlhfless.report.record import RequestUse
from verl_rlhfless.report.table import WIDTH
from verl_rlhfless.types import Window

_COLUMNS = (
    ("rollout\ns", "rollout_s", "{:,.2f}"),
    ("gen\ns", "gen_s", "{:,.2f}"),
    ("prefill\ntokens", "prefill_tokens", "{:,.0f}"),
    ("least\nprefill", "prefill_tokens_min", "{:,.0f}"),
    ("prefill /\nleast", "prefill_ratio", "{:.2f}"),
    ("migra-\ntions", "num_migrations", "{:,.0f}"),
    ("router\nCPU s", "router_cpu_s", "{:.2f}"),
    ("host\nCPU %", "host_cpu_percent", "{:.0f}"),
    ("prob.\ndiff", "rollout_probs_diff_max", "{:.1e}"),
)


def request_use(observed: Observed, step: int, timer: Window) -> RequestUse | None:
    """Return how requests were served in a step; ``None`` when no engine worked in it."""
    spans = [span for engine in observed.engines for span in engine.busy if timer.start_s <= span.start_s < timer.end_s]
    if not spans:
        return None
    window = Window(timer.start_s, max(span.end_s for span in spans))
    told: Mapping[str, Any] = next(
        (event for event in observed.events if event["event"] == "rolled_out" and event["step"] == step), {}
    )
    return RequestUse(
        rollout_s=window.end_s - window.start_s,
        prefill_tokens=sum(span.prefill_tokens for span in spans),
        num_migrations=told.get("num_migrations"),
        router_cpu_s=told.get("router_cpu_s"),
        host_cpu_percent=host_cpu_percent(observed.host, window),
    )


def host_cpu_percent(samples: Sequence[HostSample], window: Window) -> float | None:
    """Return the mean CPU use in a window; a sample holds for the time since the sample before it."""
    seconds = percent_s = 0.0
    for before, after in itertools.pairwise(samples):
        part_s = min(after.t, window.end_s) - max(before.t, window.start_s)
        if part_s > 0:
            seconds += part_s
            percent_s += part_s * after.cpu_percent
    return percent_s / seconds if seconds else None


def render_requests(arms: Mapping[str, Mapping[str, Any]], least: Mapping[int, int]) -> str:
    """Return a table of all arms as plain text.

    Args:
        arms: The arms of an ``rlhfless-ab/1`` record.
        least: Least prompt tokens of each step.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("arm", no_wrap=True)
    for title in ("step", *(title for title, _, _ in _COLUMNS)):
        table.add_column(title, justify="right", no_wrap=True)
    for name, arm in arms.items():
        for number, step in enumerate(arm["steps"]):
            is_last = number == len(arm["steps"]) - 1
            table.add_row(name, str(step["step"]), *_cells(_with_least(step, least)), end_section=is_last)
    console = Console(width=WIDTH, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def _with_least(step: Mapping[str, Any], least: Mapping[int, int]) -> dict[str, Any]:
    fewest, computed = least.get(step["step"]), step.get("prefill_tokens")
    ratio = computed / fewest if fewest and computed else None
    return {**step, "prefill_tokens_min": fewest, "prefill_ratio": ratio}


def _cells(figures: Mapping[str, Any]) -> Iterable[str]:
    for _, key, form in _COLUMNS:
        value = figures.get(key)
        yield "-" if value is None else form.format(value)
