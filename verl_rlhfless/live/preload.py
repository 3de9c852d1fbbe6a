"""Imports that a process needs with its first request, done while it waits for one."""

from __future__ import annotations

import importlib
import threading

SERVER_MODULE = "verl.workers.rollout.vllm_rollout.vllm_async_server"
"""What a handle of a server brings with it: Ray's signatures of its methods name classes of vLLM."""


def import_in_background(module: str) -> None:
    """Import a module in a thread; a failure shows where the module is needed."""

    def load() -> None:
        importlib.import_module(module)

    threading.Thread(target=load, name=f"rlhfless-import-{module}", daemon=True).start()
