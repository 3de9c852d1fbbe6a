"""Ray clusters of several nodes on this host: nodes with addresses of their own, or nodes that the autoscaler adds."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import ray
from ray._private.authentication.authentication_token_setup import (
    enable_token_auth_by_default,
    ensure_token_if_auth_enabled,
)
from ray._private.services import get_node_ip_address

from verl_rlhfless.ab.cluster import Cluster, Mark, marked

OTHER_IP = "127.0.0.2"
"""Of the node that is not the head: an address of the same host."""

_HEAD_ID = "f" * 51 + "00000"  # by which Ray's provider of pretended nodes knows the head
_STORE_BYTES = 300_000_000
_NUM_CPUS = 32
_WAIT_S = 120.0


@contextlib.contextmanager
def two_nodes(environment: Mapping[str, str], gpus: tuple[int, int], other_cpus: int = _NUM_CPUS) -> Iterator[Cluster]:
    """Start a head and one more node with so many declared GPUs each; without CPUs, the other is for leases only."""
    with marked({**environment, **_authentication()}) as mark:
        address = _start_head(mark, mark.environment, f"--num-gpus={gpus[0]}")
        other = (f"--address={address}", f"--node-ip-address={OTHER_IP}", f"--num-cpus={other_cpus}")
        _start(mark.environment, *other, f"--num-gpus={gpus[1]}")
        with _connected(address):
            yield mark.cluster(address)


@contextlib.contextmanager
def autoscaled(
    environment: Mapping[str, str], head_gpus: int, worker_gpus: int, max_workers: int, idle_s: float
) -> Iterator[Cluster]:
    """Start a head whose autoscaler adds nodes for what is pending, and removes those that are idle for ``idle_s``."""
    with marked({**environment, **_authentication()}) as mark:
        port = _free_port()
        config = Path(mark.temp_dir) / "autoscaler.json"
        config.write_text(json.dumps(_scaling(f"{get_node_ip_address()}:{port}", worker_gpus, max_workers, idle_s)))
        scaling = {
            "RAY_enable_autoscaler_v2": "1",  # KubeRay's
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
            "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
        }
        options = (f"--num-gpus={head_gpus}", f"--autoscaling-config={config}")
        address = _start_head(mark, {**mark.environment, **scaling}, *options, port=port)
        with _connected(address):
            yield mark.cluster(address)


def gpus_of_nodes() -> list[int]:
    """Return the GPUs of every node that is alive, fewest first."""
    return sorted(int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"])


def wait_until_gpus_are(expected: list[int]) -> None:
    """Wait until the nodes have these GPUs."""
    deadline = time.monotonic() + _WAIT_S
    while (found := gpus_of_nodes()) != expected:
        assert time.monotonic() < deadline, f"nodes have {found} GPUs, expected {expected}"
        time.sleep(0.2)


def _scaling(address: str, gpus: int, max_workers: int, idle_s: float) -> dict[str, object]:
    empty = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    worker = {"CPU": _NUM_CPUS, "GPU": gpus, "object_store_memory": _STORE_BYTES}
    return {
        "cluster_name": "rlhfless",
        "max_workers": max_workers,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": idle_s / 60,
        "provider": {
            "type": "external",  # Ray's own name for it needs a file that its wheel lacks
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "head_node_id": _HEAD_ID,
            "launch_multiple": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": _NUM_CPUS}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": max_workers},
        },
        **{f"{name}_commands": [] for name in empty},
        **{"auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": []},
        **{"file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": []},
    }


def _start_head(mark: Mark, environment: Mapping[str, str], *options: str, port: int | None = None) -> str:
    ip, port = get_node_ip_address(), port or _free_port()
    own = (f"--node-ip-address={ip}", f"--port={port}", f"--temp-dir={mark.temp_dir}", f"--num-cpus={_NUM_CPUS}")
    _start(environment, "--head", "--include-dashboard=false", *own, *options)
    return f"{ip}:{port}"


def _start(environment: Mapping[str, str], *options: str) -> None:
    ray_command = str(Path(sys.executable).with_name("ray"))
    command = [ray_command, "start", *options, f"--object-store-memory={_STORE_BYTES}", "--disable-usage-stats"]
    inherited = {**os.environ, **environment}
    done = subprocess.run(command, env=inherited, capture_output=True, text=True, timeout=_WAIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()


def _authentication() -> dict[str, str]:
    """Return what lets this process into the cluster: Ray's token, as in the local ones that ``ray.init`` starts.

    A process keeps its mode from one cluster to the next, and an explicit address leaves it as it is.
    """
    enable_token_auth_by_default()
    ensure_token_if_auth_enabled()
    return {"RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"]}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        port: int = listener.getsockname()[1]
        return port
