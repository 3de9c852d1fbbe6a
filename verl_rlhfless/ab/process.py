"""The certain end of a command and of everything that it started in its own session."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import Any

_TERM_S = 10.0
_KILL_S = 10.0


def end_group(process: subprocess.Popen[Any]) -> None:
    """End the session of ``process``, which must lead it: politely, after 10 s for good.

    Also what a command that has ended left running in its session is ended.
    """
    _signal(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_TERM_S)
    _signal(process.pid, signal.SIGKILL)
    process.wait(_KILL_S)


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
