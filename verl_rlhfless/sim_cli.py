"""``rlhfless simulate`` and ``rlhfless trace``: thin shells around ``sim``.

``register`` adds them to the command line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from verl_rlhfless.errors import ConfigError, DataError, UnsupportedError, why
from verl_rlhfless.outputs import check_file, writing
from verl_rlhfless.schema import what_to_do

if TYPE_CHECKING:
    from verl_rlhfless.policy.perf import Efficiencies
    from verl_rlhfless.sim.cell import Cell

_PICTURES = (".png", ".pdf", ".svg")

trace_app = typer.Typer(no_args_is_help=True, help="Generate, record and inspect length traces.")


def split_names(text: str) -> tuple[str, ...]:
    """Return the names that an option lists with commas."""
    return tuple(name.strip() for name in text.split(","))


def register(app: typer.Typer) -> None:
    """Add ``simulate`` and ``trace`` to ``app``."""
    app.command()(simulate)
    app.add_typer(trace_app, name="trace")


def simulate(
    traces: Annotated[list[Path] | None, typer.Argument(help="Length traces (rlhfless-trace/1).")] = None,
    cluster: Annotated[str, typer.Option(help="Cluster name or JSON file; several with commas.")] = "l40s-16",
    model: Annotated[str, typer.Option(help="Model name or config.json; several with commas.")] = "qwen2.5-7b",
    arms: Annotated[str, typer.Option(help="Comma-separated arms, or 'all'.")] = "stock_sync,stock_sync_best_tp,ours",
    seed: Annotated[int, typer.Option(help="Shifts the availability trace of preemptible nodes.")] = 0,
    wake_s: Annotated[float, typer.Option(help="Seconds in which a parked engine wakes, weights not included.")] = 2.0,
    cold_start_s: Annotated[float, typer.Option(help="Seconds in which a new engine starts.")] = 60.0,
    cost_weight: Annotated[float, typer.Option(help="0 = only time, 1 = only cost.")] = 0.5,
    parked_charge: Annotated[float, typer.Option(help="Share of the price that parked engines' GPUs cost.")] = 0.0,
    recipe: Annotated[
        str, typer.Option(help="What the trainer computes: grpo, ppo; -rm = with a reward model.")
    ] = "grpo",
    kv_transfer: Annotated[bool, typer.Option(help="Moved samples may bring their keys and values along.")] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="Efficiencies measured on the cluster's GPU type (python -m benchmarks.gpu).")
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write the record here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture here (.png, .pdf, .svg).")] = None,
    show: Annotated[bool, typer.Option("--list", help="List clusters, models, recipes, arms and GPU types.")] = False,
) -> None:
    """Simulate arms over length traces and compare them in time and money (every figure is simulated)."""
    from verl_rlhfless.policy.plan import Goal
    from verl_rlhfless.policy.transitions import RECIPES, LeaseTimes
    from verl_rlhfless.sim.cell import ARMS, Cell, load_model
    from verl_rlhfless.sim.cluster import load_cluster
    from verl_rlhfless.sim.report import FORMAT, LEGEND
    from verl_rlhfless.sim.workload import load_steps

    if show:
        typer.echo(_known())
        return
    if not traces:
        raise ConfigError("TRACE", "", "at least one trace is needed", "Give a file, or `rlhfless trace generate` one.")
    _check_range("--wake-s", wake_s, 1e6)
    _check_range("--cold-start-s", cold_start_s, 1e6)
    _check_range("--cost-weight", cost_weight, 1)
    _check_range("--parked-charge", parked_charge, 1)
    _check_range("--seed", seed, 2**63 - 1)
    names = list(ARMS) if arms == "all" else list(dict.fromkeys(["stock_sync_best_tp", *split_names(arms)]))
    for name in names:
        _check_name("--arms", name, ARMS)
    _check_name("--recipe", recipe, RECIPES)
    inputs = [*traces, *map(Path, (*split_names(cluster), *split_names(model)))]
    inputs += [] if calibration is None else [calibration]
    if out is not None:
        check_file("--json", out, inputs)
        inputs.append(out)
    if plot is not None:
        check_file("--plot", plot, inputs)
    draw = None if plot is None else _plotter(plot)
    shapes = [load_model(name) for name in split_names(model)]
    clusters = [load_cluster(name) for name in split_names(cluster)]
    efficiencies = _read_efficiencies(calibration, {one.gpu.name for one in clusters})
    goal, times = Goal(cost_weight=cost_weight), LeaseTimes(wake_s=wake_s, cold_start_s=cold_start_s)
    cells = []
    for (path, data), one, shape in product([(path, load_steps(path)) for path in traces], clusters, shapes):
        one = replace(one, has_kv_transfer=one.has_kv_transfer or kv_transfer)
        cell = Cell(data, one, shape, times, goal, parked_charge, seed, RECIPES[recipe], efficiencies)
        labels = {"trace": str(path), "cluster": one.name, "model": shape.name, "seed": seed, "recipe": recipe}
        labels |= {"calibration": None if calibration is None else str(calibration)}
        cell.check()
        cells.append((cell, labels))
    runs = [_run(cell, sorted(names, key=list(ARMS).index), labels) for cell, labels in cells]
    typer.echo(LEGEND)
    if out is not None:
        text = json.dumps({"format": FORMAT, "runs": runs}, indent=1, sort_keys=True, allow_nan=False)
        with writing("--json", out):
            out.write_text(text + "\n", encoding="utf-8")
    if plot is not None and draw is not None:
        with writing("--plot", plot):
            draw(runs, plot)


def _run(cell: Cell, names: list[str], labels: dict[str, Any]) -> dict[str, Any]:
    """Run one cell, print its table and return its record."""
    from verl_rlhfless.sim.report import cell_record, settings, table

    run = cell_record(cell, {name: cell.run(cell.arm(name)) for name in names}, {**labels, **settings(cell)})
    typer.echo(table(run) + "\n")
    return run


def _known() -> str:
    from verl_rlhfless.policy.gpus import GPUS
    from verl_rlhfless.policy.shapes import MODELS
    from verl_rlhfless.policy.transitions import RECIPES
    from verl_rlhfless.sim.cell import DESCRIPTIONS
    from verl_rlhfless.sim.cluster import CLUSTERS

    rows: list[tuple[str, Iterable[str]]] = [
        ("clusters", CLUSTERS),
        ("models", MODELS),
        ("recipes", RECIPES),
        ("GPU types", GPUS),
    ]
    names = [f"{name}: {', '.join(values)}" for name, values in rows]
    return "\n".join([*names, "arms:", *(f"  {name:<20}{text}" for name, text in DESCRIPTIONS.items())])


def _read_efficiencies(path: Path | None, gpus: set[str]) -> Efficiencies:
    """Return the efficiencies of a calibration file, which holds for one type of GPU; the shipped ones without it."""
    from verl_rlhfless.policy.calibrate import parse_calibration
    from verl_rlhfless.policy.perf import Efficiencies

    if path is None:
        return Efficiencies()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read as JSON: {why(error)}. Write one: python -m benchmarks.gpu."
        ) from error
    measured = parse_calibration(values, str(path))
    if gpus != {measured.gpu}:
        rule = f"was measured on {measured.gpu}, the cluster has {', '.join(sorted(gpus))}"
        raise ConfigError("--calibration", str(path), rule, "Measure on that type, or choose another cluster.")
    return measured.efficiencies


def _check_range(key: str, value: float, most: float) -> None:
    if not 0 <= value <= most:
        raise ConfigError(key, value, f"must be from 0 to {most:g}", "Correct it.")


def _check_name(key: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ConfigError(key, name, f"must be among {', '.join(known)}", what_to_do(name, known, "Choose from these."))


def _plotter(path: Path) -> Callable[[list[dict[str, Any]], Path], None]:
    if path.suffix not in _PICTURES:
        raise ConfigError("--plot", str(path), f"must end in {', '.join(_PICTURES)}", "Rename it.")
    try:
        from verl_rlhfless.sim.plots import plot_cells
    except ImportError as error:
        raise UnsupportedError(f"--plot={path}: matplotlib is not installed. Install it, or use --json.") from error
    return plot_cells


@trace_app.command("generate")
def generate(
    path: Annotated[Path, typer.Argument(help="File to write (.jsonl or .jsonl.gz).")],
    mean: Annotated[float, typer.Option(help="Mean response tokens of the first step.")] = 1500.0,
    tail: Annotated[float, typer.Option(help="Standard deviation of the log length.")] = 1.0,
    icc: Annotated[float, typer.Option(help="Share of the log variance between prompts.")] = 0.3,
    drift: Annotated[float, typer.Option(help="Growth of the mean from step to step (factor).")] = 1.0,
    epochs: Annotated[int, typer.Option(help="Visits of each prompt.")] = 2,
    steps_per_epoch: Annotated[int, typer.Option(help="Steps of an epoch.")] = 4,
    groups: Annotated[int, typer.Option(help="Prompts of a step.")] = 128,
    n: Annotated[int, typer.Option("--n", help="Responses per prompt.")] = 8,
    max_response_tokens: Annotated[int, typer.Option(help="Longest response: longer ones are cut.")] = 32768,
    prompt_tokens: Annotated[int, typer.Option(help="Mean prompt tokens.")] = 250,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
) -> None:
    """Write a synthetic trace."""
    from verl_rlhfless.sim.generate import TraceSpec, write_trace

    check_file("PATH", path)
    spec = TraceSpec(
        steps_per_epoch=steps_per_epoch,
        epochs=epochs,
        groups=groups,
        n=n,
        mean=mean,
        tail=tail,
        icc=icc,
        drift=drift,
        max_response_tokens=max_response_tokens,
        prompt_tokens=prompt_tokens,
        seed=seed,
    )
    with writing("PATH", path):
        mean_tokens = write_trace(spec, path)
    typer.echo(
        f"wrote {path}: {spec.num_steps} steps, {spec.num_samples} samples, mean length {mean_tokens:.0f} tokens after "
        f"the cap of {spec.max_response_tokens}"
    )


@trace_app.command("stats")
def stats(path: Annotated[Path, typer.Argument(help="A length trace.")]) -> None:
    """Print the length statistics of each step."""
    from verl_rlhfless.sim.generate import trace_stats

    rows = trace_stats(path)
    typer.echo("".join(f"{key:>11}" for key in rows[0]))
    for row in rows:
        typer.echo(
            "".join(
                f"{value:>11.2f}" if key in ("cv_within", "icc") else f"{value:>11.0f}" for key, value in row.items()
            )
        )
