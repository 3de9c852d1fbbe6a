"""Where an arm runs: a private Ray cluster of which nothing outlives the arm, or the cluster that is there."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from verl_rlhfless.ab.command import hydra_quoted
from verl_rlhfless.errors import ConfigError, RlhflessError
from verl_rlhfless.live.variables import OBSERVER_DIR_VARIABLE
from verl_rlhfless.processes import end_processes, process_key
from verl_rlhfless.shared_memory import mapped_segments, queue_segments, unlink_segments

_RUN_VARIABLE = "RLHFLESS_RUN_ID"
_IDLE_TIMEOUT_S = 30.0
_CONNECT_TIMEOUT_S = 5.0
_POLL_S = 0.2
_DEVICES = "CUDA_VISIBLE_DEVICES"  # of the recipe's own host; a running cluster gives each worker its devices
_LONGEST_ROOT = 24  # of the 107 bytes of a socket's name, our folder takes 18 and Ray 64
_SHARED_TIMEOUT_S = 60.0
_RAY_ENVIRONMENT = {"RAY_worker_maximum_startup_concurrency": "8"}  # Ray warns when 4x as many start at once


@dataclass(frozen=True, slots=True)
class HostSize:
    """What a private cluster takes of the host; ``None`` = what Ray finds there."""

    num_cpus: int | None = None
    object_store_bytes: int | None = None


CPU_HOST = HostSize(num_cpus=64, object_store_bytes=500_000_000)
"""A small host that only pretends to have GPUs: verl reserves logical CPUs for each."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running Ray cluster.

    Attributes:
        address: GCS address for ``RAY_ADDRESS``.
        run_id: Mark in the environment of every process of the arm.
        environment: What those processes inherit, the mark included.
        segments_before: Shared-memory segments of vLLM that were there before the arm.
        overrides: What the recipe needs beside, for the processes to inherit it.
    """

    address: str
    run_id: str
    environment: Mapping[str, str]
    segments_before: frozenset[str]
    overrides: tuple[str, ...] = ()

    def child_environment(self) -> dict[str, str]:
        """Return the environment of a driver that runs on this cluster."""
        return {**os.environ, **self.environment, "RAY_ADDRESS": self.address}

    def processes(self) -> list[psutil.Process]:
        """Return every process that runs for the cluster now: Ray's own, and what runs on it."""
        return _marked_processes(self.run_id)

    def leftovers(self) -> list[str]:
        """Return what is still on this host of engines: processes, and shared memory that nobody maps, each named."""
        engines = [process for process in _marked_processes(self.run_id) if _is_engine(process)]
        segments = _unmapped_segments() - self.segments_before
        return [f"process {process.pid} ({_command(process)[:80]})" for process in engines] + sorted(segments)


@dataclass(frozen=True, slots=True)
class Mark:
    """What tells the processes of one arm from all others.

    Attributes:
        run_id: Mark in the environment of every process of the arm.
        environment: What those processes inherit, the mark included.
        segments_before: Shared-memory segments of vLLM that were there before the arm.
        temp_dir: Their folder, gone afterwards.
    """

    run_id: str
    environment: Mapping[str, str]
    segments_before: frozenset[str]
    temp_dir: str

    def cluster(self, address: str) -> Cluster:
        """Return the cluster at ``address``, whose processes have the mark."""
        return Cluster(address, self.run_id, self.environment, self.segments_before)


@contextlib.contextmanager
def marked(environment: Mapping[str, str]) -> Iterator[Mark]:
    """Give the processes of a cluster a mark to inherit; on exit all that have it end, and nothing of them is left."""
    run_id = uuid.uuid4().hex
    segments_before = frozenset(queue_segments())
    inherited = {**_RAY_ENVIRONMENT, **environment, _RUN_VARIABLE: run_id}
    temp_dir = tempfile.mkdtemp(prefix="rlhfless-", dir=_short_root())
    try:
        yield Mark(run_id, inherited, segments_before, temp_dir)
    finally:
        _end_marked_processes(run_id)
        unlink_segments(_unmapped_segments() - segments_before)
        shutil.rmtree(temp_dir, ignore_errors=True)


def _short_root() -> str:
    """Return where temporary files go; ``/tmp`` when Ray could not name its sockets below a longer path."""
    root = tempfile.gettempdir()
    return root if len(root) <= _LONGEST_ROOT else "/tmp"


@contextlib.contextmanager
def private_cluster(num_gpus: int, environment: Mapping[str, str], size: HostSize = CPU_HOST) -> Iterator[Cluster]:
    """Start Ray with ``num_gpus`` declared GPUs; its processes inherit ``environment`` and end on exit."""
    import ray

    with marked(environment) as mark:
        try:
            yield mark.cluster(_start_private(mark, num_gpus, size))
        finally:
            ray.shutdown()


def _start_private(mark: Mark, num_gpus: int, size: HostSize) -> str:
    """Start a cluster whose processes have the mark, and return its address."""
    import ray

    try:
        with _environment(mark.environment):
            context = ray.init(
                "local",  # never join a cluster that happens to run on this host
                num_gpus=num_gpus,
                num_cpus=size.num_cpus,
                object_store_memory=size.object_store_bytes,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                _temp_dir=mark.temp_dir,
            )
    except (OSError, RuntimeError, ValueError) as error:  # OSError: a ConnectionError, too
        raise RlhflessError(f"a private Ray cluster does not start: {' '.join(str(error).split())}") from error
    return str(context.address_info["gcs_address"])


@contextlib.contextmanager
def running_cluster(address: str, num_gpus: int, environment: Mapping[str, str]) -> Iterator[Cluster]:
    """Connect to the cluster at ``address``, whose processes for the arm get ``environment`` through the job.

    The observer cannot tell jobs apart: it counts every lease that it sees, so the cluster must be the arm's alone.

    Raises:
        ConfigError: Nothing answers there.
        RlhflessError: Ray cannot connect, it has fewer than ``num_gpus`` GPUs, others use some of them, or a node does
            not see the folder of the records.
    """
    import ray

    check_address(address)
    run_id = uuid.uuid4().hex
    inherited = {**environment, _RUN_VARIABLE: run_id}
    segments_before = frozenset(queue_segments())
    try:
        context = ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        what = "Set RAY_AUTH_MODE=token: it asks for a token." if _asks_for_token(error) else "Start the cluster."
        raise RlhflessError(f"RAY_ADDRESS={address}: {' '.join(str(error).split())}. {what}") from error
    try:
        _wait_until_idle(address, num_gpus)
        if folder := environment.get(OBSERVER_DIR_VARIABLE):
            _check_shared(address, Path(folder))
        overrides = tuple(_inherited(name, value) for name, value in inherited.items() if _travels(name, value))
        yield Cluster(context.address_info["gcs_address"], run_id, inherited, segments_before, overrides)
    finally:
        ray.shutdown()


def _asks_for_token(error: BaseException) -> bool:
    """Return whether a cluster refused us for want of a token; Ray reads it by itself only for clusters it finds."""
    return "AuthenticationError" in f"{error} {error.__cause__}"


def _wait_until_idle(address: str, num_gpus: int) -> None:
    """Wait until all GPUs are free: those of the arm before are so a moment after its end."""
    import ray

    has = int(ray.cluster_resources().get("GPU", 0))
    if has < num_gpus:
        raise RlhflessError(f"RAY_ADDRESS={address}: the recipe needs {num_gpus} GPUs and the cluster has {has}.")
    give_up_s = time.monotonic() + _IDLE_TIMEOUT_S
    while (free := int(ray.available_resources().get("GPU", 0))) < has:
        if time.monotonic() > give_up_s:
            raise RlhflessError(
                f"RAY_ADDRESS={address}: {has - free} of {has} GPUs are used by others, whose leases would be counted. "
                "Wait for them, or use another cluster."
            )
        time.sleep(_POLL_S)


def _check_shared(address: str, folder: Path) -> None:
    """Check that every node writes where records are read: what is missing of an arm would look idle."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    can_write = ray.remote(num_cpus=0)(_can_write)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".shared-") as marker:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        only = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
        asked = [can_write.options(scheduling_strategy=where).remote(marker.name) for where in only]
        try:
            answers = ray.get(asked, timeout=_SHARED_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            what = str(error).strip().splitlines()[-1]  # of a traceback the exception
            raise RlhflessError(f"RAY_ADDRESS={address}: a node does not say what it sees: {what}") from error
    blind = [node["NodeManagerAddress"] for node, answer in zip(nodes, answers, strict=True) if not answer]
    if blind:
        raise RlhflessError(
            f"RAY_ADDRESS={address}: {folder} cannot be written on node {', '.join(blind)}, and every node records "
            "there. Give an --out that all nodes share."
        )


def _can_write(marker: str) -> bool:
    path = Path(marker)
    return path.exists() and os.access(path.parent, os.W_OK)


def check_address(address: str) -> None:
    """Check that ``RAY_ADDRESS`` is one at which something answers, and the observer can read the lease table.

    Ray itself would go on trying for minutes, in every arm.

    Raises:
        ConfigError: It is an address of Ray's client or none at all, or nothing answers within 5 s.
    """
    if address.startswith("ray://"):
        rule = "is the address of a Ray client, which does not show who leases what"
        raise ConfigError("RAY_ADDRESS", address, rule, "Run on a node of the cluster, with RAY_ADDRESS=auto.")
    start = "Start the cluster (`ray start --head`), or unset RAY_ADDRESS for private ones."
    try:
        found = _current_cluster() if address == "auto" else address
    except ConnectionError:
        raise ConfigError("RAY_ADDRESS", address, "no Ray cluster runs on this host", start) from None
    try:
        parts = urlsplit(f"//{found}")
        host, port = parts.hostname, parts.port
    except ValueError:  # a port that is none
        host = port = None
    if host is None or port is None:
        rule = "must be auto, or HOST:PORT with a port up to 65535"
        raise ConfigError("RAY_ADDRESS", address, rule, "Correct it, or unset it for private clusters.")
    try:
        socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host
        there = "there" if found == address else f"at {found}, where the last cluster of this host was"
        raise ConfigError("RAY_ADDRESS", address, f"nothing answers {there} ({error})", start) from error


def _current_cluster() -> str:
    """Return where ``ray.init(address="auto")`` would connect; ``ConnectionError`` without a cluster."""
    from ray._private.services import canonicalize_bootstrap_address

    return str(canonicalize_bootstrap_address("auto"))


def _travels(name: str, value: str) -> bool:
    """Return whether a variable may go through verl's configuration, in which ``${`` and line breaks mean something."""
    return name != _DEVICES and "${" not in value and "\n" not in value


def _inherited(name: str, value: str) -> str:
    return f"++ray_kwargs.ray_init.runtime_env.env_vars.{name}={hydra_quoted(value)}"


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
