"""A server actor that has done its imports before it knows what it will serve; it serves one lease after the other.

Most of a cold start is imports: of verl and vLLM in the actor, and again in EngineCore and each worker. They need no
GPU, so they are done once and without a lease; what is left for the lease is the engine's own start. Between two
leases no process of an engine exists: nothing is held on a device.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from verl_rlhfless.live.server import ElasticServer
from verl_rlhfless.processes import ProcessKey, descendants
from verl_rlhfless_patches import verl_http_server, vllm_fork_server

logger = logging.getLogger(__name__)

_PRELOAD = "verl_rlhfless.live.engine_preload"


class WarmServer(ElasticServer):
    """An elastic server that is created without arguments; ``become`` makes it the server of one replica."""

    def __init__(self) -> None:
        verl_http_server.apply()
        vllm_fork_server.apply()
        vllm_fork_server.start(_PRELOAD, _sockets_of_session())

    async def wait_until_warm(self) -> None:
        """Return when the fork server has done its imports, and is given up if they spoilt it."""
        can_start = await asyncio.to_thread(vllm_fork_server.can_start_engines)
        if not can_start and vllm_fork_server.withdraw():
            logger.warning("rlhfless: an import of vLLM initialises CUDA here: engines spawn and import it themselves")

    async def engine_processes(self) -> tuple[ProcessKey, ...]:
        """Return the keys of the processes that run the engine; the fork server stays for the next one."""
        spared = vllm_fork_server.helper_pids()
        return tuple(key for key in descendants(os.getpid()) if key[0] not in spared)

    async def become(self, environment: Mapping[str, str], arguments: Mapping[str, Any]) -> None:
        """Take the role of one replica's server; the one before must have stopped its engine.

        Args:
            environment: Variables of this process and of the engine's processes.
            arguments: What verl's server class takes.
        """
        await self.wait_until_warm()  # the fork server starts no engine before, either
        os.environ.update(environment)
        super().__init__(**arguments)


def _sockets_of_session() -> Path:
    """Return the folder of Ray's own sockets, which goes with Ray's session."""
    return Path(ray._private.worker._global_node.get_sockets_dir_path())
