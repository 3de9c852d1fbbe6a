"""The one form of a benchmark's record: what was measured or simulated, by which command, on what, by which code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from verl_rlhfless.report.environment import code, hardware, versions

_RESULTS = Path(__file__).parent / "results"
Code = Mapping[str, Any]
"""What ``verl_rlhfless.report.environment.code`` returns."""
UNKNOWN: Code = {"commit": None, "has_uncommitted_changes": None}

code()  # now: the checkout may change while a benchmark runs


def write_result(
    name: str,
    results: dict[str, Any],
    *,
    command: str,
    kind: str = "measured",
    num_gpus: int = 0,
    folder: Path | None = None,
    shown: Collection[str] | None = None,
    parts: Mapping[str, Code] | None = None,
) -> Path:
    """Write ``benchmarks/results/<name>.json`` in the format ``rlhfless-bench/1`` and return its path.

    Args:
        name: Of the benchmark, and of the file.
        results: As JSON.
        command: What made it.
        kind: ``measured``, ``simulated`` or both.
        num_gpus: GPUs that the run declared.
        folder: Where to write; ``None`` = with the other records.
        shown: The results to print; ``None`` = all of them.
        parts: The code that made each part, where parts may be of earlier runs. The record has a commit only if it is
            that of all its parts.
    """
    made = list((parts or {"all": code()}).values())
    record = {
        "format": "rlhfless-bench/1",
        "name": name,
        "kind": kind,
        "command": command,
        **(made[0] if all(one == made[0] for one in made) else UNKNOWN),
        **({"parts": dict(parts)} if parts else {}),
        "versions": versions(),
        "hardware": hardware(num_gpus),
        "results": results,
    }
    path = (folder or _RESULTS) / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({key: results[key] for key in (results if shown is None else shown)}, indent=2))
    print(f"wrote {path}")
    return path


def write_simulated(
    out: Path, results: dict[str, Any], command: str, shown: Collection[str], parts: Mapping[str, Code] | None = None
) -> Path:
    """Write the record of a simulation to ``out``, print the results that ``shown`` names, and return the path."""
    return write_result(
        out.stem, results, command=command, kind="simulated", folder=out.parent, shown=shown, parts=parts
    )


class Part(NamedTuple):
    """What was found of one arm, now or by an earlier run, and by which code."""

    found: Any
    code: Code


def keep(path: Path, settings: Mapping[str, Any], work: Callable[[], Any]) -> Part:
    """Return what ``work`` finds; if ``path`` holds what an earlier run found with the same settings, that.

    Raises:
        SystemExit: The earlier run had other settings, or it is not known which.
    """
    wanted = json.loads(json.dumps({"settings": settings, "versions": versions()}))
    if not path.exists():
        found = json.loads(json.dumps(work()))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**wanted, "code": code(), "found": found}, indent=2) + "\n")
    kept = json.loads(path.read_text())
    if not isinstance(kept, dict) or any(kept.get(key) != value for key, value in wanted.items()):
        raise SystemExit(f"{path}: was made with other settings or versions. Name another --out, or delete its folder.")
    return Part(kept["found"], kept["code"])


def parts_of(record: Mapping[str, Any], names: Collection[str]) -> dict[str, Code]:
    """Return the code that made each part of a record that is kept; one without ``parts`` was made by one code."""
    whole = {key: record.get(key) for key in UNKNOWN}
    return {name: record["parts"].get(name, UNKNOWN) if "parts" in record else whole for name in names}


def digest(path: Path) -> str:
    """Return what tells a file from others of its name."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def file_names(paths: Sequence[Path]) -> str:
    """Return files as a recorded command names them: without the folders of the machine that ran it."""
    return " ".join(path.name for path in paths)


def trace_option(trace: Path | None) -> str:
    """Return the option that names a trace, as a recorded command has it; nothing without one."""
    return f" --trace {trace.name}" if trace else ""
