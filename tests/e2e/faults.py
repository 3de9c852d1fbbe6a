"""Faults for the end-to-end tests, injected from outside through ``VERL_USE_EXTERNAL_MODULES``: the product has no
switch for them.

``RLHFLESS_TEST_STALE_STEP=k``: the replicas of step k are given the weights of the version before.
``RLHFLESS_TEST_KILL_STEP=k``: in step k one replica's engine is killed while it generates.
``RLHFLESS_TEST_LOSE_NODE_STEP=k``: in step k the node of a replica is lost while it generates, with all on it; not
the driver's node.
"""

from __future__ import annotations

import os
import threading
import time
from types import ModuleType
from typing import Any

import psutil
import ray
import wrapt


def _step(variable: str) -> int:
    return int(os.environ.get(variable, "0"))


def _inject(trainer_module: ModuleType) -> None:
    trainer = trainer_module.ElasticTrainerSync
    start_fleet, on_sample_begin = trainer._start_fleet, trainer.on_sample_begin

    def start_stale_fleet(self: Any, decision: Any) -> None:
        current = self._version
        if decision.step == _step("RLHFLESS_TEST_STALE_STEP"):
            self._version = current - 1
        try:
            start_fleet(self, decision)
        finally:
            self._version = current

    def kill_an_engine(self: Any) -> None:
        on_sample_begin(self)
        if self.global_steps == _step("RLHFLESS_TEST_KILL_STEP"):
            threading.Thread(target=_kill_when_busy, args=(self._fleet,), daemon=True).start()
        if self.global_steps == _step("RLHFLESS_TEST_LOSE_NODE_STEP"):
            threading.Thread(target=_lose_node_when_busy, args=(self._fleet,), daemon=True).start()

    trainer._start_fleet, trainer.on_sample_begin = start_stale_fleet, kill_an_engine


def _kill_when_busy(fleet: Any) -> None:
    while not fleet.replicas:
        time.sleep(0.01)
    server = fleet.replicas[0].server_handle
    while not ray.get(server.num_running.remote()):
        time.sleep(0.01)
    for pid, _ in ray.get(server.engine_processes.remote()):
        psutil.Process(pid).kill()


def _lose_node_when_busy(fleet: Any) -> None:
    own = ray.get_runtime_context().get_node_id()
    while True:
        for replica in list(fleet.replicas):
            node = replica.lease.nodes[0].node_id if replica.lease else own
            if node != own and ray.get(replica.server_handle.num_running.remote()):
                _kill_node(node)
                return
        time.sleep(0.01)


def _kill_node(node_id: str) -> None:
    """End a node as a lost machine ends: its raylet at once with every process below it."""
    (socket,) = [node["RayletSocketName"] for node in ray.nodes() if node["NodeID"] == node_id]
    raylets = [process for process in psutil.process_iter(["cmdline"]) if _has(process, socket)]
    everything = [each for raylet in raylets for each in (*raylet.children(recursive=True), raylet)]
    for process in everything:
        process.suspend()  # so that none acts on the end of another
    for process in everything:
        process.kill()


def _has(process: psutil.Process, socket: str) -> bool:
    return f"--raylet_socket_name={socket}" in (process.info["cmdline"] or ())


wrapt.register_post_import_hook(_inject, "verl_rlhfless.live.trainer")
