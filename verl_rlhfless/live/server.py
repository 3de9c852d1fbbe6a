"""The server actor of an elastic replica: verl's own vLLM server, which also pulls weights and ends without a trace."""

from __future__ import annotations

import asyncio
import os

from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

from verl_rlhfless.live.weights import PullReport, pull_into_engine
from verl_rlhfless.process_tree import ProcessTree, end_tree, inspect_tree, process_key

_WORKER_EXTENSION = "verl_rlhfless.live.engine_worker.ElasticWorkerExtension"


class ElasticServer(vLLMHttpServer):
    """A vLLM server whose weights come from the store and whose end is confirmed."""

    def _get_worker_extension_cls(self) -> str:
        return _WORKER_EXTENSION

    async def process(self) -> tuple[int, float]:
        """Return pid and create time of this actor's process."""
        return process_key(os.getpid())

    async def process_tree(self) -> ProcessTree:
        """Return everything that this actor started and that must be gone once it ended."""
        return inspect_tree(os.getpid())

    async def pull_weights(self, version: int, store_name: str, timeout_s: float) -> PullReport:
        """Load ``version`` from the store into the engine and return what was loaded.

        Raises:
            WeightStoreError: The version is not held, the pull timed out, or the loaded weights are not the
                published ones.
        """
        report = await pull_into_engine(self.engine, version=version, store_name=store_name, timeout_s=timeout_s)
        await self.clear_kv_cache()
        await self.set_global_steps(version)
        return report

    async def stop_engine(self, known: ProcessTree, timeout_s: float) -> tuple[int, ...]:
        """End the engine's processes, free their shared memory, and return the pids that survived.

        ``known`` is what the replica had when it was ready: a process that died since then left its memory behind. A
        direct kill takes well under a second; vLLM's own shutdown takes five, for state that nobody needs any more.
        """
        tree = inspect_tree(os.getpid()).union(known)
        self._server_task.cancel()
        self.engine.output_handler.cancel()  # else it reports the engine's end as a failure
        return await asyncio.to_thread(end_tree, tree, timeout_s)

    async def num_running(self) -> int:
        """Return how many requests the engine still works on; none if it is dead."""
        return 0 if self.engine.errored else len(self.engine.output_processor.request_states)
