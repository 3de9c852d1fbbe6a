"""What warm-up saves of a replica's start: the same server cold, with a fork server, pre-imported, recycled, parked.

The ways are interleaved, round by round. Weights are not included. With ``--rounds-file`` a benchmark that was stopped
goes on after its last whole round.

    python -m benchmarks.engine_start          # about 6 minutes; writes benchmarks/results/engine_start.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray

from benchmarks.record import write_result
from verl_rlhfless.ab.cluster import private_cluster
from verl_rlhfless.demo.assets import arithmetic_problems, build_assets
from verl_rlhfless.demo.recipe import CPU_ENVIRONMENT, common_overrides

_ROUNDS = 3
_TIMEOUT_S = 300.0
_ASLEEP_S = 5.0


class _Starts:
    """Starts one server of a recipe in each way, and ends it."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._rank = 0
        self._server: Any = None
        self.asleep: dict[str, float] = {}

    def cold(self) -> float:
        """Return the seconds of a start as verl does it: actor, imports, engine."""
        from verl_rlhfless.live.server import ElasticServer

        return self._timed(lambda: ray.remote(ElasticServer).options(num_cpus=0).remote(**self._arguments()))

    def fork_server(self) -> float:
        """Return the seconds of a start whose engine processes come from a fork server, nothing done beforehand."""
        return self._timed(self._warm_then_become)

    def pre_imported(self) -> float:
        """Return the seconds of a start on an actor that has done its imports."""
        server = _warm_actor()
        ray.get(server.wait_until_warm.remote(), timeout=_TIMEOUT_S)
        return self._timed(lambda: self._become(server))

    def recycled(self) -> float:
        """Return the seconds of a start on the actor of the replica before."""
        return self._timed(lambda: self._become(self._server))

    def parked(self) -> float:
        """Return the seconds of a wake of an engine that sleeps, on the actor of the replica before."""
        server = self._become(self._server)
        ray.get(server.launch_server.remote(), timeout=_TIMEOUT_S)
        memory = ray.get(server.park.remote(), timeout=_TIMEOUT_S)
        self.asleep = {"host_bytes": memory.host_bytes, "cpu_percent": _cpu_percent(server)}
        start = time.perf_counter()
        ray.get(server.wake.remote("another lease"), timeout=_TIMEOUT_S)
        seconds = time.perf_counter() - start
        self._stop(server)
        return seconds

    def _warm_then_become(self) -> Any:
        return self._become(_warm_actor())

    def _become(self, server: Any) -> Any:
        ray.get(server.become.remote({}, self._arguments()), timeout=_TIMEOUT_S)
        return server

    def _arguments(self) -> dict[str, Any]:
        from verl.workers.rollout.replica import RolloutMode

        self._rank += 1
        return {
            "config": self._config.actor_rollout_ref.rollout,
            "model_config": self._config.actor_rollout_ref.model,
            "rollout_mode": RolloutMode.STANDALONE,
            "workers": [None],
            "replica_rank": self._rank,
            "node_rank": 0,
            "gpus_per_node": 1,
            "nnodes": 1,
            "cuda_visible_devices": "0",
        }

    def _timed(self, create: Callable[[], Any]) -> float:
        start = time.perf_counter()
        server = create()
        self._leave(server)
        ray.get(server.launch_server.remote(), timeout=_TIMEOUT_S)
        seconds = time.perf_counter() - start
        self._stop(server)
        return seconds

    def _stop(self, server: Any) -> None:
        assert not ray.get(server.stop_engine.remote(30.0), timeout=_TIMEOUT_S), "an engine process survived"

    def _leave(self, server: Any) -> None:
        """Go on with ``server``; the one before is not needed any more."""
        if self._server is not None and self._server is not server:
            ray.kill(self._server)
        self._server = server


def _warm_actor() -> Any:
    from verl_rlhfless.live.warm_server import WarmServer

    return ray.remote(WarmServer).options(num_cpus=0).remote()


def _cpu_percent(server: Any) -> float:
    """Return the share of one core that the engine's processes take, over some seconds [%]."""
    processes = [psutil.Process(pid) for pid, _ in ray.get(server.engine_processes.remote(), timeout=_TIMEOUT_S)]

    def used_s() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    before_s = used_s()
    time.sleep(_ASLEEP_S)
    return 100 * (used_s() - before_s) / _ASLEEP_S


def measure(folder: Path, rounds_file: Path) -> dict[str, Any]:
    """Return the median seconds and their spread for each way, and the ratios to a cold start."""
    from hydra import compose, initialize_config_module

    assets = build_assets(folder / "assets", arithmetic_problems(64, seed=1), seed=1)
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", common_overrides(assets, folder, steps=1, seed=1)[:-1])
    starts = _Starts(config)
    ways = {"cold": starts.cold, "fork_server": starts.fork_server, "pre_imported": starts.pre_imported}
    ways["recycled"] = starts.recycled  # after another way: it goes on with that one's actor
    ways["parked"] = starts.parked
    while len(rounds := _read_rounds(rounds_file)) < _ROUNDS:
        seconds = {}
        for name, start in ways.items():
            seconds[name] = start()
            print(f"{name}: {seconds[name]:.2f} s", flush=True)
        with rounds_file.open("a") as file:
            file.write(json.dumps({"seconds": seconds, "asleep": starts.asleep}) + "\n")
    by_way = {name: [each["seconds"][name] for each in rounds] for name in ways}
    median = {name: statistics.median(values) for name, values in by_way.items()}
    return {
        "median_s": median,
        "min_s": {name: min(values) for name, values in by_way.items()},
        "max_s": {name: max(values) for name, values in by_way.items()},
        "ratio_to_cold": {name: value / median["cold"] for name, value in median.items()},
        "asleep": rounds[-1]["asleep"],
        "rounds": _ROUNDS,
    }


def _read_rounds(file: Path) -> list[dict[str, dict[str, float]]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def main() -> None:
    """Measure on a private cluster and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds-file", type=Path, help="keeps every whole round, to go on later")
    given: Path | None = parser.parse_args().rounds_file
    os.environ.update(CPU_ENVIRONMENT)
    with tempfile.TemporaryDirectory() as folder, private_cluster(1, CPU_ENVIRONMENT):
        results = measure(Path(folder), given or Path(folder) / "rounds.jsonl")
    write_result("engine_start", results, command="python -m benchmarks.engine_start")


if __name__ == "__main__":
    main()
