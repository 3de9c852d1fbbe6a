"""A server actor whose requests can be followed, cut and continued: verl's own vLLM server with our streams in front.

Elastic replicas and verl's hybrid ones run the same class.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from typing import Any

import ray
from verl.workers.rollout.replica import TokenOutput
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

from verl_rlhfless.live.engine_files import sockets_without_names
from verl_rlhfless.live.streams import EngineStreams
from verl_rlhfless.live.tickets import ENGINE_DEAD, ServerLimits
from verl_rlhfless.processes import descendants
from verl_rlhfless.shared_memory import mapped_segments, unlink_segments
from verl_rlhfless_patches import vllm_stop_strings

logger = logging.getLogger(__name__)


class RequestServer(vLLMHttpServer):
    """verl's server; it reports progress to the router, and outlives its engine to hand over what it had."""

    _reporting: asyncio.Task[None] | None = None

    async def launch_server(self, *args: Any, **kwargs: Any) -> None:
        """Launch as verl does, then follow the engine's streams.

        From then on only this actor's processes hold the engine's shared memory and sockets: nothing stays behind.
        """
        vllm_stop_strings.apply()
        with sockets_without_names():
            await super().launch_server(*args, **kwargs)
        unlink_segments(mapped_segments([os.getpid(), *(pid for pid, _ in descendants(os.getpid()))]))
        if self.node_rank == 0:
            self._streams = EngineStreams(self.engine)

    async def report_to(self, router: Any, name: str, interval_s: float) -> ServerLimits:
        """Report new tokens to ``router`` from now on, as the server ``name``; return what fits into the engine."""
        self._end_reporting()
        self._reporting = asyncio.create_task(self._report(router, name, interval_s))
        cache = self.engine.vllm_config.cache_config
        return ServerLimits(self.config.max_num_seqs, (cache.num_gpu_blocks or 0) * cache.block_size or None)

    async def abort(self, request_ids: Sequence[str]) -> None:
        """End requests with the tokens that they have, and keep the prefix cache."""
        await self._streams.abort(request_ids)

    async def generate(self, *args: Any, **kwargs: Any) -> TokenOutput:
        """Generate as verl does; when the engine is dead, what it had is returned and marked."""
        output = await super().generate(*args, **kwargs)
        if self._streams.is_dead and output.stop_reason == "aborted":
            output.extra_fields[ENGINE_DEAD] = True
        return output

    async def end_requests(self) -> None:
        """Answer every request with what it has, and stop reporting: this engine is about to end."""
        self._end_reporting()
        await self._streams.abort_all()

    def _end_reporting(self) -> None:
        if self._reporting is not None:
            self._reporting.cancel()
            self._reporting = None

    async def _report(self, router: Any, name: str, interval_s: float) -> None:
        is_dead = False
        while not is_dead:
            await asyncio.sleep(interval_s)
            delta = self._streams.take(self.global_steps)
            if not delta.parts and not delta.is_dead:
                continue
            try:
                await router.progress.remote(name, delta)
                is_dead = delta.is_dead
            except (ray.exceptions.ActorUnavailableError, ray.exceptions.RayTaskError) as error:
                logger.warning("rlhfless: the router did not take a report, which comes again: %s", error)
                self._streams.put_back(delta)
            except ray.exceptions.RayActorError:
                return  # the router ended, and the run with it


class RequestReplica(vLLMReplica):
    """verl's hybrid replica with our server in it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(RequestServer)
