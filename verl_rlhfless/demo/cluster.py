"""A private Ray cluster for one arm, and the certainty that nothing of it outlives the arm."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import psutil

from verl_rlhfless.processes import end_processes, process_key
from verl_rlhfless.shared_memory import mapped_segments, queue_segments, unlink_segments

_RUN_VARIABLE = "RLHFLESS_RUN_ID"
_OBJECT_STORE_BYTES = 500_000_000
_NUM_CPUS = 64  # logical: verl reserves CPUs per GPU bundle, and this host only pretends to have GPUs
_RAY_ENVIRONMENT = {"RAY_worker_maximum_startup_concurrency": "8"}  # Ray warns when 4x as many start at once


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running Ray cluster.

    Attributes:
        address: GCS address for ``RAY_ADDRESS``.
        run_id: Mark in the environment of every process that the cluster started.
        environment: What those processes inherited, the mark included.
        segments_before: Shared-memory segments of vLLM that were there before the cluster.
    """

    address: str
    run_id: str
    environment: Mapping[str, str]
    segments_before: frozenset[str]

    def child_environment(self) -> dict[str, str]:
        """Return the environment of a driver that runs on this cluster."""
        return {**os.environ, **self.environment, "RAY_ADDRESS": self.address}

    def processes(self) -> list[psutil.Process]:
        """Return every process that runs for the cluster now: Ray's own, and what runs on it."""
        return _marked_processes(self.run_id)

    def leftovers(self) -> list[str]:
        """Return what is still there of engines: processes, and shared-memory segments that nobody maps, each named."""
        marked = [process for process in _marked_processes(self.run_id) if _is_engine(process)]
        segments = _unmapped_segments() - self.segments_before
        return [f"process {process.pid} ({_command(process)[:80]})" for process in marked] + sorted(segments)


@contextlib.contextmanager
def private_cluster(
    num_gpus: int, environment: Mapping[str, str], object_store_bytes: int = _OBJECT_STORE_BYTES
) -> Iterator[Cluster]:
    """Start Ray with ``num_gpus`` declared GPUs; its processes inherit ``environment`` and end on exit."""
    import ray

    run_id = uuid.uuid4().hex
    segments_before = frozenset(queue_segments())
    inherited = {**_RAY_ENVIRONMENT, **environment, _RUN_VARIABLE: run_id}
    temp_dir = tempfile.mkdtemp(prefix="rlhfless-")
    try:
        with _environment(inherited):
            context = ray.init(
                "local",  # never join a cluster that happens to run on this host
                num_gpus=num_gpus,
                num_cpus=_NUM_CPUS,
                object_store_memory=object_store_bytes,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                _temp_dir=temp_dir,
            )
        yield Cluster(context.address_info["gcs_address"], run_id, inherited, segments_before)
    finally:
        ray.shutdown()
        _end_marked_processes(run_id)
        unlink_segments(_unmapped_segments() - segments_before)
        shutil.rmtree(temp_dir, ignore_errors=True)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _marked_processes(run_id: str) -> list[psutil.Process]:
    """Return every process that inherited the run's mark, so that no process of anybody else is ever touched."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(_RUN_VARIABLE) == run_id:
                found.append(process)
    return found


def _end_marked_processes(run_id: str) -> None:
    keys = []
    for process in _marked_processes(run_id):
        with contextlib.suppress(psutil.NoSuchProcess):
            keys.append(process_key(process.pid))
    end_processes(keys, timeout_s=10)


def _unmapped_segments() -> set[str]:
    return queue_segments() - mapped_segments(psutil.pids())


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return "ended"


def _is_engine(process: psutil.Process) -> bool:
    command = _command(process)
    return any(mark in command for mark in ("VLLM::", "EngineCore", "multiprocessing.forkserver"))
