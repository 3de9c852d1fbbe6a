"""The one form of a benchmark's record: what was measured or simulated, by which command, on what."""

from __future__ import annotations

import json
import subprocess
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
) -> Path:
    """Write ``benchmarks/results/<name>.json`` in the format ``rlhfless-bench/1``, print it, and return its path."""
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
    print(json.dumps(results, indent=2))
    print(f"wrote {path}")
    return path


def _commit() -> str | None:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=_RESULTS)
    return done.stdout.strip() or None
