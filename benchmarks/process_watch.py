"""What the processes of a run hold of the host, looked at again and again while it runs."""

from __future__ import annotations

import contextlib
import re
import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from verl_rlhfless.ab.cluster import Cluster

_LOOK_S = 1.0
_KIND = re.compile(r"ray::(?:IDLE|(\w+))")
_MARKS = ("VLLM::EngineCore", "VLLM::Worker", "forkserver", "resource_tracker", "raylet", "gcs_server")


@dataclass(frozen=True, slots=True)
class Look:
    """By kind of process at one moment: proportional set size, how many there were, and their open files.

    ``steps_done`` is how many training steps were complete.
    """

    steps_done: int
    pss_bytes: Mapping[str, int]
    counts: Mapping[str, int]
    num_files: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """All kinds together."""
        return sum(self.pss_bytes.values())


class ProcessWatch:
    """Looks at the processes of a cluster every second until it is closed; ``metrics`` is verl's file logger's.

    Attributes:
        looks: Oldest first.
    """

    def __init__(self, cluster: Cluster, metrics: Path) -> None:
        self._cluster, self._metrics = cluster, metrics
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.looks: list[Look] = []

    def __enter__(self) -> ProcessWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_S):
            steps = len(self._metrics.read_text().splitlines()) if self._metrics.exists() else 0
            self.looks.append(_look(self._cluster.processes(), steps))


def _look(processes: list[psutil.Process], steps_done: int) -> Look:
    pss: dict[str, int] = defaultdict(int)
    counts: dict[str, int] = defaultdict(int)
    files: dict[str, int] = defaultdict(int)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            kind, num_files = _kind(" ".join(process.cmdline())), process.num_fds()
            pss[kind] += process.memory_full_info().pss
            counts[kind] += 1
            files[kind] += num_files
    return Look(steps_done, dict(pss), dict(counts), dict(files))


def _kind(command: str) -> str:
    for mark in _MARKS:
        if mark in command:
            return mark
    if "main_ppo" in command:
        return "main_ppo"
    match = _KIND.match(command)
    return (match.group(1) or "idle worker") if match else "other of Ray"
