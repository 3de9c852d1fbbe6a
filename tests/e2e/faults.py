"""Faults for the end-to-end tests, injected from outside through ``VERL_USE_EXTERNAL_MODULES``: the product has no
switch for them.

``RLHFLESS_TEST_STALE_STEP=k``: the replicas of step k are given the weights of the version before.
``RLHFLESS_TEST_KILL_STEP=k``: in step k one replica's engine is killed while it generates.
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

    trainer._start_fleet, trainer.on_sample_begin = start_stale_fleet, kill_an_engine


def _kill_when_busy(fleet: Any) -> None:
    while not fleet.replicas:
        time.sleep(0.01)
    server = fleet.replicas[0].server_handle
    while not ray.get(server.num_running.remote()):
        time.sleep(0.01)
    for pid, _ in ray.get(server.engine_processes.remote()):
        psutil.Process(pid).kill()


wrapt.register_post_import_hook(_inject, "verl_rlhfless.live.trainer")
