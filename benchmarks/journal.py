"""What following a replica's streams costs it: the same generation on a real engine with the journal and without.

With: our generator in front of the engine's, and a report of all new tokens and log-probs to a router every 0.5 s.
Without: verl's server as it is. In turn, and the order changes with each pair. Processor seconds are those of the
server's process, in which all of the cost arises.

    python -m benchmarks.journal          # about 3 minutes; writes benchmarks/results/journal.json
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

from benchmarks import command
from benchmarks.controlled_router import new_router
from benchmarks.engines import Engines
from benchmarks.record import write_result
from verl_rlhfless.ab.cluster import private_cluster
from verl_rlhfless.demo.recipe import CPU_ENVIRONMENT
from verl_rlhfless.live.streams import EngineStreams
from verl_rlhfless.live.warm_server import WarmServer

_PAIRS, _BATCH, _TOKENS, _INTERVAL_S = 20, 32, 256, 0.5
_TIMEOUT_S = 600.0


class _Server(WarmServer):
    async def measure(self, router: Any) -> dict[str, list[list[float]]]:
        """Return wall and processor seconds of each generation, with the journal and without."""
        plain = self._streams._generate
        seconds: dict[str, list[list[float]]] = {"with": [], "without": []}
        for pair in range(_PAIRS + 1):
            for way in ("with", "without") if pair % 2 else ("without", "with"):
                self.engine.generate = plain
                if way == "with":
                    self._streams = EngineStreams(self.engine)
                    await self.report_to(router, "s", _INTERVAL_S)
                spent = await self._generate_batch()
                self._end_reporting()
                if pair:  # the first one warms up
                    seconds[way].append(spent)
        return seconds

    async def _generate_batch(self) -> list[float]:
        start, processor = time.perf_counter(), time.process_time()
        params = {"temperature": 1.0, "logprobs": True, "max_tokens": _TOKENS, "ignore_eos": True}
        calls = [self.generate([5 + i] * 32, dict(params), f"{start}-{i}") for i in range(_BATCH)]
        outputs = await asyncio.gather(*calls)
        assert all(len(output.token_ids) == _TOKENS for output in outputs)
        return [time.perf_counter() - start, time.process_time() - processor]


async def measure(folder: Path) -> dict[str, Any]:
    """Return the medians and the median of the paired ratios."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    engines = Engines(folder, "data.max_response_length=256", "actor_rollout_ref.rollout.max_model_len=768")
    actor = ray.remote(_Server).options(num_cpus=0, runtime_env={"env_vars": CPU_ENVIRONMENT}).remote()
    name, server = await engines.start(actor)
    seconds = await asyncio.wait_for(server.measure.remote(new_router({name: server})), _TIMEOUT_S)
    assert not await server.stop_engine.remote(30.0)
    pairs = list(zip(seconds["with"], seconds["without"], strict=True))
    tokens = _BATCH * _TOKENS
    extra = [(ours[1] - plain[1]) / tokens * 1e6 for ours, plain in pairs]
    return {
        "pairs": _PAIRS,
        "batch": _BATCH,
        "tokens_per_request": _TOKENS,
        "interval_s": _INTERVAL_S,
        "wall_s": {way: statistics.median(spent[0] for spent in values) for way, values in seconds.items()},
        "processor_s": {way: statistics.median(spent[1] for spent in values) for way, values in seconds.items()},
        "median_paired_ratio_wall": statistics.median(ours[0] / plain[0] for ours, plain in pairs),
        "median_paired_ratio_processor": statistics.median(ours[1] / plain[1] for ours, plain in pairs),
        "extra_processor_us_per_token": statistics.median(extra),
        "tokens_per_s": tokens / statistics.median(spent[0] for spent in seconds["without"]),
    }


def main() -> None:
    """Measure on a private cluster and write the record."""
    os.environ.update(CPU_ENVIRONMENT)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, private_cluster(1, CPU_ENVIRONMENT):
        results = asyncio.run(measure(Path(folder)))
    write_result("journal", {"load_average_before": load, **results}, command="python -m benchmarks.journal")


if __name__ == "__main__":
    command.run(main, __doc__)
