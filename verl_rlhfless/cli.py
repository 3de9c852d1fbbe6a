"""``rlhfless``: the command line. Each command is a thin shell around one module; errors are one line, exit code 1."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from verl_rlhfless import __version__
from verl_rlhfless.ab_cli import register as register_comparison
from verl_rlhfless.errors import RlhflessError
from verl_rlhfless.sim_cli import register as register_simulator
from verl_rlhfless.sim_cli import trace_app

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Elastic, serverless RLHF on verl.")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Elastic, serverless RLHF on verl."""


@app.command()
def doctor() -> None:
    """Check versions, plugin registration, Ray, GPUs and memory; exit 1 with what to do."""
    from verl_rlhfless.doctor import run

    raise typer.Exit(run())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for ab.json, logs and records.")],
    data: Annotated[Path | None, typer.Option(help="GSM8K-style JSON Lines (default: arithmetic of its own).")] = None,
    steps: Annotated[int, typer.Option(help="Training steps of each arm.")] = 7,
    seed: Annotated[int, typer.Option(help="Seed of model, data and sampling.")] = 1,
    arms: Annotated[str, typer.Option(help="Comma-separated: stock, elastic, resident.")] = "stock,elastic",
    columns: Annotated[str, typer.Option(help="Comma-separated clocks: unpaced, parked, cold.")] = "unpaced",
    ablate: Annotated[bool, typer.Option("--ablate", help="Also run each arm without each part of ours.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Replay the lengths of this trace, scaled to fit.")] = None,
) -> None:
    """Train a tiny model with stock verl and with elastic replicas, and compare them; exit 1 if a guard fails."""
    from verl_rlhfless.demo.run import DemoOptions, run_demo

    options = DemoOptions(
        out=out,
        data=data,
        steps=steps,
        seed=seed,
        arms=tuple(arms.split(",")),
        columns=tuple(columns.split(",")),
        ablate=ablate,
        trace=trace,
    )
    raise typer.Exit(run_demo(options))


register_comparison(app, trace_app)
register_simulator(app)


def main() -> None:
    """Run the command line."""
    try:
        app()
    except RlhflessError as error:
        print(f"rlhfless: error: {error}", file=sys.stderr)
        sys.exit(1)
