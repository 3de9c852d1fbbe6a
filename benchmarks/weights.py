"""How fast weights get from a trainer into replicas through the store.

A synthetic state with the shapes of Qwen3-0.6B is published by verl's own call and pulled by one and by two replicas at
once. ``copy_out`` is the store's share of a pull: out of the object store, through verl's shared-memory protocol, to a
receiver that acknowledges. ``load`` is the whole of ``pull_into_engine``, with a worker that copies every tensor into a
parameter and computes both checksums. Publishing always includes the checksums. The first version touches fresh pages
of the object store, later ones reuse them: ``first`` and the median of the rest are apart.

    python -m benchmarks.weights          # about 2 minutes, 11 GB of memory; writes benchmarks/results/weights.json
"""

from __future__ import annotations

import asyncio
import math
import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import ray
import torch

from benchmarks import command
from benchmarks.record import write_result
from verl_rlhfless.config import WeightsConfig
from verl_rlhfless.live.weight_store import connect, create_store

Shapes = dict[str, tuple[int, ...]]

_STATE_BYTES = 2 * 10**9
_VERSIONS = 6
_REPEATS = 5
_BUCKET_MIB = 256
_OBJECT_STORE_BYTES = 75 * 10**8  # two versions and buckets in flight in the 80 % that Ray fills before it spills
_NEEDED_BYTES = 11 * 10**9
_WAIT_S = 300.0
_TARGET_GB_S, _TARGET_TINY_S = 1.0, 1.0


def qwen_shapes(itemsize: int, num_bytes: int) -> Shapes:
    """Return the tensors of Qwen3-0.6B, with as many layers as fit into ``num_bytes``."""
    hidden, mlp = 1024, 3072
    layer: Shapes = {
        "self_attn.q_proj.weight": (2048, hidden),
        "self_attn.k_proj.weight": (1024, hidden),
        "self_attn.v_proj.weight": (1024, hidden),
        "self_attn.o_proj.weight": (hidden, 2048),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    embedding = (151936, hidden)
    layer_bytes = itemsize * sum(math.prod(shape) for shape in layer.values())
    num_layers = (num_bytes - itemsize * math.prod(embedding)) // layer_bytes
    layers = {f"layers.{index}.{name}": shape for index in range(num_layers) for name, shape in layer.items()}
    return {"embed_tokens.weight": embedding, **layers}


def tiny_shapes() -> Shapes:
    """Return a model of about one million parameters."""
    return {"embed_tokens.weight": (2048, 128), **{f"layers.{index}.weight": (256, 256) for index in range(12)}}


class Publisher:
    """Trainer rank 0, with verl's checkpoint engine."""

    async def prepare(self, store_name: str, shapes: Shapes, dtype: torch.dtype) -> int:
        """Make a random state; return its bytes."""
        from verl.checkpoint_engine.base import CheckpointEngineRegistry

        from verl_rlhfless.live import weight_engine

        self.engine = CheckpointEngineRegistry.new(
            weight_engine.BACKEND, bucket_size=0, is_master=True, store_name=store_name, bucket_mib=_BUCKET_MIB
        )
        self.state = {name: torch.empty(shape, dtype=dtype).normal_() for name, shape in shapes.items()}
        return sum(tensor.nbytes for tensor in self.state.values())

    async def publish(self, version: int) -> float:
        """Return the seconds from verl's call to the visible version."""
        return float((await self.engine.send_weights(iter(self.state.items()), global_steps=version))["seconds"])


class Worker:
    """The engine worker of a replica, in a process of its own, as vLLM's is."""

    def __init__(self, dtype: torch.dtype) -> None:
        from verl_rlhfless.live.engine_worker import ReceivedWeights

        self._new_record: Callable[[], Any] = lambda: ReceivedWeights(dtype, is_tied=False)
        self._parameters: dict[str, torch.Tensor] = {}

    def receive(self, handle: str, loads: bool) -> None:
        """Receive a version; with ``loads``, also checksum it and copy it into parameters."""
        from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver

        from verl_rlhfless.live.weight_slices import Joiner, Slice

        self._record, joiner = self._new_record(), Joiner()

        def on_bucket(weights: list[tuple[str | Slice, torch.Tensor]], is_last: bool) -> None:
            for name, tensor in joiner.join(weights) if loads else ():
                self._record.add(name, tensor)
                if name not in self._parameters:
                    self._parameters[name] = torch.empty_like(tensor)
                self._parameters[name].copy_(tensor)

        BucketedWeightReceiver(handle, torch.device("cpu"), use_shm=True).receive_weights(on_bucket)

    def checksum(self) -> dict[str, Any]:
        """Return what the worker extension in vLLM returns."""
        from verl_rlhfless.live.checksum import as_unsigned, bit_sum

        loaded = as_unsigned(sum(int(bit_sum(parameter)) for parameter in self._parameters.values()))
        return {
            "rank": 0,
            "received": self._record.digest(),
            "expected_sum": f"{self._record.expected_sum():016x}",
            "loaded_sum": f"{loaded:016x}",
            "incomparable": "",
        }


class Replica:
    """The server actor of a replica; its engine is one :class:`Worker`."""

    async def prepare(self, worker: Any, store_name: str) -> None:
        """Import what a server has imported anyway, and wait for the worker."""
        from verl_rlhfless.live import weights  # noqa: F401

        self._worker, self._store_name = worker, store_name
        self._handle = f"ipc:///tmp/rlhfless-bench-{os.getpid()}.sock"
        await worker.__ray_ready__.remote()

    async def collective_rpc(self, method: str, timeout: float, kwargs: dict[str, Any]) -> list[Any]:
        """Answer as vLLM's engine does."""
        if method == "_get_zmq_handle":
            return [self._handle]
        if method == "weights_checksum":
            return [await self._worker.checksum.remote()]
        return [await self._worker.receive.remote(self._handle, True)]

    async def load(self, version: int) -> float:
        """Return the seconds of a whole pull."""
        from verl_rlhfless.live.weights import pull_into_engine

        started = time.monotonic()
        report = await pull_into_engine(self, version=version, store_name=self._store_name, timeout_s=_WAIT_S)
        assert report.compared == "loaded"
        return time.monotonic() - started

    async def copy_out(self, version: int) -> float:
        """Return the seconds until the last bucket was acknowledged."""
        from verl_rlhfless.live.weight_channel import BoundedSender
        from verl_rlhfless.live.weight_reader import read_slices

        started = time.monotonic()
        manifest = await connect(self._store_name).manifest.remote(version, _WAIT_S)
        sender = BoundedSender(self._handle, manifest.bucket_bytes, started + _WAIT_S, threading.Event())

        def send() -> None:
            asyncio.run(sender.send(read_slices(manifest, manifest.bucket_bytes, _WAIT_S)))

        receiving = self._worker.receive.remote(self._handle, False)
        await asyncio.to_thread(send)
        await receiving
        return time.monotonic() - started


class Bench:
    """A store, a publisher and two replicas for one state."""

    def __init__(self, name: str, shapes: Shapes, dtype: torch.dtype) -> None:
        self._store = create_store(name, WeightsConfig(name="store", bucket_mib=_BUCKET_MIB, max_versions=2))
        actor = ray.remote(num_cpus=0)
        self._publisher = actor(Publisher).remote()
        self._workers = [actor(Worker).remote(dtype) for _ in range(2)]
        self._replicas = [actor(Replica).remote() for _ in range(2)]
        pairs = zip(self._replicas, self._workers, strict=True)
        ready = [replica.prepare.remote(worker, name) for replica, worker in pairs]
        ready.append(self._store.versions.remote())
        self.num_bytes, *_ = ray.get([self._publisher.prepare.remote(name, shapes, dtype), *ready], timeout=_WAIT_S)

    def run(self) -> dict[str, Any]:
        """Return the seconds of every publication and pull."""
        published = [ray.get(self._publisher.publish.remote(v), timeout=_WAIT_S) for v in range(_VERSIONS)]
        return {
            "bytes": self.num_bytes,
            "publish": self._summary(published),
            "copy_out": self._summary([self._pull("copy_out", 1) for _ in range(_REPEATS)]),
            "copy_out_by_each_of_two": self._summary([self._pull("copy_out", 2) for _ in range(_REPEATS)]),
            "load": self._summary([self._pull("load", 1) for _ in range(_REPEATS)]),
        }

    def _pull(self, method: str, num_replicas: int) -> float:
        """Return the seconds of the slowest of some replicas that pull at once."""
        calls = [getattr(replica, method).remote(_VERSIONS - 1) for replica in self._replicas[:num_replicas]]
        return float(max(ray.get(calls, timeout=_WAIT_S)))

    def _summary(self, seconds: list[float]) -> dict[str, Any]:
        median = statistics.median(seconds[1:])
        return {
            "seconds": seconds,
            "first_s": seconds[0],
            "median_later_s": median,
            "median_later_gb_per_s": self.num_bytes / 1e9 / median,
        }

    def close(self) -> None:
        """End every actor, so that its memory is free."""
        for actor in (self._publisher, *self._replicas, *self._workers, self._store):
            ray.kill(actor)


def memcpy_gb_per_s() -> float:
    """Return how fast one thread copies warm memory: the limit of anything here."""
    source, target = torch.ones(2**28, dtype=torch.uint8), torch.empty(2**28, dtype=torch.uint8)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - started)
    return source.nbytes / 1e9 / statistics.median(seconds[1:])


def main() -> None:
    """Measure and record."""
    if psutil.virtual_memory().available < _NEEDED_BYTES:
        raise SystemExit(f"benchmarks.weights: needs {_NEEDED_BYTES / 1e9:g} GB of free memory")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VERL_PLATFORM", "cpu")
    results: dict[str, Any] = {
        "load_average_before": os.getloadavg()[0],
        "target_gb_per_s": _TARGET_GB_S,
        "target_tiny_s": _TARGET_TINY_S,
        "memcpy_gb_per_s": memcpy_gb_per_s(),
    }
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level="ERROR",
    )
    cases: dict[str, tuple[Shapes, torch.dtype]] = {
        "float32": (qwen_shapes(4, _STATE_BYTES), torch.float32),
        "bfloat16": (qwen_shapes(2, _STATE_BYTES), torch.bfloat16),
        "tiny": (tiny_shapes(), torch.float32),
    }
    try:
        for name, (shapes, dtype) in cases.items():
            bench = Bench(f"weights-{name}", shapes, dtype)
            results[name] = bench.run()
            bench.close()
    finally:
        ray.shutdown()
    tiny = results["tiny"]
    tiny["publish_and_load_s"] = tiny["publish"]["median_later_s"] + tiny["load"]["median_later_s"]
    write_result("weights", results, command="python -m benchmarks.weights")


if __name__ == "__main__":
    command.run(main, __doc__)
