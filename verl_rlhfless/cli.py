"""``rlhfless``: the command line. Each command is a thin shell around one module.

Exit code: 0 = all well, 1 = a check, an arm or a guard failed, 2 = bad input, or a file that cannot be read or written,
told in one line.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from verl_rlhfless import __version__
from verl_rlhfless.ab_cli import register as register_comparison
from verl_rlhfless.errors import RlhflessError
from verl_rlhfless.sim_cli import register as register_simulator
from verl_rlhfless.sim_cli import split_names, trace_app

BAD_INPUT = 2


class _Commands(TyperGroup):
    """Ends a command on bad input in one line."""

    def invoke(self, ctx: Any) -> Any:  # of a Click that Typer may have a copy of
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of a pipe left, which is no error
            raise
        except (RlhflessError, OSError) as error:
            print(f"rlhfless: error: {' '.join(str(error).split())}", file=sys.stderr)
            raise typer.Exit(BAD_INPUT) from None


app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, help="Elastic, serverless RLHF on verl.")


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
    """Train a tiny model with stock verl and with elastic replicas, and compare them.

    Exit code: 0 = all well, 1 = an arm or a guard failed, 2 = bad input.
    """
    from verl_rlhfless.demo.run import DemoOptions, run_demo

    options = DemoOptions(
        out=out,
        data=data,
        steps=steps,
        seed=seed,
        arms=split_names(arms),
        columns=split_names(columns),
        ablate=ablate,
        trace=trace,
    )
    raise typer.Exit(run_demo(options))


register_comparison(app, trace_app)
register_simulator(app)


def main() -> None:
    """Run the command line."""
    app()
