"""How a benchmark becomes a command: ``--help`` prints its module docstring, and starts nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer


def run(main: Callable[..., Any], doc: str | None) -> None:
    """Run ``main`` with the arguments of the command line, which its signature names; ``doc`` is the help."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(help=doc)(main)
    app()
