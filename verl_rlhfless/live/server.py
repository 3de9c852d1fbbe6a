"""The server actor of an elastic replica: a request server that also pulls weights, and whose end is confirmed."""

from __future__ import annotations

import asyncio
import os

from verl_rlhfless.live.available_memory import available_bytes
from verl_rlhfless.live.engine_death import ends_with_engine
from verl_rlhfless.live.engine_files import end_engine
from verl_rlhfless.live.parked_memory import ParkedMemory, measure_parked
from verl_rlhfless.live.request_server import RequestServer
from verl_rlhfless.live.variables import LEASE_VARIABLE
from verl_rlhfless.live.weights import PullReport, pull_into_engine
from verl_rlhfless.processes import ProcessKey, descendants, process_key

_WORKER_EXTENSION = "verl_rlhfless.live.engine_worker.ElasticWorkerExtension"


class ElasticServer(RequestServer):
    """A request server whose weights come from the store and whose end is confirmed."""

    def _get_worker_extension_cls(self) -> str:
        return _WORKER_EXTENSION

    async def process(self) -> ProcessKey:
        """Return the key of this actor's process."""
        return process_key(os.getpid())

    async def engine_processes(self) -> tuple[ProcessKey, ...]:
        """Return the keys of the processes that run the engine and that must be gone once it ended."""
        return descendants(os.getpid())

    @ends_with_engine
    async def pull_weights(self, version: int, store_name: str, timeout_s: float) -> PullReport:
        """Load ``version`` from the store into the engine and return what was loaded.

        Raises:
            WeightStoreError: The version is not held, the pull timed out, or the loaded weights are not the
                published ones.
        """
        if self.config.enable_sleep_mode and self.engine.vllm_config.quant_config is not None:
            await self._release_for_copies()
        report = await pull_into_engine(self.engine, version=version, store_name=store_name, timeout_s=timeout_s)
        if await self.engine.is_sleeping():
            await self.engine.wake_up(tags=["kv_cache"])
            await self.resume_generation()
        await self.clear_kv_cache()
        await self.set_global_steps(version)
        return report

    async def _release_for_copies(self) -> None:
        """Let keys and values of an engine that has just started sleep while it loads.

        verl keeps a copy of quantised weights that their kernel has repacked until the last one is there.
        """
        if not await self.engine.is_sleeping():
            await self.engine.sleep(level=self._resolve_sleep_level())
            await self.engine.wake_up(tags=["weights"])

    @ends_with_engine
    async def park(self) -> ParkedMemory:
        """Put the engine to sleep, and return what it still holds; requests are refused meanwhile.

        On a CPU vLLM frees nothing.
        """
        await self.end_requests()
        await self.abort_all_requests(reject_request=True)
        await self.engine.sleep(level=self._resolve_sleep_level())  # verl's: what is dropped, the store can restore
        devices = await self.engine.collective_rpc("device_memory")
        return measure_parked(devices, await self.engine_processes())

    @ends_with_engine
    async def wake(self, lease: str) -> None:
        """Wake the engine's weights on the lease of this name, on the devices that it slept on; they are to be pulled.

        Keys and values sleep on until they are, as in verl's weight sync: loading may need a copy of the weights.
        """
        os.environ[LEASE_VARIABLE] = lease
        await self.engine.collective_rpc("change_lease", args=(lease,))
        await self.engine.wake_up(tags=["weights"])

    async def host_available_bytes(self) -> int:
        """Return the memory that processes of this node can still get."""
        return available_bytes()

    async def stop_engine(self, timeout_s: float) -> tuple[int, ...]:
        """End the engine's processes and return the pids that survived.

        A direct kill takes well under a second; vLLM's own shutdown takes five, for state that nobody needs any more.
        """
        await self.end_requests()
        self._server_task.cancel()
        self.engine.output_handler.cancel()  # else it reports the engine's end as a failure
        survivors = await asyncio.to_thread(end_engine, await self.engine_processes(), timeout_s)
        await asyncio.wait([self._server_task], timeout=timeout_s)
        self.engine.shutdown()  # closes sockets and threads of a client whose engine is gone
        return survivors

    async def is_alive(self) -> bool:
        """Return whether the engine works."""
        return not self.engine.errored

    async def num_running(self) -> int:
        """Return how many requests the engine still works on; none if it is dead."""
        return 0 if self.engine.errored else len(self.engine.output_processor.request_states)
