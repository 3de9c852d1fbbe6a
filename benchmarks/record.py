"""The one form of a benchmark's record: what was measured or simulated, by which command, on what."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from verl_rlhfless.report.environment import hardware, versions

_RESULTS = Path(__file__).parent / "results"


def write_result(
    name: str,
    results: dict[str, Any],
    *,
    command: str,
    kind: str = "measured",
    num_gpus: int = 0,
    folder: Path | None = None,
    shown: Collection[str] | None = None,
) -> Path:
    """Write ``benchmarks/results/<name>.json`` in the format ``rlhfless-bench/1`` and return its path.

    ``shown`` names the results to print; ``None`` = all of them.
    """
    record = {
        "format": "rlhfless-bench/1",
        "name": name,
        "kind": kind,
        "command": command,
        "commit": _commit(),
        "versions": versions(),
        "hardware": hardware(num_gpus),
        "results": results,
    }
    path = (folder or _RESULTS) / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({key: results[key] for key in (results if shown is None else shown)}, indent=2))
    print(f"wrote {path}")
    return path


def write_simulated(out: Path, results: dict[str, Any], command: str, shown: Collection[str]) -> Path:
    """Write the record of a simulation to ``out``, print the results that ``shown`` names, and return the path."""
    return write_result(out.stem, results, command=command, kind="simulated", folder=out.parent, shown=shown)


def file_names(paths: Sequence[Path]) -> str:
    """Return files as a recorded command names them: without the folders of the machine that ran it."""
    return " ".join(path.name for path in paths)


def _commit() -> str | None:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=_RESULTS)
    return done.stdout.strip() or None
