"""``rlhfless``: the command line. Each command is a thin shell around one module.

Exit code: 0 = all well, 1 = a check, an arm or a guard failed, 2 = bad input, or a file that cannot be read or written,
told in one line.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from verl_rlhfless import __version__
from verl_rlhfless.ab_cli import register as register_comparison
from verl_rlhfless.errors import RlhflessError, why
from verl_rlhfless.sim_cli import register as register_simulator
from verl_rlhfless.sim_cli import split_names, trace_app

BAD_INPUT = 2


# Of Click, or of the copy of it that Typer may have: a wrong option, a missing argument, an unknown command.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]


class _Commands(TyperGroup):
    """Ends a command on bad input in one line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _one_line():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _one_line():
            return super().invoke(ctx)


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # the reader of a pipe left, which is no error
        raise
    except _USAGE_ERROR as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # prints the help
            raise
        usage: Any = error
        command = usage.ctx.command_path if usage.ctx else "rlhfless"
        told = usage.format_message().rstrip(".")
        _end(f"{told}{'' if told.endswith('?') else '.'} See `{command} --help`.")
    except OSError as error:
        _end(f"{error.filename}: {why(error)}. Correct it, or name another file." if error.filename else why(error))
    except MemoryError:
        _end("the memory of this host does not suffice. Ask for less.")
    except RlhflessError as error:
        _end(str(error))


def _end(message: str) -> NoReturn:
    print(f"rlhfless: error: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(BAD_INPUT) from None


_HELP = "Elastic, serverless RLHF on verl. Begin with `rlhfless doctor`; README.md has the rest."
app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, help=_HELP)


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
    out: Annotated[Path, typer.Option(help="Folder for tables, pictures, logs and records.")],
    data: Annotated[Path | None, typer.Option(help="JSON Lines as of GSM8K (default: arithmetic of its own).")] = None,
    steps: Annotated[int, typer.Option(help="Training steps of each arm.")] = 7,
    seed: Annotated[int, typer.Option(help="Seed of model, data and sampling.")] = 1,
    arms: Annotated[str, typer.Option(help="Comma-separated: stock, elastic, resident.")] = "stock,elastic",
    columns: Annotated[
        str,
        typer.Option(
            help="Comma-separated: unpaced (as fast as this host is); paced to a declared GPU, with engines that sleep "
            "between steps (parked) or start anew (cold)."
        ),
    ] = "unpaced",
    ablate: Annotated[bool, typer.Option("--ablate", help="Also run each arm with single parts left out.")] = False,
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
