"""The comparison as a table for a terminal of 120 columns: every step of every arm, the totals, the guards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

WIDTH = 120
_UNKNOWN = "-"
_GIB = 2**30
_WHOLE_FROM_S = 10_000  # a tenth of a second is noise in a total of hours, and columns are dear

_Format = Callable[[Any], str]


def _seconds(value: float) -> str:
    return f"{value:,.1f}" if abs(value) < _WHOLE_FROM_S else f"{value:,.0f}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


_COLUMNS: tuple[tuple[str, str, _Format], ...] = (
    ("step\ns", "step_s", _seconds),
    ("gen\ns", "gen_s", _seconds),
    ("leased\nGPU-s", "gpu_s_allocated", _seconds),
    ("busy\nGPU-s", "gpu_s_busy", _seconds),
    ("idle\nGPU-s", "gpu_s_idle", _seconds),
    ("start-up\nGPU-s", "gpu_s_startup", _seconds),
    ("parked\nGPU-s", "gpu_s_parked", _seconds),
    ("max\nGPUs", "max_gpus", _count),
    ("repli-\ncas", "num_replicas", _count),
    ("sam-\nples", "num_samples", _count),
    ("resp.\ntokens", "response_tokens", _count),
    ("mean\nreward", "reward_mean", "{:.3f}".format),
    ("prob.\ndiff", "rollout_probs_diff_max", "{:.1e}".format),
)


def comparison(record: Mapping[str, Any]) -> RenderableType:
    """Return the whole of an ``rlhfless-ab/1`` record for a rich console."""
    arms = record["arms"]
    hosts = [Text(_host_line(name, arm)) for name, arm in arms.items()]
    failed = [Text(f"{name}: FAILED: {why}", "bold red") for name, why in record.get("failed", {}).items()]
    legend = _LEGEND + (_ASYNCHRONOUS if any(map(is_asynchronous, arms.values())) else "")
    return Group(
        _steps_table(arms),
        Text(),
        Text(legend, style="dim"),
        Text(),
        *hosts,
        *failed,
        Text(),
        _guards_table(record["guards"]),
    )


def is_asynchronous(arm: Mapping[str, Any]) -> bool:
    """Return whether an arm of the record trains on older samples: another algorithm than the others'."""
    return bool(arm.get("is_asynchronous"))  # records of the first versions do not say


_LEGEND = (
    "leased = busy + idle + start-up. The total goes from the first grant to the last release, so it exceeds the sum\n"
    "of the steps; its times and its reward are means over the steps. parked: engines asleep without a lease, at no\n"
    "cost; on a CPU they free nothing by it. - = not known."
)

_ASYNCHRONOUS = "\n* = asynchronous: trains on samples of older weights, which is another algorithm."


def render(record: Mapping[str, Any], width: int = WIDTH) -> str:
    """Return the record as plain text of at most ``width`` columns."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(comparison(record))
    return capture.get()


def _steps_table(arms: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("arm", no_wrap=True)
    table.add_column("step", justify="right", no_wrap=True)
    for title, _, _ in _COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    for name, arm in arms.items():
        name = f"{name}*" if is_asynchronous(arm) else name
        for step in arm["steps"]:
            table.add_row(name, str(step["step"]), *_cells(step))
        table.add_row(name, "total", *_cells(arm["total"]), style="bold", end_section=True)
    return table


def _cells(figures: Mapping[str, Any]) -> Iterable[str]:
    for _, key, as_text in _COLUMNS:
        value = figures[key]
        yield _UNKNOWN if value is None else as_text(value)


def _host_line(name: str, arm: Mapping[str, Any]) -> str:
    wall_s, host = arm["total"]["wall_s"], arm["host"]
    if wall_s is None or host is None:
        return f"{name}: the observer recorded no run"
    return (
        f"{name}: {wall_s:.0f} s in all, host CPU {host['cpu_percent']:.0f} %, memory peak "
        f"{host['memory_peak_bytes'] / _GIB:.1f} GiB, observer {host['observer_cpu_percent']:.1f} % of a core"
    )


def _guards_table(guards: Iterable[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("guard", no_wrap=True)
    for title in ("value", "limit"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict")
    for guard in guards:
        verdict = Text("ok", "green") if guard["ok"] else Text("FAILED", "bold red")
        table.add_row(guard["name"], _figure(guard["value"]), _figure(guard["limit"]), verdict)
    return table


def _figure(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.3g}"
