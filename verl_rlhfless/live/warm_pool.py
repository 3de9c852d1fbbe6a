"""Server actors that did their imports in advance, so that a lease waits for the start of an engine only.

In waiting they hold no GPU and no lease: about 1.2 GB of host memory each, with their fork server.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.plugin.platform import get_platform

from verl_rlhfless.live.accelerator import Accelerator
from verl_rlhfless.live.warm_server import WarmServer
from verl_rlhfless.processes import ProcessKey

_RAY_DEFAULT_CONCURRENCY = 1000
_ANSWER_S = 1.0  # of a server that has done its imports; at a run's start some have not
_CONTROL_CALLS = 64  # calls of ours and verl's that must get through while every request of the engine waits


class WarmPool:
    """At most ``size`` servers in waiting. Where none is, a replica gets a new one that imports while leased."""

    def __init__(self, size: int, max_num_seqs: int) -> None:
        """Keep ``size`` servers, each for engines of at most ``max_num_seqs`` running requests."""
        self._size = size
        self._max_concurrency = max(_RAY_DEFAULT_CONCURRENCY, max_num_seqs + _CONTROL_CALLS)
        self._waiting: dict[str, deque[Any]] = {}

    @property
    def num_waiting(self) -> int:
        """Servers that nobody has taken."""
        return sum(map(len, self._waiting.values()))

    def fill(self) -> None:
        """Create servers until the pool is full, on the nodes with accelerators in turn.

        Returns at once; they do their imports in the background.
        """
        nodes = _accelerator_nodes()
        for index in range(self._size - self.num_waiting if nodes else 0):
            node_id = nodes[index % len(nodes)]
            self._waiting.setdefault(node_id, deque()).append(self._create(node_id))

    async def wait_warm(self, count: int, timeout_s: float) -> None:
        """Return when ``count`` servers in waiting have done their imports, or all that live; or after a time-out."""
        if count <= 0:
            return
        warming = {asyncio.ensure_future(_is_warm(server)) for servers in self._waiting.values() for server in servers}
        deadline_s, num_warm = time.monotonic() + timeout_s, 0
        while warming and num_warm < count and (left_s := deadline_s - time.monotonic()) > 0:
            done, warming = await asyncio.wait(warming, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            num_warm += sum(task.result() for task in done)
        for task in warming:
            task.cancel()

    async def forget_dead(self) -> None:
        """Forget servers in waiting that have ended, so that no plan counts with them; one may still import."""
        asked = {
            asyncio.ensure_future(_ended(server)): (waiting, server)
            for waiting in self._waiting.values()
            for server in waiting
        }
        answered, silent = await asyncio.wait(asked, timeout=_ANSWER_S) if asked else ((), ())
        for task in silent:
            task.cancel()
        for waiting, server in (asked[task] for task in answered if task.result()):
            waiting.remove(server)

    async def take(self, node_id: str) -> tuple[Any, ProcessKey]:
        """Return a server on the node and its process: one in waiting that still lives, else a new one."""
        waiting = self._waiting.get(node_id, deque())
        while waiting:
            server = waiting.popleft()
            with contextlib.suppress(ray.exceptions.RayError):
                return server, await server.process.remote()
        server = self._create(node_id)
        return server, await server.process.remote()

    def give_back(self, node_id: str, server: Any) -> None:
        """Keep a server whose engine has ended for the next replica on its node, or end it when the pool is full."""
        if self.num_waiting < self._size:
            self._waiting.setdefault(node_id, deque()).append(server)
        else:
            ray.kill(server)

    def close(self) -> None:
        """End the servers that nobody has taken."""
        for waiting in self._waiting.values():
            for server in waiting:
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.kill(server)
        self._waiting.clear()

    def _create(self, node_id: str) -> Any:
        return (
            ray.remote(WarmServer)
            .options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False),
                runtime_env={"env_vars": _environment()},
                max_concurrency=self._max_concurrency,
                num_cpus=0,
            )
            .remote()
        )


async def _ended(server: Any) -> bool:
    """Return whether a server has ended, when that is known."""
    try:
        await server.process.remote()
    except ray.exceptions.RayError as error:
        return not isinstance(error, ray.exceptions.ActorUnavailableError)
    return False


async def _is_warm(server: Any) -> bool:
    """Return whether a server has done its imports, when it has; one that is dead has not."""
    try:
        await server.wait_until_warm.remote()
    except ray.exceptions.RayError:
        return False
    return True


def _environment() -> Mapping[str, str]:
    platform = get_platform()
    return {**dict.fromkeys(platform.ray_noset_envvars(), "1"), **platform.rollout_env_vars()}


def _accelerator_nodes() -> list[str]:
    resource = Accelerator.of_platform().resource
    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get(resource, 0) > 0]
