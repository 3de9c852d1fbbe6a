"""A vLLM engine as verl starts it (AsyncLLM, engine in a process of its own), with random weights of the real shape."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable, Coroutine
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.device import Device, device_memory_bytes
from benchmarks.gpu.rows import Row
from benchmarks.gpu.workload import Workload
from verl_rlhfless.policy.perf import BLOCK_TOKENS, EnginePerf

_WAIT_S = 300.0
_ABORTED, _ABORT_AFTER_S = 32, 1.0
_CPU_ENVIRONMENT = {"VERL_PLATFORM": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
_CPU_ENVIRONMENT |= {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


class VllmSubject:
    """One engine of tensor-parallel size 1.

    Args:
        model: Folder of the model's ``config.json``.
        perf: Its performance model: shape, limits, and what fits beside the weights.
        workload: The points.
        device: Where it runs.
    """

    def __init__(self, model: Path, perf: EnginePerf, workload: Workload, device: Device) -> None:
        self._folder, self._perf, self._workload, self._device = model, perf, workload, device
        self._loop = asyncio.new_event_loop()
        self._ids = itertools.count()
        self._seeds = itertools.count(1)
        self._start_s = 0.0
        os.environ.update(_ENVIRONMENT if device.is_gpu else _ENVIRONMENT | _CPU_ENVIRONMENT)

    @property
    def parts(self) -> dict[str, Callable[[], list[Row]]]:
        """What can be measured here: vLLM sleeps on GPUs only, a pull needs verl and Ray."""
        found: dict[str, Callable[[], Coroutine[Any, Any, list[Row]]]] = {
            "start": self._start,
            "decode": self._decode,
            "prefill": self._prefill,
            "abort": self._abort,
        }
        if self._has_pull:
            found["pull"] = self._pull
        if self._device.is_gpu:
            found["sleep"] = self._sleep  # last: after level 2 the weights are gone
        return {name: lambda part=part: self._run(part()) for name, part in found.items()}  # type: ignore[misc]

    def close(self) -> None:
        """End the engine's processes."""
        if "_engine" in self.__dict__:
            self._run(self._shut_down())
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, list[Row]]) -> list[Row]:
        return self._loop.run_until_complete(work)

    async def _shut_down(self) -> list[Row]:
        self._engine.shutdown()
        return []

    @property
    def _has_pull(self) -> bool:
        return all(find_spec(name) is not None for name in ("verl", "ray"))

    @cached_property
    def _engine(self) -> Any:
        started = time.perf_counter()
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        limits, is_gpu = self._perf.limits, self._device.is_gpu
        extension = "verl_rlhfless.live.engine_worker.ElasticWorkerExtension"
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(self._folder),
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype="bfloat16" if is_gpu else "float32",
                max_model_len=self._workload.max_model_len,
                max_num_seqs=limits.max_num_seqs,
                max_num_batched_tokens=limits.max_batched_tokens,
                gpu_memory_utilization=limits.memory_utilization,
                enable_prefix_caching=True,
                enable_sleep_mode=is_gpu,
                enforce_eager=not is_gpu,
                distributed_executor_backend="mp",
                worker_extension_cls=extension if self._has_pull else "",
                disable_log_stats=True,
            )
        )
        self._start_s = time.perf_counter() - started
        return engine

    async def _start(self) -> list[Row]:
        """Time the start, imports and capture of CUDA graphs included, and note the cache's size."""
        engine = self._engine
        blocks = engine.vllm_config.cache_config.num_gpu_blocks
        tokens = blocks * engine.vllm_config.cache_config.block_size
        return [Row.of("start", [self._start_s]), Row.of("cache", [0.0], context_tokens=tokens)]

    async def _generate(self, prompt: list[int], num_tokens: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=num_tokens,
            ignore_eos=True,
            detokenize=False,
            temperature=1.0,
            logprobs=0,  # of the sampled token, which is what verl asks for
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async for _ in self._engine.generate({"prompt_token_ids": prompt}, params, f"kit-{next(self._ids)}"):
            pass

    async def _together(self, prompts: list[list[int]], num_tokens: int) -> float:
        """Return the seconds in which all prompts get ``num_tokens`` tokens."""
        started = time.perf_counter()
        await asyncio.wait_for(asyncio.gather(*(self._generate(prompt, num_tokens) for prompt in prompts)), _WAIT_S)
        return time.perf_counter() - started

    def _prompts(self, batch: int, length: int) -> list[list[int]]:
        """Return prompts that share no prefix with each other, nor with any before."""
        vocab = self._perf.shape.vocab
        seeds = [next(self._seeds) for _ in range(batch)]
        return [[seed % vocab, seed // vocab % vocab] + [seed % vocab] * (length - 2) for seed in seeds]

    async def _decode(self) -> list[Row]:
        """Time runs of different length over prompts that are cached: their difference is decoding and nothing else."""
        count, rows = self._workload.iterations, []
        await self._together(self._prompts(2, 32), 4)
        for batch, context in self._workload.decode_points(self._perf):
            prompts = self._prompts(batch, context)
            await self._together(prompts, 1)
            seconds = []
            for _ in range(self._workload.repeats):
                short = await self._together(prompts, 2)
                seconds.append((await self._together(prompts, 2 + count) - short) / count)
            grown = batch * (context + 2 + count // 2)
            rows.append(Row.of("decode", seconds, decodes=batch, context_tokens=grown))
            await self._engine.reset_prefix_cache()
        return rows

    async def _prefill(self) -> list[Row]:
        rows = []
        for count in self._workload.prompts:
            fresh = [self._prompts(1, count) for _ in range(self._workload.repeats)]
            seconds = [await self._together(prompts, 1) for prompts in fresh]
            rows.append(Row.of("prefill", seconds, prefill_tokens=count))
        await self._engine.reset_prefix_cache()
        return rows

    async def _abort(self) -> list[Row]:
        """Time what verl does to cut: running requests are aborted, and the engine takes the next one."""
        room = self._workload.max_model_len - 2 * BLOCK_TOKENS
        seconds = []
        for _ in range(self._workload.repeats):
            prompts = self._prompts(min(_ABORTED, max(self._workload.batches)), BLOCK_TOKENS)
            running = [asyncio.ensure_future(self._generate(prompt, room)) for prompt in prompts]
            await asyncio.sleep(_ABORT_AFTER_S)
            started = time.perf_counter()
            await self._engine.pause_generation(wait_for_inflight_requests=False, clear_cache=False)
            await asyncio.wait_for(asyncio.gather(*running), _WAIT_S)
            seconds.append(time.perf_counter() - started)
            await self._engine.resume_generation()
        return [Row.of("abort", seconds, decodes=len(prompts))]

    async def _pull(self) -> list[Row]:
        """Time a replica's pull: from the weight store in this node's memory into the engine, checksums included."""
        from benchmarks.gpu.weight_pull import pulled

        return await pulled(self._engine, self._folder, self._workload.repeats)

    async def _sleep(self) -> list[Row]:
        rows = []
        for level in (1, 2):
            asleep, awake = [], []
            for _ in range(self._workload.repeats):
                started = time.perf_counter()
                await self._engine.sleep(level=level)
                asleep.append(time.perf_counter() - started)
                held = device_memory_bytes()
                started = time.perf_counter()
                await self._engine.wake_up()
                awake.append(time.perf_counter() - started)
            rows.append(Row.of(f"sleep_{level}", asleep, num_bytes=held))
            rows.append(Row.of(f"wake_{level}", awake))
        return rows
