"""``rlhfless ab``, ``rlhfless report`` and ``rlhfless trace record``.

``register`` adds them to the command line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from verl_rlhfless.errors import ConfigError
from verl_rlhfless.outputs import check_file


def register(app: typer.Typer, trace_app: typer.Typer) -> None:
    """Add ``ab`` and ``report`` to ``app``, and ``record`` to ``trace_app``."""
    app.command()(ab)
    app.command()(report)
    trace_app.command()(record)


def ab(
    command: Annotated[str, typer.Argument(help='`python -m verl.trainer.main_ppo ...`, or a script ending in "$@".')],
    out: Annotated[Path, typer.Option(help="Folder of report, records and logs; the same command goes on there.")],
    steps: Annotated[int, typer.Option(help="Training steps of each arm; the first is a warm-up.")],
    arms: Annotated[
        str,
        typer.Option(
            help="With commas: stock (= sync), colocate_async, separate_async, separate_async_switch, elastic, "
            "resident, and parts left out, such as elastic-no-dispatcher (an unknown name lists them all)."
        ),
    ] = "stock,elastic",
    trainer_gpus: Annotated[
        int | None,
        typer.Option(
            help="GPUs of the trainer in the arms elastic and separate_async; replicas get the rest. Default: in "
            "elastic all, which an FSDP trainer leaves during rollouts; otherwise at most half, so that both get "
            "about the same. Fewer make updates slower and optimizer shards larger."
        ),
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Replay these response lengths in every arm: equal work.")] = None,
    plugin_override: Annotated[
        list[str] | None, typer.Option(help="Hydra override for the plugin's arms only; may be repeated.")
    ] = None,
    arm_timeout_h: Annotated[float, typer.Option(help="An arm that takes longer is ended and has failed.")] = 24.0,
) -> None:
    """Run a verl recipe once per arm on the same GPUs, and compare time, GPU-seconds and learning.

    Nothing of the recipe is changed but appended overrides. Uses the Ray cluster of RAY_ADDRESS, else private ones.
    Exit code: 0 = all well, 1 = an arm or a guard failed (the other arms ran), 2 = bad input.
    """
    from verl_rlhfless.ab.run import AbOptions, prepare, run_ab

    options = AbOptions(command, out, arms, steps, trainer_gpus, trace, tuple(plugin_override or ()), arm_timeout_h)
    raise typer.Exit(run_ab(prepare(options)))


def report(
    folder: Annotated[
        Path, typer.Argument(help="The --out of `rlhfless ab`, a column of `rlhfless demo` (OUT/unpaced), or an arm.")
    ],
) -> None:
    """Write report.md and timeline.png into a folder of records: tables, every lease, predicted and measured."""
    from verl_rlhfless.report.folder import write_report

    typer.echo(f"wrote {write_report(folder)}")


def record(
    folder: Annotated[Path, typer.Argument(help="Folder of one arm, such as OUT/stock.")],
    out: Annotated[Path, typer.Option(help="File to write (.jsonl or .jsonl.gz).")],
) -> None:
    """Write the length trace of a recorded run, of stock verl too."""
    from verl_rlhfless.report.recorded_trace import record_trace

    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise ConfigError("--out", str(out), "must be named *.jsonl or *.jsonl.gz", "Write --out trace.jsonl.")
    check_file("--out", out)
    written = record_trace(folder, out)
    left_out = f"; left out {written.num_left_out} unfinished steps" if written.num_left_out else ""
    typer.echo(
        f"wrote {out}: {written.num_steps} steps, {written.num_groups} groups, {written.num_samples} responses of "
        f"{written.response_tokens:,} tokens{left_out}"
    )
