"""The external observer that every arm, stock too, is measured with: who leased GPUs when, and when steps ended.

It reads Ray's placement-group table, verl's file logger and ``/proc``, and never touches the trainer. Everything is
written line by line, so a killed run leaves its records behind. Files in the observed folder:

- ``leases.jsonl``: ``{"event": "granted", "lease", "role", "num_gpus", "t"}``, ``{"event": "released", "lease", "t"}``
- ``steps.jsonl``: ``{"step", "t"}``, one for each line of verl's ``metrics.jsonl``
- ``host.jsonl``: ``{"t", "cpu_percent", "memory_peak_bytes", "observer_cpu_s"}``, at the start, each second, at the end

A grant has Ray's own time [ms]. Ray keeps no time of a release: it is the first poll that saw the group gone, at most
``poll_s`` late, but not later than a grant that the same poll saw (GPUs change hands in that order), so leases that
follow each other don't seem to overlap. Ray ends any connected process 60 s after its head is gone: stop the observer
before the cluster.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import psutil
import ray

from verl_rlhfless.errors import RlhflessError
from verl_rlhfless.live.available_memory import available_bytes

LEASES_FILE = "leases.jsonl"
STEPS_FILE = "steps.jsonl"
HOST_FILE = "host.jsonl"
METRICS_FILE = "metrics.jsonl"
"""verl's file logger: ``VERL_FILE_LOGGER_PATH`` of the observed run must be this file in the observed folder."""

_RECORDS_OF_A_RUN = (
    LEASES_FILE,
    STEPS_FILE,
    HOST_FILE,
    METRICS_FILE,
    "engine-*.jsonl",
    "events-*.jsonl",
    "samples-*.jsonl",
)
_ROLE = re.compile(r"rlhfless/(trainer|replica)/")
_CPU_SHARE = (
    0.02  # most of one core that polling may take: the table keeps removed groups, so a long run polls less often
)
_HOST_SAMPLE_S = 1.0
_LAST_RELEASES_S = 0.5  # a driver's groups go a moment after its exit
_STOP_S = 1.0


@dataclass(frozen=True, slots=True)
class PlacedGroup:
    """A placement group that carries GPUs, as Ray's table shows it.

    Attributes:
        group_id: Ray's id.
        name: Its name, or the id of an unnamed one.
        num_gpus: GPUs of all bundles.
        is_held: Whether all bundles are placed, so that the GPUs are taken.
        granted_s: When the last bundle was placed; 0 = never.
    """

    group_id: bytes
    name: str
    num_gpus: int
    is_held: bool
    granted_s: float

    @property
    def role(self) -> str:
        """``replica`` for our elastic replicas; every other group, such as verl's own pools, is the ``trainer``'s."""
        match = _ROLE.match(self.name)
        return match.group(1) if match else "trainer"


class Observer:
    """Watches one run from a thread. Use it as a context manager around the run.

    Args:
        out_dir: The observed folder. What an earlier run recorded there is removed.
        ray_address: The cluster to watch; ``None`` = the one that this process is connected to.
        poll_s: Time between two looks [s]; longer when a look costs more than 2 % of that.
    """

    def __init__(self, out_dir: Path, ray_address: str | None = None, poll_s: float = 0.1) -> None:
        self._out_dir = out_dir
        self._ray_address = ray_address
        self._poll_s = poll_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rlhfless-observer", daemon=True)
        self._error: BaseException | None = None

    def start(self) -> None:
        """Connect where needed, and watch from now on."""
        if self._ray_address is not None:
            ray.init(address=self._ray_address, log_to_driver=False, configure_logging=False)
        self._out_dir.mkdir(parents=True, exist_ok=True)
        for pattern in _RECORDS_OF_A_RUN:
            for path in self._out_dir.glob(pattern):
                path.unlink()
        self._thread.start()

    def stop(self) -> None:
        """End the watch within about a second.

        Raises:
            RlhflessError: The watch failed during the run, so its records are incomplete.
        """
        self._stop.set()
        self._thread.join(_LAST_RELEASES_S + _STOP_S)
        if self._thread.is_alive():
            raise RlhflessError("the observer hangs in a call to Ray. Stop it before the cluster is ended.")
        if self._ray_address is not None:
            ray.shutdown()
        if self._error is not None:
            raise RlhflessError(f"the observer failed, its records are incomplete: {self._error}") from self._error

    def __enter__(self) -> Observer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        except RlhflessError:
            if kind is None or issubclass(kind, Exception):  # else this process is being ended, which must not be lost
                raise

    def _watch(self) -> None:
        try:
            with (
                (self._out_dir / LEASES_FILE).open("w", buffering=1) as leases,
                (self._out_dir / STEPS_FILE).open("w", buffering=1) as steps,
                (self._out_dir / HOST_FILE).open("w", buffering=1) as host,
            ):
                self._watch_until_stopped(LeaseWatch(leases), StepWatch(self._out_dir, steps), HostWatch(host))
        except Exception as error:  # noqa: BLE001 - the caller's thread raises it in stop()
            self._error = error

    def _watch_until_stopped(self, leases: LeaseWatch, steps: StepWatch, host: HostWatch) -> None:
        def look() -> float:
            cpu_s = time.thread_time()
            asked_s = time.time()
            leases.look(read_groups(), asked_s, time.time())
            steps.look()
            host.look(time.time())
            return time.thread_time() - cpu_s

        leases.ignore_ended(read_groups())
        while not self._stop.is_set():
            cost_s = look()
            self._stop.wait(max(self._poll_s, cost_s / _CPU_SHARE))
        give_up_s = time.time() + _LAST_RELEASES_S
        look()
        while leases.is_anything_held and time.time() < give_up_s:
            time.sleep(min(self._poll_s, _LAST_RELEASES_S))
            look()
        host.write(time.time())


def read_groups() -> list[PlacedGroup]:
    """Return every placement group with GPUs that Ray knows, ended ones included.

    Reads Ray's table below ``ray.util.placement_group_table()``, which leaves the time of the grant out and takes three
    times the CPU. Remove this when Ray's public call returns that time.
    """
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    groups = []
    for row in state._connect_and_get_accessor().get_placement_group_table():
        data = PlacementGroupTableData.FromString(row)
        if num_gpus := math.ceil(sum(bundle.unit_resources.get("GPU", 0.0) for bundle in data.bundles)):
            groups.append(
                PlacedGroup(
                    group_id=data.placement_group_id,
                    name=data.name or data.placement_group_id.hex(),
                    num_gpus=num_gpus,
                    is_held=data.state == PlacementGroupTableData.CREATED,
                    granted_s=data.placement_group_final_bundle_placement_timestamp_ms / 1000,
                )
            )
    return groups


class LeaseWatch:
    """Turns looks at Ray's table into grants and releases."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._held: dict[bytes, PlacedGroup] = {}
        self._ended: set[tuple[bytes, float]] = set()
        self._asked_s = 0.0

    @property
    def is_anything_held(self) -> bool:
        """Whether the last look showed a lease."""
        return bool(self._held)

    def ignore_ended(self, groups: Iterable[PlacedGroup]) -> None:
        """Leave out what ended before the watch began."""
        self._ended.update((group.group_id, group.granted_s) for group in groups if not group.is_held)

    def look(self, groups: Iterable[PlacedGroup], asked_s: float, answered_s: float) -> None:
        """Record what changed since the last look.

        Args:
            groups: Ray's table now.
            asked_s: Before the table was asked for.
            answered_s: After the answer.
        """
        known = {group.group_id: group for group in groups}
        granted = [
            group
            for group in known.values()
            if group.granted_s > 0
            and group.group_id not in self._held
            and (group.group_id, group.granted_s) not in self._ended
        ]
        granted.sort(key=lambda group: group.granted_s)
        for group in granted:
            self._held[group.group_id] = group
            self._write("granted", group, group.granted_s, role=group.role, num_gpus=group.num_gpus)
        for group_id, held in list(self._held.items()):
            now = known.get(group_id)
            if now is None or not now.is_held:
                not_before_s = max(held.granted_s, self._asked_s)
                later = [group.granted_s for group in granted if not_before_s < group.granted_s]
                self._write("released", held, min([answered_s, *later]))
                del self._held[group_id]
                self._ended.add((group_id, held.granted_s))
        self._asked_s = asked_s

    def _write(self, event: str, group: PlacedGroup, t: float, **fields: Any) -> None:
        self._out.write(json.dumps({"event": event, "lease": group.name, **fields, "t": t}) + "\n")


class StepWatch:
    """Stamps each line of verl's file logger with the wall time at which it was written, up to a kernel tick early."""

    def __init__(self, folder: Path, out: TextIO) -> None:
        self._metrics = folder / METRICS_FILE
        self._out = out
        self._read_bytes = 0

    def look(self) -> None:
        """Record the lines that were finished since the last look; the file's change time is theirs."""
        if not self._metrics.exists():
            return
        stat = self._metrics.stat()
        if stat.st_size == self._read_bytes:
            return
        with self._metrics.open("rb") as file:
            file.seek(self._read_bytes)
            fresh = file.read(stat.st_size - self._read_bytes)
        for line in fresh.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            self._read_bytes += len(line)
            self._out.write(json.dumps({"step": json.loads(line)["step"], "t": stat.st_mtime_ns / 1e9}) + "\n")


class HostWatch:
    """Samples how busy the host is and how much memory was taken since the watch began."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._available_bytes = available_bytes()
        self._peak_bytes = 0
        self._next_s = 0.0
        psutil.cpu_percent()  # the first call only begins the interval

    def look(self, now_s: float) -> None:
        """Note the memory; once a second, write a line."""
        self._peak_bytes = max(self._peak_bytes, self._available_bytes - available_bytes())
        if now_s >= self._next_s:
            self.write(now_s)
            self._next_s = now_s + _HOST_SAMPLE_S

    def write(self, now_s: float) -> None:
        """Write the CPU use since the last line, the memory peak so far, and the CPU time of this thread."""
        sample = {
            "t": now_s,
            "cpu_percent": psutil.cpu_percent(),
            "memory_peak_bytes": self._peak_bytes,
            "observer_cpu_s": time.thread_time(),
        }
        self._out.write(json.dumps(sample) + "\n")
