"""The parts of one model that are measured already, in a file, so that a run that was cut off goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import Row, Subject
from verl_rlhfless.errors import DataError


@dataclass
class Session:
    """Finished parts of one model with one engine on one device.

    Attributes:
        path: Its file.
        subject: What is measured: device, engine and model; a file of another subject is refused.
        parts: Rows of the finished parts by name.
        failures: Why a part of this run has no rows.
    """

    path: Path
    subject: dict[str, str]
    parts: dict[str, list[Row]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @classmethod
    def resume(cls, path: Path, subject: dict[str, str]) -> Session:
        """Return the session that ``path`` holds, or a new one.

        Raises:
            DataError: It holds another subject's figures.
        """
        session = cls(path, subject)
        if path.exists():
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["subject"] != subject:
                raise DataError(
                    f"{path}: was measured on {values['subject']}, not {subject}. Delete it, or use another --out."
                )
            session.parts = {name: [Row.from_json(row) for row in rows] for name, rows in values["parts"].items()}
        return session

    def run(self, subject: Subject, names: list[str], has_time: Callable[[], bool]) -> None:
        """Measure the named parts that are not finished, while there is time; a part that fails ends no other."""
        for name, measure in subject.parts.items():
            if name not in names or name in self.parts:
                continue
            if not has_time():
                self.failures[name] = "no time left; run the same command again"
                continue
            print(f"measuring {name}", flush=True)
            try:
                self.parts[name] = measure()
            except Exception as error:  # noqa: BLE001  a GPU's time is scarce: recorded, reported, and tried again
                self.failures[name] = f"{type(error).__name__}: {error}"
                print(f"failed {name}: {self.failures[name]}", flush=True)
            else:
                self._save()

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return [row for rows in self.parts.values() for row in rows]

    def _save(self) -> None:
        values: dict[str, Any] = {"subject": self.subject}
        values["parts"] = {name: [row.as_json() for row in rows] for name, rows in self.parts.items()}
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        new.replace(self.path)
