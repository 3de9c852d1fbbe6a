"""A model in Hugging Face transformers, for machines where vLLM cannot be installed.

A decode step reads all weights and the keys and values of a full context, as an engine's does; nothing is copied that
an engine would not copy. Without CUDA graphs Python's launches are the step (``decode_eager``): the calibration takes
the steps that are replayed from a graph (``decode``).
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

from benchmarks.gpu.device import Device
from benchmarks.gpu.rows import Row, timed
from benchmarks.gpu.workload import Workload
from verl_rlhfless.policy.perf import EnginePerf

_WARM_UP = 3


class FullLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of a full context, ``[batch, kv_heads, context, head_dim]``; a step overwrites the last token."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1


class TransformersSubject:
    """One model with random weights on one device.

    Args:
        model: Folder of its ``config.json``.
        perf: Its performance model: shape, and what fits beside the weights.
        workload: The points.
        device: Where it runs.
    """

    def __init__(self, model: Path, perf: EnginePerf, workload: Workload, device: Device) -> None:
        self._folder, self._perf, self._workload = model, perf, workload
        self._device = torch.device(device.torch_name)
        self._dtype = torch.bfloat16 if device.is_gpu else torch.float32  # which CPUs are fast at
        self._start_s = 0.0

    @property
    def parts(self) -> dict[str, Callable[[], list[Row]]]:
        """What can be measured here; a CPU has no graphs, so its steps are the eager ones."""
        has_graphs = self._device.type == "cuda"
        decode = {"decode": self._decode_graph, "decode_eager": self._decode_eager}
        decode = decode if has_graphs else {"decode": lambda: self._decode("decode", self._eager)}
        return {**decode, "prefill": self._prefill, "load": self._load, "start": self._start}

    def close(self) -> None:
        """Drop the model."""
        self.__dict__.pop("_model", None)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @cached_property
    def _model(self) -> Any:
        started = time.perf_counter()
        config = AutoConfig.from_pretrained(self._folder)
        with self._device:
            model = AutoModelForCausalLM.from_config(config, dtype=self._dtype, attn_implementation="sdpa")
        model.requires_grad_(False).eval()
        self._wait()
        self._start_s = time.perf_counter() - started
        return model

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _start(self) -> list[Row]:
        assert self._model is not None
        return [Row.of("build", [self._start_s])]

    def _decode_graph(self) -> list[Row]:
        return self._decode("decode", self._captured)

    def _decode_eager(self) -> list[Row]:
        return self._decode("decode_eager", self._eager)

    def _decode(self, what: str, prepare: Callable[[Callable[[], Any]], Callable[[], Any]]) -> list[Row]:
        rows = []
        for batch, context in self._workload.decode_points(self._perf):
            step = prepare(self._decode_step(batch, context))
            count = self._workload.iterations

            def run(step: Callable[[], Any] = step, count: int = count) -> None:
                for _ in range(count):
                    step()

            seconds = [taken / count for taken in timed(run, self._workload.repeats, self._wait)]
            rows.append(Row.of(what, seconds, decodes=batch, context_tokens=batch * context))
        return rows

    def _decode_step(self, batch: int, context: int) -> Callable[[], torch.Tensor]:
        """Return a step of ``batch`` requests that have ``context`` tokens each: forward pass and greedy token."""
        shape, device = self._perf.shape, self._device
        size = (batch, shape.kv_heads, context, shape.head_dim)
        layers = [FullLayer(*torch.randn(2, *size, dtype=self._dtype, device=device)) for _ in range(shape.layers)]
        tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
        return self._forward(tokens, context - 1, Cache(layers=layers))

    def _forward(self, tokens: torch.Tensor, first: int, cache: Cache | None) -> Callable[[], torch.Tensor]:
        """Return a pass over ``tokens [batch, n]`` at positions from ``first`` on that picks the next token of each."""
        positions = torch.arange(first, first + tokens.shape[1], device=self._device).expand(tokens.shape)
        model = self._model

        @torch.inference_mode()
        def forward() -> torch.Tensor:
            hidden = model.model(
                input_ids=tokens,
                position_ids=positions,
                # Already prepared, and empty: a mask would keep the kernels from sharing KV heads.
                attention_mask={"full_attention": None},
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state
            return torch.as_tensor(model.lm_head(hidden[:, -1]).argmax(-1))

        return forward

    def _eager(self, step: Callable[[], Any]) -> Callable[[], Any]:
        for _ in range(_WARM_UP):
            step()
        return step

    def _captured(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """Return the replay of a step's kernels as one CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # capture wants what is lazy to be done, on a stream that is not the default
            self._eager(step)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return self._eager(graph.replay)

    def _prefill(self) -> list[Row]:
        rows = []
        for count in self._workload.prompts:
            step = self._eager(self._forward(torch.zeros(1, count, dtype=torch.long, device=self._device), 0, None))
            rows.append(Row.of("prefill", timed(step, self._workload.repeats, self._wait), prefill_tokens=count))
        return rows

    def _load(self) -> list[Row]:
        """Copy a whole version from host memory into the parameters, from pageable and from pinned memory."""
        tensors = list(self._model.parameters())
        largest = max(tensor.numel() for tensor in tensors)
        rows = []
        for what, pinned in {"load": False, "load_pinned": True}.items():
            if pinned and self._device.type != "cuda":
                continue
            host = torch.zeros(largest, dtype=self._dtype, pin_memory=pinned)

            def load(host: torch.Tensor = host) -> None:
                with torch.inference_mode():
                    for tensor in tensors:
                        tensor.copy_(host[: tensor.numel()].view(tensor.shape), non_blocking=True)

            load()
            num_bytes = sum(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors)
            rows.append(Row.of(what, timed(load, self._workload.repeats, self._wait), num_bytes=num_bytes))
        return rows
