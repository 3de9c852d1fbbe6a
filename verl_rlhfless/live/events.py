"""What the elastic run tells the observer: one JSON object per line, in a file of this process."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from verl_rlhfless.live.variables import OBSERVER_DIR_VARIABLE


class EventLog:
    """Append-only record of replica, lease and weight events; does nothing without an observer folder."""

    def __init__(self, folder: Path | None) -> None:
        self._file = (folder / f"events-{os.getpid()}.jsonl").open("a", encoding="utf-8") if folder else None

    @classmethod
    def from_environment(cls) -> EventLog:
        """Return the log of this process."""
        folder = os.environ.get(OBSERVER_DIR_VARIABLE)
        return cls(Path(folder) if folder else None)

    def write(self, event: str, **fields: Any) -> None:
        """Append one event stamped with the current time ``t`` [s since the epoch]."""
        if self._file:
            self._file.write(json.dumps({"event": event, "t": time.time(), **fields}) + "\n")
            self._file.flush()
